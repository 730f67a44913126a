"""``qpair dd``: copy between bdevs, vhost sockets, files and pipes. The options have spdk_dd's names.

How it works: a stack of the command's own holds the bdev ends: those that a text makes (`qpair.cli.targets`), those of a configuration file (``-c``), and bdevs of a
running server, which it exports for the time of the copy. A copy between files and pipes needs no stack.

Exit codes: those of `qpair.cli.report`; an interrupted copy says how to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from qpair.app.sizes import format_size, parse_size
from qpair.cli.copy import Copy, make_plan
from qpair.cli.endpoints import BdevEnd, End, open_file
from qpair.cli.report import INTERRUPTED, USAGE, Explained, bdev_hints, explain, fail
from qpair.cli.targets import KINDS, attach, is_socket
from qpair.errors import InvalidArgument, NoSuchBdev, NoSuchDevice, QpairError

if TYPE_CHECKING:
    from qpair.app.stack import EngineFactory, Stack

__all__ = ["DdOptions", "dd"]

DEPTH_MAX = 1024
UNIT_BYTES_MAX = 256 << 20
MEMORY_BYTES_MAX = 4 << 30


@dataclass(frozen=True, slots=True)
class DdOptions:
    """What the command line says."""

    input_file: str | None = None
    input_bdev: str | None = None
    output_file: str | None = None
    output_bdev: str | None = None
    unit: str = "1MiB"
    depth: int = 16
    count: int | None = None
    skip: int = 0
    seek: int = 0
    sparse: bool = False
    unmap: bool = False
    notrunc: bool = False
    verify: bool = False
    config: str | None = None
    address: str = "/var/tmp/spdk.sock"
    cores: str = "0"
    driver: str = "auto"
    as_json: bool = False


class _Interrupted(Exception):
    """Ctrl-C."""


def dd(options: DdOptions, *, engine_factory: EngineFactory | None = None) -> int:
    """Copy and tell; the exit code."""
    # standard output carries the data where it is the output
    out = sys.stderr if options.output_file == "-" else sys.stdout
    try:
        _check(options)
    except InvalidArgument as error:
        return fail("dd", Explained(str(error), error.code, USAGE, ["its options: qpair dd --help"]), as_json=options.as_json, out=out)
    run = _Run(options, engine_factory)
    try:
        asyncio.run(run.main())
    except BaseException as error:
        return _failed(error, options, run, out)
    if options.as_json:
        print(json.dumps(run.result(), indent=2), file=out)
    else:
        print(run.sentence(), file=sys.stderr)
    return 0


def _failed(error: BaseException, options: DdOptions, run: _Run, out: TextIO) -> int:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, _Interrupted | KeyboardInterrupt):
        done = run.copy.contiguous_units if run.copy is not None else 0
        again = f"--skip {options.skip + done} --seek {options.seek + done}"
        if options.output_file is not None and run.copy is not None and not run.copy.sink.sequential:
            again += " --notrunc"
        if options.as_json:
            print(json.dumps({**run.result(), "interrupted": True, "contiguous_units": done}, indent=2), file=out)
        else:
            print(f"qpair dd: interrupted: {run.sentence()}", f"  go on with: {again}", sep="\n", file=sys.stderr)
        return INTERRUPTED
    if not isinstance(error, QpairError):
        raise error
    explained = explain(error, address=options.address)
    if isinstance(error, NoSuchBdev) and options.config is not None:
        explained.hints = [f"bdevs that {options.config} makes: {', '.join(run.known) or 'none'}"]
    elif isinstance(error, NoSuchDevice) or error.code == -19:
        names = [name.removeprefix("bdev:") for name in (options.input_bdev, options.output_bdev) if name is not None]
        explained.hints = bdev_hints(options.address, names)
    return fail("dd", explained, as_json=options.as_json, out=out)


class _Run:
    def __init__(self, options: DdOptions, engine_factory: EngineFactory | None) -> None:
        self.options = options
        self.copy: Copy | None = None
        self.known: list[str] = []
        """The bdevs of the configuration file."""
        self._factory = engine_factory
        self._began = time.monotonic()
        self._seconds = 0.0
        self._verify_seconds: float | None = None

    async def main(self) -> None:
        options = self.options
        unit = parse_size(options.unit, what="--bs")
        async with contextlib.AsyncExitStack() as held:
            stack = await held.enter_async_context(self._stack()) if _needs_stack(options) else None
            source = await self._end(held, stack, options.input_file, options.input_bdev, write=False, unit=unit)
            sink = await self._end(held, stack, options.output_file, options.output_bdev, write=True, unit=unit)
            plan = make_plan(source, sink, unit=unit, skip=options.skip, seek=options.seek, count=options.count)
            copy = self.copy = Copy(
                source, sink, plan, depth=options.depth, sparse=options.sparse, unmap=options.unmap, verify=options.verify
            )
            if options.verify and sink.sequential:
                raise InvalidArgument(f"--verify: {sink.name} cannot be read again")
            self._began = time.monotonic()
            with self._progress(copy) as shown:
                try:
                    await _interruptible(copy.run())
                finally:
                    self._seconds = time.monotonic() - self._began
                if options.verify:
                    shown.verifying()
                    began = time.monotonic()
                    await _interruptible(copy.verify())
                    self._verify_seconds = time.monotonic() - began

    @contextlib.asynccontextmanager
    async def _stack(self) -> AsyncIterator[Stack]:
        from qpair.app.stack import Stack

        options = self.options
        async with Stack(cores=options.cores, driver=options.driver, pin=False, engine_factory=self._factory) as stack:  # type: ignore[arg-type]
            if options.config is not None:
                await stack.load_config(options.config)
                self.known = [info.name for info in stack.bdevs.infos()]
            yield stack

    async def _end(
        self, held: contextlib.AsyncExitStack, stack: Stack | None, file: str | None, bdev: str | None, *, write: bool, unit: int
    ) -> End:
        """One end, given back when ``held`` is left."""
        options = self.options
        if file is not None and not _is_vhost(file):
            truncate_at = options.seek * unit if write and not options.notrunc else None
            opened: End = open_file(file, write=write, truncate_at=truncate_at, threads=min(options.depth, 32))
            held.push_async_callback(opened.close)
            return opened
        assert stack is not None
        text = file if file is not None else bdev
        assert text is not None
        name = text
        if not (file is None and options.config is not None and text.partition(":")[0] not in KINDS):
            if file is None and text.partition(":")[0] not in KINDS and not is_socket(text):
                text = f"bdev:{text}"
            name = await held.enter_async_context(
                attach(stack, text, name="output" if write else "input", address=options.address, write=write)
            )
        opened = await _open(stack, name, file or bdev or name, write=write)
        held.push_async_callback(opened.close)
        return opened

    def result(self) -> dict[str, Any]:
        """For --json."""
        copy = self.copy
        if copy is None:
            return {"bytes": 0}
        shown: dict[str, Any] = {
            "input": copy.source.name,
            "output": copy.sink.name,
            "bytes": copy.copied_bytes,
            "zero_bytes": copy.zero_bytes,
            "padded_bytes": copy.padded_bytes,
            "seconds": round(self._seconds, 6),
            "mb_per_s": round(copy.copied_bytes / self._seconds / 1e6, 1) if self._seconds else 0.0,
        }
        if self._verify_seconds is not None:
            shown |= {"verified_bytes": copy.verified_bytes, "verify_seconds": round(self._verify_seconds, 6)}
        return shown

    def sentence(self) -> str:
        """For people."""
        copy = self.copy
        if copy is None:
            return "nothing was copied"
        told = f"{_size(copy.copied_bytes)} copied in {self._seconds:.2f} s, {_rate(copy.copied_bytes, self._seconds)}"
        if copy.zero_bytes:
            told += f"; {_size(copy.zero_bytes)} of it zeros that were not sent"
        if copy.padded_bytes:
            told += f"; the last block was filled up with {copy.padded_bytes} zero bytes"
        if self._verify_seconds is not None:
            told += f"; verified in {self._verify_seconds:.2f} s"
        return told

    @contextlib.contextmanager
    def _progress(self, copy: Copy) -> Iterator[_Shown]:
        if self.options.as_json or not sys.stderr.isatty():
            yield _Shown()
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        last: list[Any] = [TextColumn("left"), TimeRemainingColumn(compact=True)] if copy.plan.length else [TimeElapsedColumn()]
        columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[told]}"), *last]
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            shown = _Bar(bar, copy)
            updates = asyncio.get_running_loop().create_task(shown.follow())
            try:
                yield shown
            finally:
                updates.cancel()


class _Shown:
    """How far it is: told to nobody."""

    def verifying(self) -> None:
        """The second pass begins."""


class _Bar(_Shown):
    def __init__(self, bar: Any, copy: Copy) -> None:
        self._bar, self._copy = bar, copy
        self._began = time.monotonic()
        self._verifying = False
        self._task = bar.add_task("copying", total=copy.plan.length, told="")

    def verifying(self) -> None:
        self._verifying = True
        self._began = time.monotonic()
        self._bar.reset(self._task, description="verifying", total=self._copy.copied_bytes, told="")

    async def follow(self) -> None:
        """Ten times a second until cancelled."""
        while True:
            done = self._copy.verified_bytes if self._verifying else self._copy.copied_bytes
            told = f"{_size(done)}  {_rate(done, time.monotonic() - self._began)}"
            self._bar.update(self._task, completed=done, told=told)
            await asyncio.sleep(0.1)


def _check(options: DdOptions) -> None:
    """Whether the options fit together."""
    for what, file, bdev, flags in (
        ("input", options.input_file, options.input_bdev, "--if FILE or --ib BDEV"),
        ("output", options.output_file, options.output_bdev, "--of FILE or --ob BDEV"),
    ):
        if (file is None) == (bdev is None):
            raise InvalidArgument(f"one {what}, please: give either {flags}" + ("" if file is None else ", not both"))
    for flag, value in (("--count", options.count), ("--skip", options.skip), ("--seek", options.seek)):
        if value is not None and value < 0:
            raise InvalidArgument(f"{flag} {value} is below 0")
    unit = parse_size(options.unit, what="--bs")
    if not 0 < unit <= UNIT_BYTES_MAX:
        raise InvalidArgument(f"--bs {options.unit} is not from 1 to {format_size(UNIT_BYTES_MAX)}")
    if unit * options.depth > MEMORY_BYTES_MAX:
        raise InvalidArgument(
            f"--bs {options.unit} times --qd {options.depth} are {unit * options.depth} bytes of memory, more than {format_size(MEMORY_BYTES_MAX)}"
        )
    one, other = ((file, bdev.removeprefix("bdev:") if bdev else None) for file, bdev in _both(options))
    if one == other and one[0] != "-" and not (one[1] or "").startswith(("malloc:", "null:", "python:")):
        raise InvalidArgument(f"input and output are the same: {one[0] or one[1]}")


def _both(options: DdOptions) -> tuple[tuple[str | None, str | None], tuple[str | None, str | None]]:
    return (options.input_file, options.input_bdev), (options.output_file, options.output_bdev)


def _needs_stack(options: DdOptions) -> bool:
    return any(bdev is not None or (file is not None and _is_vhost(file)) for file, bdev in _both(options))


def _is_vhost(file: str) -> bool:
    return file.startswith("vhost:") or is_socket(file)


async def _open(stack: Stack, name: str, shown: str, *, write: bool) -> BdevEnd:
    info = stack.bdevs.info(name)
    disk = await stack.open(info.name, write=write)
    return BdevEnd(shown, disk, info.size_bytes, unmaps=info.supported.get("unmap", False))


async def _interruptible(work: Awaitable[None]) -> None:
    """``work``, cancelled by SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        await task
    except asyncio.CancelledError:
        if interrupted:
            raise _Interrupted from None
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _size(size_bytes: int) -> str:
    """Two or three digits that matter, and all of them where they are few."""
    value = float(size_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size_bytes} bytes" if unit == "bytes" else f"{value:.4g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _rate(size_bytes: int, seconds: float) -> str:
    return f"{size_bytes / seconds / 1e6:,.0f} MB/s" if seconds > 0 else ""
