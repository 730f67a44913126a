"""The connection between giver and taker, for asyncio.

How it works: parcels are sent and received on a blocking socket by a thread; a deadline shuts the socket down, so that no thread stays behind.

Errors: `Lost` for everything: the peer left, sent what cannot be, said `Failed`, or let a deadline pass; it says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import struct
from typing import Any, TypeVar

import msgspec

from qpair.app.parcel import Descriptor, ParcelError, receive, send
from qpair.app.takeover.messages import Failed
from qpair.errors import NotPermitted, QpairError

__all__ = ["Lost", "Peer", "same_user"]

logger = logging.getLogger("qpair.app")

Message = TypeVar("Message")


class Lost(QpairError, ConnectionError):
    """There is no peer any more, or none to go on with. ``left``: it ended its side without a word; ``told``: it said so, and has let go of everything."""

    def __init__(self, message: str, *, left: bool = False, told: bool = False) -> None:
        super().__init__(message)
        self.left = left
        self.told = told


class Peer:
    """Process ``pid`` at the other end of ``sock``, which becomes its own."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._process = Descriptor(os.pidfd_open(pid))
        self.pid = pid
        self.name = f"process {pid}"

    async def send(self, message: msgspec.Struct, deadline_s: float) -> None:
        """All of it."""
        await self._within(deadline_s, send, message)

    async def receive(self, wanted: type[Message], known: Any, deadline_s: float) -> Message:
        """The next message, which must be a ``wanted``. ``known``: all that the peer may send."""
        message = await self._within(deadline_s, receive, known)
        if isinstance(message, Failed):
            raise Lost(f"{self.name}: {message.reason:.500}", told=True)
        if not isinstance(message, wanted):
            raise Lost(f"{self.name} sent {type(message).__name__} where {wanted.__name__} was expected")
        return message

    async def tell_failed(self, reason: str) -> None:
        """Best effort: whoever left needs no reason."""
        with contextlib.suppress(Lost):
            await self.send(Failed(reason[:500]), 1.0)

    async def dead(self, deadline_s: float) -> bool:
        """Whether its process has ended, or does before the deadline."""
        return bool((await asyncio.to_thread(select.select, [self._process.fileno()], [], [], deadline_s))[0])

    async def end(self, deadline_s: float) -> None:
        """Wait for its process to end, and kill it if it does not."""
        if not await self.dead(deadline_s):
            logger.error("takeover: %s does not let go, and is killed", self.name)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process.fileno(), signal.SIGKILL)
            await self.dead(deadline_s)

    def close(self) -> None:
        """Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._process.close()

    async def _within(self, deadline_s: float, what: Any, argument: Any) -> Any:
        try:
            return await asyncio.wait_for(asyncio.to_thread(what, self._sock, argument), deadline_s)
        except EOFError:
            raise Lost(f"{self.name} left", left=True) from None
        except ParcelError as error:
            raise Lost(f"{self.name}: {error}") from error
        except TimeoutError:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            raise Lost(f"{self.name} did not answer within {deadline_s:g} s") from None
        except OSError as error:
            raise Lost(f"{self.name}: {error.strerror or error}", left=True) from error


def same_user(sock: socket.socket, what: str) -> int:
    """The peer's process id; `NotPermitted` unless it runs as the user that this process runs as."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid():
        raise NotPermitted(f"{what} is refused: process {pid} belongs to user {uid}, this one to user {os.geteuid()}")
    return int(pid)
