"""A unix stream socket that carries vhost-user messages and file descriptors, for asyncio.

The vhost-user protocol; descriptors as SCM_RIGHTS (unix(7)).

How it works: the socket is read when it is ready, never more than the `Assembler` wants, so that the descriptors of a message are not
mixed with those of the next. Every descriptor is owned by exactly one place: the assembler while a message is incomplete, then the
`Received` that the caller closes. Closing is idempotent, so that an error, a cancelled task and a normal end can share one path.

Errors: `ProtocolError` for what the peer sent (also for descriptors that did not fit: MSG_CTRUNC) and for an end in the middle of a
message; `ConnectionError` for what happened to the socket; ``TimeoutError`` is the caller's.

Limits: 8 descriptors a message (`qpair.vhost.framing.FDS_MAX`); one reader and one writer at a time.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import os
import select
import socket
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from qpair.app.parcel import Descriptor
from qpair.vhost.framing import FDS_MAX, Assembler, Frame, ProtocolError

__all__ = ["Channel", "Received", "close_all", "wake"]

_FD_BYTES = array.array("i").itemsize


def _closing_may_wait(fd: int) -> bool:
    """Whether its file system is told of the close, and may never answer. Looking asks none: a fcntl of memory's own, and the name in /proc."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        return error.errno != errno.EBADF and os.readlink(f"/proc/self/fd/{fd}").startswith("/")
    return False


def close_all(fds: Iterable[int]) -> None:
    """Close each; a file of a file system on a thread of its own, so that nobody else waits for it.

    A number that is no descriptor is a bug and raises, after the others are closed.
    """
    failed: OSError | None = None
    for fd in fds:
        try:
            if _closing_may_wait(fd):
                threading.Thread(target=os.close, args=(fd,), name="qpair-close", daemon=True).start()
            else:
                os.close(fd)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


class Received:
    """A whole message and its descriptors; a context manager that closes those that nobody `take`s."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._owned = list(frame.fds)

    def take(self, index: int = 0) -> int:
        """Descriptor ``index``, now the caller's to close."""
        fd = self.frame.fds[index]
        self._owned.remove(fd)
        return fd

    def close(self) -> None:
        """Close what was not taken. Idempotent."""
        owned, self._owned = self._owned, []
        close_all(owned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Channel:
    """One connection. ``sock`` becomes the channel's, non-blocking, closed by `close`."""

    def __init__(self, sock: socket.socket, unread: bytes = b"", fds: Sequence[Descriptor] = ()) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._assembler = Assembler()
        self._loop = asyncio.get_running_loop()
        numbers = [fd.take() for fd in fds]
        while unread:
            wanted = self._assembler.wanted
            self._assembler.feed(unread[:wanted], numbers)
            unread, numbers = unread[wanted:], []

    def take_unread(self) -> tuple[bytes, list[Descriptor]]:
        """What came of an incomplete message, with its descriptors, for a channel elsewhere."""
        fds, self._assembler.fds = self._assembler.fds, []
        return self._assembler.partial, [Descriptor(fd) for fd in fds]

    def duplicate(self) -> Descriptor:
        """The connection, for a channel elsewhere."""
        return Descriptor.duplicate(self._sock.fileno())

    async def receive(self) -> Received | None:
        """The next message, or None when the peer left between two messages."""
        while True:
            data, fds = await self._read(self._assembler.wanted)
            if not data:
                close_all(fds)
                if self._assembler.at_boundary:
                    return None
                raise ProtocolError("connection", "message", "cut short", f"followed by {self._assembler.wanted} more bytes")
            frame = self._assembler.feed(data, fds)
            if frame is not None:
                return Received(frame)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """All of ``data``; the descriptors go with its first byte and stay the caller's."""
        view = memoryview(data)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while view:
            try:
                sent = self._sock.sendmsg([view], control, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                await self._writable()
                continue
            view = view[sent:]
            control = []

    @property
    def hung_up(self) -> bool:
        """The peer has closed its end, whether or not that was read yet."""
        if self._sock.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        return any(events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, events in poller.poll(0))

    def close(self) -> None:
        """Close the socket and every descriptor of an incomplete message. Idempotent; not while a `receive` or `send` is pending."""
        fds, self._assembler.fds = self._assembler.fds, []
        self._sock.close()
        close_all(fds)

    async def _read(self, wanted: int) -> tuple[bytes, list[int]]:
        while True:
            try:
                data, control, flags, _ = self._sock.recvmsg(wanted, socket.CMSG_SPACE(FDS_MAX * _FD_BYTES), socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                await self._readable()
                continue
            fds = _descriptors(control)
            if flags & socket.MSG_CTRUNC:
                close_all(fds)
                raise ProtocolError("message", "number of descriptors", f"more than {len(fds)}", f"at most {FDS_MAX}")
            return data, fds

    async def _readable(self) -> None:
        fd = self._sock.fileno()
        ready = self._loop.create_future()
        self._loop.add_reader(fd, wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(fd)

    async def _writable(self) -> None:
        fd = self._sock.fileno()
        ready = self._loop.create_future()
        self._loop.add_writer(fd, wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(fd)


def wake(ready: asyncio.Future[None]) -> None:
    """Callback of a reader or writer that somebody awaits; it may run once more after the answer."""
    if not ready.done():
        ready.set_result(None)


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    return fds.tolist()
