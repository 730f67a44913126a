"""What a back end asks of its front end, on the socket that SET_BACKEND_REQ_FD brought: so far, to read the configuration again.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user, "Back-end message types").

How it works: a request is sent without asking for a reply, so nothing is ever read here. What does not fit into the socket's buffer now is
sent when it has room. A change that comes while an older one still waits needs no second request: the front end has not looked yet.

Errors: `ProtocolError` for a descriptor that is no unix stream socket. A front end that has closed its end, or whose socket fails, is no longer asked. That, and the
first time that a request has to wait, is told in one line each.

Limits: one request waits at a time; who reads slowly, or never, costs nothing more.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from qpair.app.parcel import Descriptor
from qpair.vhost.framing import BackendRequest, ProtocolError, Request
from qpair.vhost.record import BackendRecord

__all__ = ["BackendChannel"]


class BackendChannel:
    """The socket ``fd``, which becomes the channel's. ``tell(what)`` hears why the front end is not asked, at most twice."""

    def __init__(self, fd: int, tell: Callable[[str], None], rest: bytes = b"") -> None:
        self._sock = socket.socket(fileno=fd)
        self._tell = tell
        self._told = False
        self._rest = rest
        self._loop = asyncio.get_running_loop()
        if rest:
            self._loop.add_writer(self._sock.fileno(), self._send)

    def record(self) -> BackendRecord | None:
        """For a channel in another process; None if nobody is asked here any more."""
        return BackendRecord(Descriptor.duplicate(self._sock.fileno()), self._rest) if self._sock.fileno() >= 0 else None

    @classmethod
    def of(cls, fd: int, tell: Callable[[str], None]) -> BackendChannel:
        """Of a descriptor that a peer sent, which stays the caller's if it is refused."""
        try:
            probe = socket.socket(fileno=fd)
        except OSError:
            raise ProtocolError(Request.SET_BACKEND_REQ_FD.name, "descriptor", "no socket", "a unix stream socket") from None
        kind = (probe.family, probe.type)
        probe.detach()
        if kind != (socket.AF_UNIX, socket.SOCK_STREAM):
            found = f"a socket of family {kind[0]:d}, type {kind[1]:d}"
            raise ProtocolError(Request.SET_BACKEND_REQ_FD.name, "descriptor", found, "a unix stream socket")
        return cls(fd, tell)

    def config_changed(self) -> None:
        """Have the front end read the configuration again. Returns at once, whatever the peer does."""
        if self._sock.fileno() < 0 or self._rest:
            return
        self._rest = BackendRequest.CONFIG_CHANGE_MSG.encode()
        self._send()

    def close(self) -> None:
        """Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()

    def _send(self) -> None:
        """As much as there is room for; the rest when there is more."""
        try:
            # Not by the descriptor's own flag: the peer has that descriptor too, and may change it.
            sent = self._sock.send(self._rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.close()
            self._tell(f"it is not asked any more: {error.strerror or error}")
            return
        self._rest = self._rest[sent:]
        if self._rest:
            if not self._told:
                self._told = True
                self._tell("it does not read: what it is asked waits until it does")
            self._loop.add_writer(self._sock.fileno(), self._send)
        else:
            self._loop.remove_writer(self._sock.fileno())
