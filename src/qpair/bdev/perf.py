"""Measuring a bdev: the engine's load generator, with progress and a result in the units people compare.

Errors: `InvalidArgument` names the option and its limits; `NoSuchBdev`; errors of single I/Os are counted in the result, not raised.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from qpair.app.cores import parse_cores
from qpair.app.sizes import parse_size
from qpair.bdev.latency import Latencies
from qpair.errors import InvalidArgument, NoSuchFile, from_engine

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["PATTERNS", "PerfResult", "PerfRun", "PerfSnapshot", "start"]

Pattern = Literal["randread", "randwrite", "randrw", "read", "write", "rw", "flush", "unmap", "write_zeroes"]
PATTERNS: tuple[Pattern, ...] = ("randread", "randwrite", "randrw", "read", "write", "rw", "flush", "unmap", "write_zeroes")


@dataclass(frozen=True, slots=True)
class PerfSnapshot:
    """Of a run under way."""

    ios: int
    bytes: int
    errors: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class PerfResult:
    """What a run did. Latencies in nanoseconds from submission to completion; MB/s counts by 10**6."""

    ios: int
    reads: int
    writes: int
    bytes: int
    errors: int
    verify_errors: int
    elapsed_s: float
    iops: float
    mb_per_s: float
    mean_ns: float
    min_ns: int
    max_ns: int
    p50_ns: int
    p99_ns: int
    p99_9_ns: int
    p99_99_ns: int
    max_gap_ns: int
    per_reactor: tuple[tuple[int, int], ...]
    """(lcore, I/Os) a reactor."""
    latencies: Latencies = field(repr=False, compare=False, default_factory=lambda: Latencies((), ()))
    """The whole distribution: ``result.latencies.percentile(99.9)``."""

    @classmethod
    def of(cls, raw: dict[str, Any]) -> PerfResult:
        """From the engine's reply."""
        elapsed = raw["elapsed_ns"] / 1e9
        percentiles = raw["percentiles"]
        return cls(
            ios=raw["ios"],
            reads=raw["reads"],
            writes=raw["writes"],
            bytes=raw["bytes"],
            errors=raw["errors"],
            verify_errors=raw["verify_errors"],
            elapsed_s=elapsed,
            iops=raw["ios"] / elapsed if elapsed else 0.0,
            mb_per_s=raw["bytes"] / elapsed / 1e6 if elapsed else 0.0,
            mean_ns=float(raw["mean_ns"]),
            min_ns=raw["min_ns"],
            max_ns=raw["max_ns"],
            p50_ns=percentiles["50"],
            p99_ns=percentiles["99"],
            p99_9_ns=percentiles["99.9"],
            p99_99_ns=percentiles["99.99"],
            max_gap_ns=raw["max_gap_ns"],
            per_reactor=tuple((item["lcore"], item["ios"]) for item in raw["per_reactor"]),
            latencies=Latencies.decode(raw["histogram"], max_ns=raw["max_ns"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the distribution as [percent, nanoseconds] where a tenth of the rest is left each."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "latencies"}
        steps = [50.0, *(100 - 10.0**-nines for nines in range(-1, 5))]
        return plain | {"percentiles_ns": [[round(step, 4), self.latencies.percentile(step)] for step in (*steps, 100.0)]}


class PerfRun:
    """A load under way. ``async for snapshot in run.progress(): ...``, then ``await run.result()``."""

    def __init__(self, stack: Stack, token: int) -> None:
        self._stack = stack
        self._token = token
        self._reply = stack.bridge.call(token)

    def snapshot(self) -> PerfSnapshot:
        """Counters now, without disturbing the run. `NoSuchFile` once it has ended."""
        try:
            raw = self._stack.engine.perf_snapshot(self._token)
        except OSError as error:
            raise from_engine(error) from error
        return PerfSnapshot(raw["ios"], raw["bytes"], raw["errors"], raw["elapsed_ns"] / 1e9)

    async def progress(self, interval_s: float = 0.2) -> AsyncIterator[PerfSnapshot]:
        """A snapshot every ``interval_s`` until the run ends."""
        while not self._reply.done():
            await asyncio.wait([self._reply], timeout=interval_s)
            if self._reply.done():
                return
            try:
                now = self.snapshot()
            except NoSuchFile:
                continue  # it has just ended; its reply is on the way
            yield now

    def stop(self) -> None:
        """End the run early; its result covers what it did."""
        if not self._reply.done():
            # A run that has ended by itself meanwhile needs no stop.
            with contextlib.suppress(OSError):
                self._stack.engine.perf_stop(self._token)

    async def result(self) -> PerfResult:
        """Wait for the end. Cancelled while waiting, the run is stopped too."""
        try:
            return PerfResult.of(await asyncio.shield(self._reply))
        except asyncio.CancelledError:
            self.stop()
            raise


def start(
    stack: Stack,
    bdev: str,
    *,
    pattern: Pattern = "randread",
    read_percent: int = 50,
    io_size: int | str = 4096,
    depth: int = 128,
    cores: str | int | Iterable[int] | None = None,
    seconds: float | None = None,
    ios: int | None = None,
    verify: bool = False,
    seed: int = 1,
    offset: int | str = 0,
    length: int | str = 0,
) -> PerfRun:
    """Start a load. ``read_percent`` matters for the mixed patterns (randrw, rw) alone; ``seconds`` or ``ios`` ends it (neither: 5 s);
    ``cores``: those of the stack unless named; ``offset`` and ``length`` in bytes bound the range (0: to the end)."""
    if pattern not in PATTERNS:
        raise InvalidArgument(f"pattern {pattern!r} is none of {', '.join(PATTERNS)}")
    for what, value, least, most in (("read_percent", read_percent, 0, 100), ("depth", depth, 1, 65536)):
        if not least <= value <= most:
            raise InvalidArgument(f"{what} {value} is not from {least} to {most}")
    if seconds is not None and not 0 < seconds <= 31_536_000:
        raise InvalidArgument(f"seconds {seconds} is not above 0 and up to a year")
    if seconds is None and ios is None:
        seconds = 5.0
    info = stack.bdevs.info(bdev)
    io_bytes = parse_size(io_size, what="io_size")
    if io_bytes == 0 or io_bytes % info.block_size:
        raise InvalidArgument(f"io_size {io_bytes} is no multiple of the block size {info.block_size}")
    reactors = [] if cores is None else parse_cores(cores)
    if missing := [core for core in reactors if core not in stack.cores]:
        raise InvalidArgument(f"cores: {missing[0]} has no reactor; the stack runs on {stack.cores}")
    try:
        token = stack.engine.perf_start(
            info.name,
            pattern=pattern,
            read_percent=read_percent if pattern in ("randrw", "rw") else 100 if pattern.endswith("read") else 0,
            io_bytes=io_bytes,
            depth=depth,
            reactors=reactors,
            duration_ms=0 if seconds is None else max(1, round(seconds * 1000)),
            max_ios=ios or 0,
            verify=verify,
            seed=seed,
            offset_blocks=parse_size(offset, what="offset") // info.block_size,
            length_blocks=parse_size(length, what="length") // info.block_size,
        )
    except OSError as error:
        raise from_engine(error) from error
    return PerfRun(stack, token)
