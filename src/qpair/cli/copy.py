"""Copying from one end to the other: many requests in flight, zeros left out, everything read again where that is asked for.

How it works: `Copy.run` starts ``depth`` workers; each takes the next unit of ``unit_bytes``, reads it, and writes it. Between two bdevs or files units finish in any
order; an end without offsets (a pipe) is read and written in order. ``sparse`` looks for zeros in steps of 64 KiB, and asks a file for its holes before it
reads. `Copy.verify` reads the output once more and compares digests that were made while copying, so a pipe can be verified too.

Errors: those of the ends; `IoFailed` for what does not verify, with the offset; the first error stops the copy. `NoSpace` for more than the output holds.

Limits: ``depth * unit_bytes`` of memory; 16 bytes a unit for ``verify``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from qpair.cli.endpoints import End
from qpair.errors import InvalidArgument, IoFailed, NoSpace

__all__ = ["Copy", "Plan", "make_plan"]

SPARSE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be copied, in bytes. ``length`` None: until the input ends."""

    skip: int
    seek: int
    length: int | None
    unit: int


def make_plan(source: End, sink: End, *, unit: int, skip: int, seek: int, count: int | None) -> Plan:
    """``skip``, ``seek`` and ``count`` are in units of ``unit`` bytes. What does not fit is refused before anything is written."""
    for end in (source, sink):
        if unit % end.unit:
            raise InvalidArgument(f"--bs {unit} is no multiple of {end.name}'s block size {end.unit}")
    if seek and sink.sequential:
        raise InvalidArgument(f"--seek {seek}: {sink.name} has no offsets; leave --seek out")
    start, at = skip * unit, seek * unit
    length = None if count is None else count * unit
    if source.length is not None:
        if start > source.length:
            raise InvalidArgument(f"--skip {skip}: {source.name} ends after {source.length // unit} units of {unit} bytes")
        length = source.length - start if length is None else min(length, source.length - start)
    if not sink.grows and sink.length is not None:
        room = sink.length - at
        if room < 0:
            raise InvalidArgument(f"--seek {seek}: {sink.name} ends after {sink.length // unit} units of {unit} bytes")
        if length is not None and length > room:
            raise NoSpace(
                f"{length} bytes do not fit into the {room} that {sink.name} has from --seek on; copy what fits: --count {room // unit}"
            )
    return Plan(start, at, length, unit)


class Copy:
    """One copy under way. The counters may be read at any time."""

    def __init__(
        self, source: End, sink: End, plan: Plan, *, depth: int, sparse: bool = False, unmap: bool = False, verify: bool = False
    ) -> None:
        self.source, self.sink, self.plan = source, sink, plan
        self.depth = depth
        self.copied_bytes = 0
        self.zero_bytes = 0
        self.padded_bytes = 0
        self.verified_bytes = 0
        self._sparse = sparse or unmap
        self._unmap = unmap
        self._verify = verify
        self._digests: dict[int, tuple[int, bytes]] = {}
        self._done: set[int] = set()
        self._contiguous = 0
        self._input_ended = False
        self._reading = asyncio.Lock()
        self._turn = asyncio.Condition()
        self._next_write = 0

    @property
    def contiguous_units(self) -> int:
        """So many units from the first on are copied: from there an interrupted copy can go on."""
        return self._contiguous

    async def run(self) -> None:
        """Copy, and make it durable."""
        if self.source.sequential:
            await self._drop(self.plan.skip)
        units = self._units()
        async with asyncio.TaskGroup() as group:
            for _ in range(self.depth):
                group.create_task(self._worker(units))
        await self.sink.finish(self.plan.seek + self.copied_bytes)

    async def verify(self) -> None:
        """Read the output again and compare it with what was read; `IoFailed` names the first byte of a unit that differs."""
        await self.sink.reread()
        units = iter(sorted(self._digests.items()))

        async def worker() -> None:
            for index, (length, digest) in units:
                at = self.plan.seek + index * self.plan.unit
                if await self._digest(await self.sink.read(at, length)) != digest:
                    raise IoFailed(f"{self.sink.name}: the {length} bytes from byte {at} on are not what was read from {self.source.name}")
                self.verified_bytes += length

        async with asyncio.TaskGroup() as group:
            for _ in range(self.depth):
                group.create_task(worker())

    def _units(self) -> Iterator[tuple[int, int]]:
        """(index, length) of each unit."""
        index = 0
        while not self._input_ended:
            begin = index * self.plan.unit
            length = self.plan.unit if self.plan.length is None else min(self.plan.unit, self.plan.length - begin)
            if length <= 0:
                return
            yield index, length
            index += 1

    async def _worker(self, units: Iterator[tuple[int, int]]) -> None:
        while True:
            if self.source.sequential:
                async with self._reading:
                    unit = next(units, None)
                    data = None if unit is None else await self._read(*unit)
            else:
                unit = next(units, None)
                data = None if unit is None else await self._read(*unit)
            if unit is None or data is None:
                return
            index, length = unit
            if len(data) < length:
                self._input_ended = True
            if data:
                if self.sink.sequential:
                    await self._in_turn(index, data)
                else:
                    await self._write(index, data)
                self._count(index, len(data))

    async def _read(self, index: int, length: int) -> bytes | memoryview:
        at = self.plan.skip + index * self.plan.unit
        if self._sparse and self.source.hole(at, length):
            return bytes(length)
        return await self.source.read(at, length)

    async def _in_turn(self, index: int, data: bytes | memoryview) -> None:
        async with self._turn:
            await self._turn.wait_for(lambda: self._next_write == index)
        await self._write(index, data)
        async with self._turn:
            self._next_write += 1
            self._turn.notify_all()

    async def _write(self, index: int, data: bytes | memoryview) -> None:
        at = self.plan.seek + index * self.plan.unit
        length = len(data)
        if rest := length % self.sink.unit:
            self.padded_bytes = self.sink.unit - rest
            data = b"".join((data, bytes(self.padded_bytes)))
        if not self.sink.grows and self.sink.length is not None and at + len(data) > self.sink.length:
            raise NoSpace(
                f"{self.sink.name} is full after {self.sink.length} bytes, and {self.source.name} has more; copy what fits: --count {index}"
            )
        if self._verify:
            self._digests[index] = (len(data), await self._digest(data))
        for begin, end, zeros in self._segments(data):
            if zeros:
                self.zero_bytes += min(end, length) - min(begin, length)
                await self.sink.zero(at + begin, end - begin, unmap=self._unmap)
            else:
                await self.sink.write(at + begin, data if end - begin == len(data) else memoryview(data)[begin:end])

    def _segments(self, data: bytes | memoryview) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, all zeros) of ``data``, as long as they can be."""
        if not self._sparse:
            yield 0, len(data), False
            return
        step = -(-SPARSE_BYTES // self.sink.unit) * self.sink.unit
        zeros = bytes(step)
        begin, state = 0, None
        for at in range(0, len(data), step):
            piece = bytes(data[at : at + step])
            now = piece == zeros[: len(piece)]
            if state is not None and now != state:
                yield begin, at, state
                begin = at
            state = now
        if state is not None:
            yield begin, len(data), state

    def _count(self, index: int, length: int) -> None:
        self.copied_bytes += length
        self._done.add(index)
        while self._contiguous in self._done:
            self._done.remove(self._contiguous)
            self._contiguous += 1

    async def _drop(self, length: int) -> None:
        """Read and forget: a pipe cannot be skipped."""
        while length:
            data = await self.source.read(0, min(length, self.plan.unit))
            if not data:
                raise InvalidArgument(f"--skip: {self.source.name} ended {length} bytes before that")
            length -= len(data)

    async def _digest(self, data: bytes | memoryview) -> bytes:
        def digest() -> bytes:
            return hashlib.blake2b(data, digest_size=16).digest()

        return await asyncio.to_thread(digest)
