"""What a target says of its own accord: vhost-user's back-end requests, as a front end hears them.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user, "Back-end message types").

How it works: `Notices` is the front end's end of the socket that SET_BACKEND_REQ_FD hands over. Its messages have the framing of all others and numbers of their own.
CONFIG_CHANGE_MSG calls ``on_change``; whoever is called reads the configuration anew. One that wants an acknowledgement gets it before that.

Errors: a target that breaks the protocol here is told to ``on_broken``, once; then nobody listens any more. The end of the socket is no news: that of the connection is.

Not implemented: IOTLB and host notifier messages, which nobody asked for; they break the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from qpair.vhost.framing import BackendRequest, Frame, ProtocolError
from qpair.vhost.messages import Ack, encode
from qpair.vhost.transport import Channel

__all__ = ["Notices"]


class Notices:
    """One connection's back-end requests. ``sock`` becomes its own; `close` ends it."""

    def __init__(self, sock: socket.socket, on_change: Callable[[], None], on_broken: Callable[[ProtocolError], None]) -> None:
        self._channel = Channel(sock)
        self._on_change = on_change
        self._on_broken = on_broken
        self._reader = asyncio.create_task(self._read(), name="virtio back-end requests")

    async def close(self) -> None:
        """Idempotent."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._channel.close()

    async def _read(self) -> None:
        try:
            while (received := await self._channel.receive()) is not None:
                with received:
                    await self._take(received.frame)
        except ProtocolError as error:
            self._on_broken(error)
        except OSError:
            pass  # as an end: the connection's says why

    async def _take(self, frame: Frame) -> None:
        number = int(frame.header.request)
        if number != BackendRequest.CONFIG_CHANGE_MSG:
            raise ProtocolError("back-end request", "request", number, f"{BackendRequest.CONFIG_CHANGE_MSG:d}, a changed configuration")
        for field, count in (("payload size", len(frame.payload)), ("number of descriptors", len(frame.fds))):
            if count:
                raise ProtocolError(BackendRequest.CONFIG_CHANGE_MSG.name, field, count, "0")
        if frame.header.needs_reply:
            await self._channel.send(encode(Ack(frame.header.request, 0)))
        self._on_change()
