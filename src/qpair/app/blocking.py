"""The blocking twin of `Stack`, for scripts and notebooks: the same calls without ``await``.

    with qpair.BlockingStack(cores="0") as stack:
        disk = stack.malloc("disk0", "64MiB")
        disk.write(0, b"hello".ljust(512))
        print(stack.measure(disk, seconds=1).iops)

How it works: one thread runs an asyncio loop that owns the real stack; each call runs there and the caller waits. Calls may come from several threads.

Errors: those of `Stack`; `StackStopped` outside of ``with``. An interrupt (Ctrl-C) while a call waits cancels that call.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, TypeVar

from qpair.app.stack import Stack
from qpair.errors import StackStopped

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qpair.bdev.client import BdevHandle, OpenBdev
    from qpair.bdev.model import BdevInfo
    from qpair.bdev.perf import PerfResult
    from qpair.bdev.python import Bdev

__all__ = ["BlockingDisk", "BlockingStack"]

T = TypeVar("T")


class BlockingStack:
    """Takes what `Stack` takes. Use it in a ``with`` statement."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stack: Stack | None = None

    def __enter__(self) -> Self:
        loop = asyncio.new_event_loop()
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="qpair-control", daemon=True)
        self._thread.start()
        try:
            self._stack = self._run(self._start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stack, self._stack = self._stack, None
        try:
            if stack is not None:
                self._run(stack.stop())
        finally:
            self._end()

    async def _start(self) -> Stack:
        stack = Stack(**self._options)
        await stack.start()
        return stack

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise StackStopped("the stack is not running; use it inside 'with'")
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def stack(self) -> Stack:
        """The real one, to be used on its own loop only."""
        if self._stack is None:
            raise StackStopped("the stack is not running; use it inside 'with'")
        return self._stack

    def malloc(self, name: str, size: int | str, **options: Any) -> BlockingDisk:
        """As `Stack.malloc`."""
        return self._disk(self.stack.malloc(name, size, **options))

    def null(self, name: str, size: int | str, **options: Any) -> BlockingDisk:
        """As `Stack.null`."""
        return self._disk(self.stack.null(name, size, **options))

    def file(self, name: str, path: str | os.PathLike[str], **options: Any) -> BlockingDisk:
        """As `Stack.file`."""
        return self._disk(self.stack.file(name, path, **options))

    def add(self, bdev: Bdev) -> BlockingDisk:
        """As `Stack.add`: its methods run on the control thread."""
        return self._disk(self.stack.add(bdev))

    def delete(self, disk: str | BlockingDisk) -> None:
        """As `Stack.delete`."""
        self._run(self.stack.delete(_name(disk)))

    def export(self, disk: str | BlockingDisk, socket: str | os.PathLike[str], **options: Any) -> Any:
        """As `Stack.export`."""
        return self._run(self.stack.export(_name(disk), socket, **options))

    def measure(self, disk: str | BlockingDisk, **options: Any) -> PerfResult:
        """As `Stack.measure`."""
        return self._run(self.stack.measure(_name(disk), **options))

    def rpc(self, method: str, **params: Any) -> Any:
        """As `Stack.rpc`."""
        return self._run(self.stack.rpc(method, **params))

    def load_config(self, path: str | os.PathLike[str]) -> None:
        """As `Stack.load_config`."""
        self._run(self.stack.load_config(path))

    def save_config(self, path: str | os.PathLike[str]) -> None:
        """As `Stack.save_config`."""

        async def save() -> None:
            self.stack.save_config(path)

        self._run(save())

    def _disk(self, made: Coroutine[Any, Any, BdevHandle]) -> BlockingDisk:
        return BlockingDisk(self, self._run(made))


class BlockingDisk:
    """A bdev for blocking I/O, opened at the first call that needs it. Offsets and lengths in bytes, as `OpenBdev` has them."""

    def __init__(self, owner: BlockingStack, handle: BdevHandle) -> None:
        self._owner = owner
        self._handle = handle
        self._opened: OpenBdev | None = None
        self.name = handle.name

    def __repr__(self) -> str:
        return f"<disk {self.name!r}>"

    @property
    def info(self) -> BdevInfo:
        """Geometry and state now."""

        async def ask() -> BdevInfo:
            return self._handle.info

        return self._owner._run(ask())

    @property
    def size_bytes(self) -> int:
        """Its size now, in bytes."""
        return self.info.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        return self._owner._run(self._open().read(offset, length))

    def write(self, offset: int, data: Buffer) -> None:
        """All of ``data`` at ``offset``."""
        self._owner._run(self._open().write(offset, data))

    def flush(self) -> None:
        """Return when every completed write is durable."""
        self._owner._run(self._open().flush())

    def unmap(self, offset: int, length: int) -> None:
        """Discard a range."""
        self._owner._run(self._open().unmap(offset, length))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""
        self._owner._run(self._open().write_zeroes(offset, length))

    def close(self) -> None:
        """Give its descriptor back; a later call opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            self._owner._run(opened.close())

    def _open(self) -> OpenBdev:
        if self._opened is None:
            writable = not self.info.readonly
            self._opened = self._owner._run(self._handle.open(write=writable))
        return self._opened


def _name(disk: str | BlockingDisk) -> str:
    return disk if isinstance(disk, str) else disk.name
