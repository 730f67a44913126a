"""A bdev written in Python, in its simplest form: in this process, on this loop, batches of requests in pooled buffers.

    class Ram(Bdev):
        def __init__(self) -> None:
            super().__init__("ram0", "16MiB")
            self.store = bytearray(self.size_bytes)

        def read(self, requests: Sequence[Request]) -> None:
            for request in requests:
                request.data[:] = self.store[request.offset : request.end]

        def write(self, requests: Sequence[Request]) -> None:
            for request in requests:
                self.store[request.offset : request.end] = request.data

    disk = await stack.add(Ram())

How it works: the engine says once that requests wait; `PythonBdevRunner` fetches them in batches and calls one method an operation with all of that
operation's requests. A method may be plain or ``async``. When it returns, each request that it has not completed itself is completed: successfully.
Requests of one batch may be done in any order; a ``flush`` covers the writes completed before it came.

Errors: a method that raises fails the requests it had not completed: with the errno of an ``OSError``, else EIO; the traceback is logged. ``request.fail(errno)``
fails one. Completing twice is a ``ValueError``.

A request's buffer is the engine's: it is released at completion and used for another request then. Keep no slice of it.

Limits: ``depth`` requests at a time (default 128), ``max_io_bytes`` each (default 128 KiB). Plain methods run on the event loop: one that blocks holds up
RPC and the other Python bdevs, though no other I/O of the engine.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any

from qpair.app.sizes import parse_size

if TYPE_CHECKING:
    from qpair._engine import PythonBdevRing
    from qpair.app.bridge import Bridge

__all__ = ["Bdev", "PythonBdevRunner", "Request"]

BATCH_MAX = 64
_NO_DATA = memoryview(b"")

logger = logging.getLogger("qpair.bdev")


class Request:
    """One I/O for a Python bdev. ``offset`` and ``length`` in bytes; ``data`` is the buffer of a read (fill it) or a write (take from it)."""

    __slots__ = ("_ring", "_slot", "data", "done", "length", "offset", "op")

    def __init__(self, ring: PythonBdevRing, slot: int, op: str, offset: int, length: int, data: memoryview | None) -> None:
        self._ring = ring
        self._slot = slot
        self.op = op
        self.offset = offset
        self.length = length
        self.data: memoryview = _NO_DATA if data is None else data
        self.done = False

    @property
    def end(self) -> int:
        """``offset + length``."""
        return self.offset + self.length

    def complete(self, errno: int = 0) -> None:
        """Done: successfully, or with a positive ``errno``. Once; ``data`` is invalid afterwards."""
        if self.done:
            raise ValueError(f"{self.op} at {self.offset} was completed before")
        self.done = True
        if self.data is not _NO_DATA:
            try:
                self.data.release()
            except BufferError:
                logger.warning(
                    "%s at %d: something still holds its buffer, which is used for other requests from now on", self.op, self.offset
                )
        self._ring.complete(self._slot, errno)

    def fail(self, errno: int) -> None:
        """As ``complete(errno)``."""
        self.complete(errno)


Answer = Awaitable[None] | None


class Bdev:
    """Base of all Python bdevs: override ``read`` and, unless ``readonly``, ``write``; the others as wanted. Each takes a batch."""

    def __init__(
        self,
        name: str,
        size: int | str,
        *,
        block_size: int = 512,
        depth: int = 128,
        max_io_bytes: int = 131072,
        readonly: bool = False,
    ) -> None:
        self.name = name
        self.size_bytes = parse_size(size)
        self.block_size = block_size
        self.depth = depth
        self.max_io_bytes = max_io_bytes
        self.readonly = readonly

    def read(self, requests: Sequence[Request]) -> Answer:
        """Fill each ``request.data``."""
        _refuse(requests)
        return None

    def write(self, requests: Sequence[Request]) -> Answer:
        """Keep each ``request.data``."""
        _refuse(requests)
        return None

    def flush(self, requests: Sequence[Request]) -> Answer:
        """Make completed writes durable. By default they are when completed."""
        return None

    def unmap(self, requests: Sequence[Request]) -> Answer:
        """Forget the ranges. By default nothing is forgotten, which is allowed."""
        return None

    def write_zeroes(self, requests: Sequence[Request]) -> Answer:
        """Make the ranges read as zeros. By default refused with EOPNOTSUPP."""
        _refuse(requests)
        return None

    def reset(self, requests: Sequence[Request]) -> Answer:
        """Recover. By default there is nothing to do."""
        return None


def _refuse(requests: Sequence[Request]) -> None:
    for request in requests:
        request.fail(errno.EOPNOTSUPP)


class PythonBdevRunner:
    """Carries requests from one engine ring to one `Bdev` and back."""

    def __init__(self, bridge: Bridge, ring: PythonBdevRing, bdev: Bdev) -> None:
        self._ring = ring
        self._bdev = bdev
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._scheduled = False
        self._unsubscribe = bridge.subscribe_work(ring.id, self._pump)
        self._pump()  # what came before the subscription

    def _pump(self) -> None:
        """Take one batch; come back in the loop's next turn until there is none (the engine then says again when there is)."""
        self._scheduled = False
        if self._closed:
            return
        fetched = self._ring.fetch(BATCH_MAX)
        if not fetched:
            return
        block_size = self._bdev.block_size
        batches: dict[str, list[Request]] = {}
        for slot, op, offset, blocks, data in fetched:
            batches.setdefault(op, []).append(Request(self._ring, slot, op, offset * block_size, blocks * block_size, data))
        for op, requests in batches.items():
            self._serve(op, requests)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _serve(self, op: str, requests: list[Request]) -> None:
        try:
            answer = getattr(self._bdev, op)(tuple(requests))
        except Exception as error:
            self._finish(requests, self._errno(op, error))
            return
        if inspect.isawaitable(answer):
            task = self._loop.create_task(self._wait(op, answer, requests), name=f"bdev {self._bdev.name} {op}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._finish(requests, 0)

    async def _wait(self, op: str, answer: Awaitable[Any], requests: list[Request]) -> None:
        code = errno.ECANCELED
        try:
            await answer
            code = 0
        except Exception as error:
            code = self._errno(op, error)
        finally:
            self._finish(requests, code)

    def _errno(self, op: str, error: Exception) -> int:
        logger.error("bdev %s: %s raised %s: %s", self._bdev.name, op, type(error).__name__, error, exc_info=error)
        return error.errno if isinstance(error, OSError) and error.errno else errno.EIO

    def _finish(self, requests: list[Request], code: int) -> None:
        for request in requests:
            if request.done:
                continue
            try:
                request.complete(code)
            except ValueError as error:
                logger.error("bdev %s: %s", self._bdev.name, error)

    def close(self) -> None:
        """The engine has let go of the bdev: cancel what still runs."""
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        for task in self._tasks:
            task.cancel()
        self._ring.close()

    async def finish(self) -> None:
        """As `close`, and wait for the user's coroutines to end."""
        self.close()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=5)
