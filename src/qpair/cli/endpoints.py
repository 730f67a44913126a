"""The two ends of a `qpair dd`: bdevs, files, pipes.

How it works: an `End` reads and writes at byte offsets, several requests at a time. A bdev's requests are the engine's; a file's are system calls in threads. A pipe knows no
offsets: it is read and written in order, one request at a time (``sequential``).

Errors: `QpairError` of what the engine or the system said, with the name of the end and the offset.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qpair.bdev.client import PIECE_BYTES, OpenBdev
from qpair.errors import InvalidArgument, QpairError, from_errno

__all__ = ["BdevEnd", "End", "FileEnd", "open_file"]

T = TypeVar("T")


class End:
    """One side of a copy. ``length`` is None where only its end will tell; ``unit`` is the number of bytes that every request is a multiple of."""

    name: str
    length: int | None
    unit: int = 1
    sequential = False
    grows = False
    """Whether a write past ``length`` makes it longer."""

    async def read(self, offset: int, length: int) -> bytes | memoryview:
        """Up to ``length`` bytes; fewer at the end alone."""
        raise self._cannot("be read")

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """All of ``data``."""
        raise self._cannot("be written to")

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros without sending them; ``unmap``: by discarding it."""
        raise self._cannot("be zeroed")

    def hole(self, offset: int, length: int) -> bool:
        """Whether the range is known to be zeros without reading it."""
        return False

    async def finish(self, end: int) -> None:
        """All is written, up to byte ``end``: make it durable."""

    async def reread(self) -> None:
        """What is read from now on should come from the device, not from a cache."""

    async def close(self) -> None:
        """Give it back."""

    def _cannot(self, what: str) -> QpairError:
        return InvalidArgument(f"{self.name} cannot {what}")


class BdevEnd(End):
    """An open bdev."""

    def __init__(self, name: str, disk: OpenBdev, size_bytes: int, *, unmaps: bool) -> None:
        self.name = name
        self.length = size_bytes
        self.unit = disk.block_size
        self._disk = disk
        self._unmaps = unmaps

    async def read(self, offset: int, length: int) -> bytes | memoryview:
        return await (self._disk.read_view if length <= PIECE_BYTES else self._disk.read)(offset, length)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        await self._disk.write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        if unmap and not self._unmaps:
            raise InvalidArgument(
                f"{self.name} cannot unmap; leave out --unmap: zeros are then written by write_zeroes", errno=errno.EOPNOTSUPP
            )
        await (self._disk.unmap if unmap else self._disk.write_zeroes)(offset, length)

    async def finish(self, end: int) -> None:
        await self._disk.flush()

    async def close(self) -> None:
        await self._disk.close()


class FileEnd(End):
    """A regular file, a block device, or something that has no offsets (a pipe, a terminal)."""

    def __init__(self, name: str, descriptor: int, *, threads: int) -> None:
        self.name = name
        self._descriptor = descriptor
        self._mode = os.fstat(descriptor).st_mode
        self.sequential = not (stat.S_ISREG(self._mode) or stat.S_ISBLK(self._mode))
        self.grows = stat.S_ISREG(self._mode) or self.sequential
        self.length = None if self.sequential else os.lseek(descriptor, 0, os.SEEK_END)
        self._old_bytes = self.length or 0  # there may be data up to here: a hole will not do for zeros
        self._threads = ThreadPoolExecutor(1 if self.sequential else threads, thread_name_prefix="qpair-dd")

    async def read(self, offset: int, length: int) -> bytes:
        return await self._call(f"reading at byte {offset}", lambda: self._read(offset, length))

    def _read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        left = length
        while left:
            part = os.read(self._descriptor, left) if self.sequential else os.pread(self._descriptor, left, offset + length - left)
            if not part:
                break
            if len(part) == length:
                return part
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        def write() -> None:
            view = memoryview(data)
            at = offset
            while view:
                done = os.write(self._descriptor, view) if self.sequential else os.pwrite(self._descriptor, view, at)
                view = view[done:]
                at += done

        await self._call(f"writing at byte {offset}", write)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        if self.sequential or not stat.S_ISREG(self._mode) or offset < self._old_bytes:
            await self.write(offset, bytes(length))
        # else a hole, which `finish` makes part of the file

    def hole(self, offset: int, length: int) -> bool:
        if not stat.S_ISREG(self._mode):
            return False
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            return error.errno == errno.ENXIO  # no data from here to the end

    async def finish(self, end: int) -> None:
        def finish() -> None:
            if stat.S_ISREG(self._mode) and os.fstat(self._descriptor).st_size < end:
                os.ftruncate(self._descriptor, end)
            if not self.sequential:
                os.fsync(self._descriptor)

        await self._call("flushing", finish)

    async def reread(self) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    async def close(self) -> None:
        # a read of a pipe that nobody writes to ends with the process
        self._threads.shutdown(wait=not self.sequential, cancel_futures=True)
        if self._descriptor > 2:
            os.close(self._descriptor)

    async def _call(self, what: str, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except OSError as error:
            if isinstance(error, QpairError):
                raise
            raise from_errno(error.errno or errno.EIO, f"{self.name}: {what}: {error.strerror}") from error


def open_file(path: str, *, write: bool, truncate_at: int | None, threads: int) -> FileEnd:
    """``path``, or standard input or output for "-". ``truncate_at``: a regular file that is written ends there before anything else is done; None keeps it."""
    if path == "-":
        descriptor = 1 if write else 0
        if os.isatty(descriptor):
            way, redirection = ("written to", ">") if write else ("read", "<")
            raise InvalidArgument(f"'-' is a terminal, which is not {way}; redirect it ({redirection} FILE) or use a pipe")
        return FileEnd("standard output" if write else "standard input", descriptor, threads=threads)
    flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
    try:
        # a FIFO is opened for writing alone: to hold both ends would hide that nobody reads
        if write and os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
            flags = os.O_WRONLY
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, f"{path}: {error.strerror}") from error
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise InvalidArgument(f"{path}: is a directory", errno=errno.EISDIR)
        if truncate_at is not None and stat.S_ISREG(os.fstat(descriptor).st_mode) and os.fstat(descriptor).st_size > truncate_at:
            os.ftruncate(descriptor, truncate_at)
        return FileEnd(path, descriptor, threads=threads)
    except BaseException:
        os.close(descriptor)
        raise
