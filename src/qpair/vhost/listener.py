"""A listening unix socket with a file of its own.

How it works: `Listener.open` binds, and takes the place of a socket file on which nobody listens any more, or takes a socket that listens there already (a service
manager's, whose file it leaves alone); `Listener.run` accepts one connection at a time and waits for whoever takes it, so that others stay in the kernel's
queue; `Listener.close` removes the file, if it is still the one that was made.

Errors: `Busy` where somebody listens on the path, `AlreadyExists` where the file is no socket, `InvalidArgument` for a path that is too
long, `NoSuchFile` and `NotPermitted` as the file system says; each names the path.

Limits: 107 bytes of path (sun_path without its final zero), 16 waiting connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable

from qpair.app.parcel import Descriptor
from qpair.app.passed import Passed, PassedRecord
from qpair.errors import AlreadyExists, Busy, InvalidArgument, from_errno
from qpair.vhost.transport import wake

__all__ = ["PATH_BYTES_MAX", "Listener", "check_path"]

PATH_BYTES_MAX = 107
_BACKLOG = 16
_ACCEPT_PAUSE_S = 0.5

logger = logging.getLogger("qpair.vhost")


class Listener:
    """Listens on ``path`` from `open` to `close`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._sock: socket.socket | None = None
        self._file: tuple[int, int] | None = None

    def open(self, passed: Passed | None = None) -> None:
        """Bind and listen; or take ``passed``, which listens on this path."""
        if passed is not None:
            passed.sock.setblocking(False)
            self._sock = passed.sock
            self._file = _identity(self.path) if passed.owned else None
            return
        check_path(self.path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(sock)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    async def run(self, accepted: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Hand over connections until cancelled. ``accepted`` owns its socket from the call on."""
        loop = asyncio.get_running_loop()
        while (sock := self._sock) is not None:
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                await _readable(loop, sock)
                continue
            except OSError as error:  # out of descriptors or memory: the connection stays in the queue
                logger.error("socket %s: cannot accept: %s; trying again in %s s", self.path, error.strerror, _ACCEPT_PAUSE_S)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            await accepted(connection)

    @property
    def closed(self) -> bool:
        """It does not listen."""
        return self._sock is None

    def release(self) -> PassedRecord | None:
        """Stop listening here, for somebody else to go on: the queue of connections and the file stay. Not while `run` runs."""
        if self._sock is None:
            return None
        released = PassedRecord(os.path.abspath(self.path), Descriptor.duplicate(self._sock.fileno()), self._file is not None)
        self._sock.close()
        self._sock = None
        return released

    def disown(self) -> None:
        """The file is somebody else's."""
        self._file = None

    def close(self) -> None:
        """Stop listening and remove the file. Idempotent; not while `run` runs."""
        if self._sock is None:
            return
        self._sock.close()
        self._sock = None
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._file:
                os.unlink(self.path)

    def _bind(self, sock: socket.socket) -> None:
        try:
            try:
                sock.bind(self.path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(self.path)
                sock.bind(self.path)
            self._file = _identity(self.path)
        except OSError as error:
            if isinstance(error, Busy | AlreadyExists):
                raise
            raise from_errno(error.errno or errno.EIO, f"socket path {self.path}: {error.strerror}") from error


def check_path(path: str) -> None:
    """Refuse what cannot be the address of a socket."""
    if not path or "\0" in path:
        raise InvalidArgument(f"socket path {path!r:.120} is empty or holds a zero byte")
    if (length := len(os.fsencode(path))) > PATH_BYTES_MAX:
        raise InvalidArgument(f"socket path {path!r:.120} is {length} bytes long, the limit is {PATH_BYTES_MAX}")


def _remove_stale(path: str) -> None:
    """Unlink a socket file on which nobody listens."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise AlreadyExists(f"socket path {path}: a file that is no socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise Busy(f"socket path {path}: somebody listens on it")


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready = loop.create_future()
    loop.add_reader(sock.fileno(), wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
