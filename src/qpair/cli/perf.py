"""``qpair perf TARGET``: a stack of its own around one target, a load, a progress bar and a table.

Targets: ``malloc:SIZE``, ``null:SIZE``, ``file:PATH`` (a file or block device), ``python:MODULE:CLASS`` (a `qpair.Bdev` made without arguments), ``vhost:PATH`` or the path
of a socket (any vhost-user-blk server, by our own initiator).

Exit codes: 0; 1 the target or an option was refused, or I/Os failed or did not verify; 130 interrupted (what was measured is still shown).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qpair.errors import InvalidArgument, QpairError

if TYPE_CHECKING:
    from qpair.app.stack import EngineFactory, Stack
    from qpair.bdev.perf import PerfResult, PerfRun

__all__ = ["PerfOptions", "measure"]

NAME = "target"
FORMS = "malloc:512MiB, null:1TiB, file:PATH, python:module:Class or vhost:SOCKET"


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
    as_json: bool = False


def measure(options: PerfOptions, *, engine_factory: EngineFactory | None = None) -> int:
    """Run and print; the exit code."""
    try:
        result, interrupted = asyncio.run(_measure(options, engine_factory))
    except QpairError as error:
        print(f"qpair perf: {error}", file=sys.stderr)
        return 1
    if options.as_json:
        print(json.dumps({"target": options.target, **result.as_dict()}, indent=2))
    else:
        _table(options, result)
    if interrupted:
        return 130
    return 1 if result.errors or result.verify_errors else 0


async def _measure(options: PerfOptions, engine_factory: EngineFactory | None) -> tuple[PerfResult, bool]:
    from qpair.app.stack import Stack

    stack = Stack(cores=options.cores, driver=options.driver, busy_poll=options.busy_poll, engine_factory=engine_factory)  # type: ignore[arg-type]
    interrupted = False
    async with stack:
        name = await _attach(stack, options)
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

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            run.stop()

        with _on_interrupt(interrupt):
            if options.as_json or not sys.stderr.isatty():
                return await run.result(), interrupted
            await _progress(run, options)
            return await run.result(), interrupted


async def _attach(stack: Stack, options: PerfOptions) -> str:
    """Make the target; its bdev's name."""
    kind, separator, rest = options.target.partition(":")
    if not separator and _is_socket(options.target):
        kind, rest = "vhost", options.target
    if not rest:
        raise InvalidArgument(f"target {options.target!r}: write {FORMS}")
    if kind == "malloc":
        return (await stack.malloc(NAME, rest, block_size=options.block_size)).name
    if kind == "null":
        return (await stack.null(NAME, rest, block_size=options.block_size)).name
    if kind == "file":
        return (await stack.file(NAME, rest, readonly=options.pattern in ("randread", "read") and not os.access(rest, os.W_OK))).name
    if kind == "python":
        return (await stack.add(_python_bdev(rest))).name
    if kind == "vhost":
        names = await stack.rpc("bdev_virtio_attach_controller", name=NAME, trtype="user", traddr=os.path.abspath(rest), dev_type="blk")
        return str(names[0])
    raise InvalidArgument(f"target {options.target!r}: {kind!r} is no kind of target; write {FORMS}")


def _is_socket(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.stat(path).st_mode)
    return False


def _python_bdev(text: str) -> Any:
    from qpair.bdev.python import Bdev

    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise InvalidArgument(f"target python:{text}: {error}; it must name a class that is made without arguments") from error
    if not isinstance(made, Bdev):
        raise InvalidArgument(f"target python:{text}: {name} is no qpair.Bdev")
    return made


@contextlib.contextmanager
def _on_interrupt(callback: Any) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, callback)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _progress(run: PerfRun, options: PerfOptions) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = float(options.ios) if options.ios is not None else options.seconds
        task = progress.add_task(f"{options.pattern} {options.io_size} depth {options.depth}", total=total, rate="")
        last_ios, last_s = 0, 0.0
        async for now in run.progress():
            step = now.elapsed_s - last_s
            rate = (now.ios - last_ios) / step if step > 0 else 0.0
            last_ios, last_s = now.ios, now.elapsed_s
            done = float(now.ios) if options.ios is not None else now.elapsed_s
            progress.update(task, completed=done, rate=f"{_count(rate)} IOPS" + (f", {now.errors} errors" if now.errors else ""))


def _table(options: PerfOptions, result: PerfResult) -> None:
    from rich.console import Console
    from rich.table import Table

    mix = f" {options.mix}% reads" if options.pattern in ("randrw", "rw") else ""
    table = Table(title=f"{options.target}: {options.pattern}{mix} {options.io_size}, depth {options.depth}, cores {options.cores}")
    cells = (
        ("IOPS", _count(result.iops)),
        ("MB/s", f"{result.mb_per_s:,.1f}"),
        ("mean", _time(result.mean_ns)),
        ("p50", _time(result.p50_ns)),
        ("p99", _time(result.p99_ns)),
        ("p99.9", _time(result.p99_9_ns)),
        ("p99.99", _time(result.p99_99_ns)),
        ("max", _time(result.max_ns)),
        ("I/Os", f"{result.ios:,}"),
        ("errors", str(result.errors + result.verify_errors)),
    )
    for title, _ in cells:
        table.add_column(title, justify="right")
    table.add_row(*(text for _, text in cells))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


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
