"""The typer application: every command but the two that must start fast, which it lists and hands on."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from qpair.app.version import VERSION
from qpair.errors import QpairError

__all__ = ["app", "run"]

app = typer.Typer(
    name="qpair",
    help="A user-space storage stack. Start one with 'qpair serve', ask it with 'qpair rpc', measure with 'qpair perf'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("serve", context_settings=_PASS)
def serve(context: typer.Context) -> None:
    """Run a stack and answer JSON-RPC until stopped (SPDK's start-up flags)."""
    from qpair.cli.serve import serve as real

    raise typer.Exit(real(context.args))


@app.command("rpc", context_settings=_PASS)
def rpc(context: typer.Context) -> None:
    """Call a method of a running server: qpair rpc bdev_get_bdevs."""
    from qpair.cli.rpc import rpc as real

    raise typer.Exit(real(context.args))


@app.command("version")
def version() -> None:
    """Print the version."""
    print(f"qpair {VERSION}")


@app.command("perf")
def perf(
    target: Annotated[str, typer.Argument(help="malloc:512MiB, null:1TiB, file:PATH, python:module:Class or vhost:SOCKET")],
    pattern: Annotated[
        str, typer.Option("--pattern", "-w", help="randread, randwrite, randrw, read, write, rw, flush, unmap or write_zeroes")
    ] = "randread",
    mix: Annotated[int, typer.Option("--mix", "-M", min=0, max=100, help="percent of reads in randrw and rw")] = 50,
    size: Annotated[str, typer.Option("--size", "-o", help="bytes of one I/O: 4096, 4k, 128KiB")] = "4KiB",
    depth: Annotated[int, typer.Option("--depth", "-q", min=1, max=65536, help="I/Os in flight on each core")] = 128,
    seconds: Annotated[float, typer.Option("--time", "-t", help="seconds to run")] = 5.0,
    ios: Annotated[Optional[int], typer.Option("--ios", min=1, help="stop after so many I/Os instead")] = None,  # noqa: UP045
    cores: Annotated[str, typer.Option("--cores", "-m", help="reactors: 0, 0,2-3 or 0x3")] = "0",
    block_size: Annotated[int, typer.Option("--block-size", help="block size of malloc and null targets")] = 512,
    verify: Annotated[bool, typer.Option("--verify", help="write patterns, read them back, compare")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the random offsets")] = 1,
    driver: Annotated[str, typer.Option("--driver", help="auto, io_uring or epoll")] = "auto",
    busy_poll: Annotated[bool, typer.Option("--busy-poll", help="reactors never sleep")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, no progress bar")] = False,
) -> None:
    """Measure a block device: IOPS, MB/s and latencies."""
    from qpair.cli.perf import PerfOptions, measure

    options = PerfOptions(
        target=target,
        pattern=pattern,
        mix=mix,
        io_size=size,
        depth=depth,
        seconds=None if ios is not None else seconds,
        ios=ios,
        cores=cores,
        block_size=block_size,
        verify=verify,
        seed=seed,
        driver=driver,
        busy_poll=busy_poll,
        as_json=as_json,
    )
    raise typer.Exit(measure(options))


def run(arguments: list[str]) -> int:
    """Run it; the exit code."""
    try:
        result = app(arguments, standalone_mode=False)
    except QpairError as error:
        print(f"qpair: {error}", file=sys.stderr)
        return 1
    except typer.Exit as leave:
        return leave.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        # click's usage errors know how to show themselves, and their exit code
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
