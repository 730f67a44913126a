"""Using a bdev from Python: a handle by name, and single I/Os on an open one.

Offsets and lengths are bytes, multiples of the block size. A read gives ``bytes``; a write takes anything with the buffer protocol (bytes, memoryview, NumPy
arrays), copied before the call returns. Single I/Os cross into the engine one by one: for load, use `qpair.bdev.perf`.

Errors: `InvalidArgument` names an offset or length that is no multiple of the block size or past the end; `ReadOnly`; `IoFailed`; `NoSuchBdev`; `StackStopped`.
Limits: one I/O up to 1 MiB on the wire; longer reads and writes are cut into such pieces, eight of them in flight, so they are not atomic.
"""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from qpair.bdev.zones import Action, Zones
from qpair.errors import InvalidArgument, QpairError, StackStopped, from_engine

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qpair._engine import IoTimeout
    from qpair.app.stack import Stack
    from qpair.bdev.model import BdevInfo

__all__ = ["BdevHandle", "OpenBdev", "TimedOut"]

PIECE_BYTES = 1 << 20
PIECES_AT_ONCE = 8
TIMEOUT_S_MAX = 7 * 86_400
Op = Literal["read", "write", "flush", "unmap", "write_zeroes", "reset", "compare", "compare_and_write", "copy"]


class BdevHandle:
    """A bdev by name. It holds nothing open; ``info`` asks the engine each time."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self.name = name

    def __repr__(self) -> str:
        return f"<bdev {self.name!r}>"

    @property
    def info(self) -> BdevInfo:
        """Geometry and state now; `NoSuchBdev` once it is gone."""
        return self._stack.bdevs.info(self.name)

    @property
    def size_bytes(self) -> int:
        """Its size now, in bytes."""
        return self.info.size_bytes

    async def open(self, *, write: bool = True) -> OpenBdev:
        """A descriptor for I/O. Use ``async with``, or ``close`` it."""
        try:
            token = self._stack.engine.bdev_open(self.name, write=write)
        except OSError as error:
            raise from_engine(error) from error
        descriptor: int = await self._stack.bridge.call(token, unclaimed=self._close_unclaimed)
        return OpenBdev(self._stack, self.name, descriptor, self.info.block_size)

    def _close_unclaimed(self, descriptor: int) -> None:
        """Whoever opened was cancelled meanwhile."""
        self._stack.engine.bdev_close(descriptor)

    async def read(self, offset: int, length: int) -> bytes:
        """Open, read once, close."""
        async with await self.open(write=False) as disk:
            return await disk.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """Open, write once, close."""
        async with await self.open() as disk:
            await disk.write(offset, data)

    async def resize(self, size: int | str) -> None:
        """Change its size, where its kind can."""
        await self._stack.bdevs.resize(self.name, size)

    async def delete(self) -> None:
        """Remove it from the stack."""
        await self._stack.bdevs.delete(self.name)


class TimedOut:
    """An I/O that takes longer than its descriptor's time-out. ``offset`` and ``length`` in bytes, ``age`` in seconds."""

    def __init__(self, disk: OpenBdev, event: IoTimeout) -> None:
        self._disk, self._io = disk, event.io
        self.op = event.op
        self.offset = event.offset_blocks * disk.block_size
        self.length = event.num_blocks * disk.block_size
        self.age = event.age_ns / 1e9

    def __repr__(self) -> str:
        return f"<{self.op} of {self.length} bytes at {self.offset} of bdev {self._disk.name!r}, under way for {self.age:.3f} s>"

    def abort(self) -> None:
        """Ask for its early end: a hint. It then fails for whoever waits for it, or succeeds after all."""
        self._disk._abort(self._io)


class OpenBdev:
    """One open descriptor. Methods may be awaited concurrently; nothing but ``flush`` orders them."""

    def __init__(self, stack: Stack, name: str, descriptor: int, block_size: int) -> None:
        self._stack = stack
        self._descriptor: int | None = descriptor
        self._unwatch: Callable[[], None] = lambda: None
        self.name = name
        self.block_size = block_size

    @property
    def info(self) -> BdevInfo:
        """Geometry and state now."""
        return self._stack.bdevs.info(self.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        first, blocks = self._blocks(offset, length)
        pieces = await self._all([("read", at, count, None) for at, count in self._pieces(first, blocks)])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_view(self, offset: int, length: int) -> memoryview:
        """As `read`, up to 1 MiB, in place: a read-only view of the engine's own memory. As long as it, or anything made of it (a slice, an array), lives, that
        memory is used for nothing else; let it go soon, or pay for it."""
        view: Any = await self._io("read", *self._piece(offset, length), view=True)
        assert isinstance(view, memoryview)
        return view

    async def read_with_metadata(self, offset: int, length: int) -> tuple[bytes, bytes]:
        """``length`` bytes from ``offset``, and the metadata of those blocks; up to 1 MiB."""
        both: Any = await self._io("read", *self._piece(offset, length), metadata=True)
        data, metadata = both
        return data, metadata

    async def write_with_metadata(self, offset: int, data: Buffer, metadata: Buffer) -> None:
        """All of ``data`` at ``offset``, and the metadata of those blocks with it; up to 1 MiB."""
        view = memoryview(data).cast("B")
        await self._io("write", *self._piece(offset, view.nbytes), view, metadata=memoryview(metadata).cast("B"))

    def _piece(self, offset: int, length: int) -> tuple[int, int]:
        if length > PIECE_BYTES:
            raise InvalidArgument(f"bdev {self.name!r}: length {length} is more than {PIECE_BYTES} for one I/O")
        return self._blocks(offset, length)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """All of ``data`` at ``offset``. ``fua``: durable when this returns."""
        view = memoryview(data).cast("B")
        first, blocks = self._blocks(offset, view.nbytes)

        def data_of(at: int, count: int) -> memoryview:
            start = (at - first) * self.block_size
            return view[start : start + count * self.block_size]

        await self._all([("write", at, count, data_of(at, count)) for at, count in self._pieces(first, blocks)], fua=fua)

    async def flush(self) -> None:
        """Return when every write completed before this call is durable."""
        await self._io("flush")

    async def unmap(self, offset: int, length: int) -> None:
        """Discard: the range may read as zeros or as before."""
        await self._io("unmap", *self._blocks(offset, length))

    async def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards."""
        await self._io("write_zeroes", *self._blocks(offset, length))

    async def compare(self, offset: int, data: Buffer) -> bool:
        """Whether the bdev holds ``data`` at ``offset``."""
        view = memoryview(data).cast("B")
        return await self._matches("compare", *self._blocks(offset, view.nbytes), view)

    async def compare_and_write(self, offset: int, expected: Buffer, data: Buffer) -> bool:
        """If the bdev holds ``expected`` at ``offset``, write ``data`` (as long) there; nobody else writes in between. Whether it did."""
        old, new = memoryview(expected).cast("B"), memoryview(data).cast("B")
        if old.nbytes != new.nbytes:
            raise InvalidArgument(f"bdev {self.name!r}: data has {new.nbytes} bytes, expected {old.nbytes}")
        return await self._matches("compare_and_write", *self._blocks(offset, old.nbytes), b"".join((old, new)))

    async def _matches(self, op: Op, offset_blocks: int, num_blocks: int, data: Any) -> bool:
        try:
            await self._io(op, offset_blocks, num_blocks, data)
        except QpairError as error:
            if getattr(error, "errno", None) == errno.EILSEQ:
                return False
            raise
        return True

    async def copy(self, source: int, offset: int, length: int) -> None:
        """``length`` bytes from ``source`` to ``offset``, within the bdev; the ranges may overlap."""
        first, blocks = self._blocks(offset, length)
        await self._io("copy", first, blocks, source_blocks=self._blocks(source, length)[0])

    @property
    def zones(self) -> Zones:
        """Its zones; `InvalidArgument` if it is not zoned."""
        return Zones(self)

    async def zone_io(self, action: Action, offset: int, length: int, data: Any = None) -> Any:
        """One I/O on zones, see `qpair.bdev.zones`."""
        first, blocks = self._blocks(offset, length)
        if self._descriptor is None:
            raise StackStopped(f"bdev {self.name!r}: this descriptor is closed")
        try:
            token = self._stack.engine.bdev_zone_io(self._descriptor, action, first, blocks, data)
        except OSError as error:
            raise from_engine(error) from error
        return await self._stack.bridge.call(token)

    def set_timeout(self, seconds: float, callback: Callable[[TimedOut], None] | None) -> None:
        """Have ``callback(late)`` called on the loop for each I/O of this descriptor that takes longer than ``seconds``, and again for each further such time that
        passes. The I/O is still under way: abort it, `reset`, or wait. 0 ends it. It is noticed up to a quarter of the time later, at most a second."""
        if self._descriptor is None:
            raise StackStopped(f"bdev {self.name!r}: this descriptor is closed")
        if not 0 <= seconds <= TIMEOUT_S_MAX or (seconds and callback is None):
            raise InvalidArgument(f"bdev {self.name!r}: timeout {seconds} s: 0 to {TIMEOUT_S_MAX}, with a callback")
        descriptor, bridge = self._descriptor, self._stack.bridge
        try:
            self._stack.engine.bdev_set_timeout(descriptor, math.ceil(seconds * 1000))
        except OSError as error:
            raise from_engine(error) from error
        self._unwatch()
        if seconds and callback is not None:
            tell = callback
            self._unwatch = bridge.subscribe_timeout(descriptor, lambda event: tell(TimedOut(self, event)))
        else:
            self._unwatch = lambda: None

    async def reset(self, *, drain: bool = False) -> None:
        """Stop the whole bdev, reset it and go on. What is in flight is aborted, or, with ``drain``, waited for; new I/O waits meanwhile."""
        await self._io("reset", drain=drain)

    async def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        self._unwatch()
        if descriptor is not None and self._stack.state in ("startup", "runtime"):
            await self._stack.bridge.call(self._stack.engine.bdev_close(descriptor))

    def _abort(self, io: int) -> None:
        if self._descriptor is not None and self._stack.state in ("startup", "runtime"):
            self._stack.engine.bdev_abort(self._descriptor, io)

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        for what, value in (("offset", offset), ("length", length)):
            if value < 0 or value % self.block_size:
                raise InvalidArgument(f"bdev {self.name!r}: {what} {value} is no multiple of the block size {self.block_size}")
        if length == 0:
            raise InvalidArgument(f"bdev {self.name!r}: length is 0")
        return offset // self.block_size, length // self.block_size

    def _pieces(self, first: int, blocks: int) -> list[tuple[int, int]]:
        step = max(1, PIECE_BYTES // self.block_size)
        return [(at, min(step, first + blocks - at)) for at in range(first, first + blocks, step)]

    async def _all(self, pieces: list[tuple[Op, int, int, Any]], *, fua: bool = False) -> list[bytes]:
        """Some at a time. When one fails the rest of its batch is waited for: nothing of a failed call happens later."""
        done: list[bytes] = []
        for begin in range(0, len(pieces), PIECES_AT_ONCE):
            batch = await asyncio.gather(
                *(self._io(*piece, fua=fua) for piece in pieces[begin : begin + PIECES_AT_ONCE]), return_exceptions=True
            )
            for answer in batch:
                if isinstance(answer, BaseException):
                    raise answer
                done.append(answer)
        return done

    async def _io(self, op: Op, offset_blocks: int = 0, num_blocks: int = 0, data: Any = None, **options: Any) -> bytes:
        if self._descriptor is None:
            raise StackStopped(f"bdev {self.name!r}: this descriptor is closed")
        try:
            token = self._stack.engine.bdev_io(self._descriptor, op, offset_blocks, num_blocks, data, **options)
        except OSError as error:
            raise from_engine(error) from error
        value: bytes = await self._stack.bridge.call(token)
        return value
