"""``qpair perf TARGET``: a stack of its own around one target, a load, a progress bar and a table; a picture of it where one is asked for.

Targets: see `qpair.cli.targets`.

Exit codes: 0; 1 the target or an option was refused, or I/Os failed or did not verify; 3 the server of a ``bdev:`` target does not answer; 130 interrupted (what
was measured is still shown).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qpair.cli.plot import Point, check, draw
from qpair.cli.report import INTERRUPTED, bdev_hints, explain, fail
from qpair.cli.targets import attach
from qpair.errors import QpairError

if TYPE_CHECKING:
    from rich.table import Table

    from qpair.app.stack import EngineFactory
    from qpair.bdev.perf import PerfResult, PerfRun, PerfSnapshot

__all__ = ["PerfOptions", "measure"]

NAME = "target"
READING = ("randread", "read")


@dataclass(frozen=True, slots=True)
class PerfOptions:
    """What the command line says."""

    target: str
    pattern: str = "randread"
    mix: int = 50
    io_size: str = "4KiB"
    depth: int = 128
    seconds: float | None = 5.0
    ios: int | None = None
    cores: str = "0"
    block_size: int = 512
    verify: bool = False
    seed: int = 1
    driver: str = "auto"
    busy_poll: bool = False
    plot: str | None = None
    interval_s: float = 0.2
    address: str = "/var/tmp/spdk.sock"
    as_json: bool = False

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        mix = f" {self.mix}% reads" if self.pattern in ("randrw", "rw") else ""
        return f"{self.target}: {self.pattern}{mix} {self.io_size}, depth {self.depth}, cores {self.cores}"


def measure(options: PerfOptions, *, engine_factory: EngineFactory | None = None) -> int:
    """Run and print; the exit code."""
    try:
        if options.plot is not None:
            check(options.plot)
        result, points, interrupted = asyncio.run(_measure(options, engine_factory))
        if options.plot is not None:
            draw(options.plot, title=options.title, result=result, latencies=result.latencies, points=points)
    except QpairError as error:
        explained = explain(error, address=options.address)
        if error.code == -19 and options.target.startswith("bdev:"):
            explained.hints = bdev_hints(options.address, [options.target.removeprefix("bdev:")])
        return fail("perf", explained, as_json=options.as_json)
    if options.as_json:
        series = [asdict(point) for point in points]
        print(json.dumps({"target": options.target, **result.as_dict(), "series": series}, indent=2))
    else:
        _table(options, result)
        if options.plot is not None:
            print(f"drawn: {options.plot}")
    if interrupted:
        return INTERRUPTED
    return 1 if result.errors or result.verify_errors else 0


async def _measure(options: PerfOptions, engine_factory: EngineFactory | None) -> tuple[PerfResult, list[Point], bool]:
    from qpair.app.stack import Stack

    stack = Stack(cores=options.cores, driver=options.driver, busy_poll=options.busy_poll, engine_factory=engine_factory)  # type: ignore[arg-type]
    write = not (options.pattern in READING and _unwritable_file(options.target))
    async with (
        stack,
        attach(
            stack, options.target, name=NAME, address=options.address, block_size=options.block_size, write=write or options.verify
        ) as name,
    ):
        run = await stack.perf(
            name,
            pattern=options.pattern,
            read_percent=options.mix,
            io_size=options.io_size,
            depth=options.depth,
            seconds=options.seconds,
            ios=options.ios,
            verify=options.verify,
            seed=options.seed,
        )
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            run.stop()

        series = _Series()
        with _on_interrupt(interrupt), _progress(options) as shown:
            await _watch(run, options, series, shown)
            result = await run.result()
        series.end(result)
        return result, series.points, interrupted


def _unwritable_file(target: str) -> bool:
    """A file that may be read alone is measured all the same."""
    kind, _, path = target.partition(":")
    return kind == "file" and not os.access(path, os.W_OK)


class _Series:
    """Snapshots as rates."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._ios = self._bytes = self._errors = 0
        self._elapsed_s = 0.0

    def add(self, ios: int, size_bytes: int, errors: int, elapsed_s: float) -> None:
        """What it was at ``elapsed_s``."""
        step = elapsed_s - self._elapsed_s
        if step <= 0:
            return
        self.points.append(
            Point(
                round(elapsed_s, 4),
                round((ios - self._ios) / step, 1),
                round((size_bytes - self._bytes) / step / 1e6, 3),
                errors - self._errors,
            )
        )
        self._ios, self._bytes, self._errors, self._elapsed_s = ios, size_bytes, errors, elapsed_s

    def end(self, result: PerfResult) -> None:
        """What came after the last snapshot, unless that is too little to say anything by."""
        usual = self.points[0].elapsed_s if self.points else 0.0
        if result.elapsed_s - self._elapsed_s > usual / 2:
            self.add(result.ios, result.bytes, result.errors, result.elapsed_s)


@contextlib.contextmanager
def _on_interrupt(callback: Any) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, callback)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _watch(run: PerfRun, options: PerfOptions, series: _Series, shown: _Shown) -> None:
    """Until it ends: a point each interval, and five times a second what a person wants to see."""

    async def watch() -> None:
        async for now in run.progress():
            shown.update(now)

    watching = asyncio.ensure_future(watch())
    async for now in run.progress(options.interval_s):
        series.add(now.ios, now.bytes, now.errors, now.elapsed_s)
    await watching


class _Shown:
    """Progress, told to nobody."""

    def update(self, now: PerfSnapshot) -> None:
        """So far it is."""


class _Bar(_Shown):
    def __init__(self, bar: Any, options: PerfOptions) -> None:
        self._bar = bar
        self._by_ios = options.ios is not None
        total = float(options.ios) if options.ios is not None else options.seconds
        self._task = bar.add_task(f"{options.pattern} {options.io_size} depth {options.depth}", total=total, rate="")
        self._ios, self._s = 0, 0.0

    def update(self, now: PerfSnapshot) -> None:
        step = now.elapsed_s - self._s
        rate = (now.ios - self._ios) / step if step > 0 else 0.0
        self._ios, self._s = now.ios, now.elapsed_s
        told = f"{_count(rate)} IOPS" + (f", {now.errors} errors" if now.errors else "")
        self._bar.update(self._task, completed=float(now.ios) if self._by_ios else now.elapsed_s, rate=told)


@contextlib.contextmanager
def _progress(options: PerfOptions) -> Iterator[_Shown]:
    if options.as_json or not sys.stderr.isatty():
        yield _Shown()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, options)


def _table(options: PerfOptions, result: PerfResult) -> None:
    """One line of figures, or, on a terminal narrower than that, two."""
    from rich.console import Console

    rates = {
        "IOPS": _count(result.iops),
        "MB/s": f"{result.mb_per_s:,.1f}",
        "I/Os": f"{result.ios:,}",
        "errors": str(result.errors + result.verify_errors),
    }
    times = {
        "mean": _time(result.mean_ns),
        "p50": _time(result.p50_ns),
        "p99": _time(result.p99_ns),
        "p99.9": _time(result.p99_9_ns),
        "p99.99": _time(result.p99_99_ns),
        "max": _time(result.max_ns),
    }
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=140, highlight=False)
    console.print(options.title, style="bold", soft_wrap=True)
    whole = _columns(rates | times)
    if Console(width=1000).measure(whole).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_columns(rates), _columns(times), sep="\n")


def _columns(cells: dict[str, str]) -> Table:
    from rich.table import Table

    bad = cells.get("errors", "0") != "0"
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for title in cells:
        table.add_column(title, justify="right", no_wrap=True, style="bold red" if title == "errors" and bad else "")
    table.add_row(*cells.values())
    return table


def _count(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            scale = {"G": 1e9, "M": 1e6, "k": 1e3}[letter]
            return f"{value / scale:.2f} {letter}"
    return f"{value:.0f}"


def _time(nanoseconds: float) -> str:
    if nanoseconds >= 1e6:
        return f"{nanoseconds / 1e6:.2f} ms"
    if nanoseconds >= 1e3:
        return f"{nanoseconds / 1e3:.2f} us"
    return f"{nanoseconds:.0f} ns"
