"""The typer application: what each command is called, what its options are, and what its help says. The work is done in a module a command, imported when it is called.

``serve`` and ``rpc`` are dispatched before this module is imported (`qpair.cli.main`); here they are for the list of commands and for shell completion.

Help is click's plain kind: it fits 80 columns, keeps its examples as they are written, and starts without rich.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from qpair.app.version import VERSION
from qpair.cli import complete
from qpair.cli.report import FAILED, INTERRUPTED, USAGE, Explained, explain, fail
from qpair.errors import QpairError
from qpair.rpc.address import DEFAULT_ADDRESS

__all__ = ["app", "run"]

app = typer.Typer(
    name="qpair",
    help="""A user-space storage stack.

    \b
    qpair serve -r /tmp/qpair.sock      start one
    qpair ls -r /tmp/qpair.sock         what stands on what
    qpair rpc -r /tmp/qpair.sock ...    change it
    qpair perf null:1TiB                measure
    qpair dd --ib disk0 --of disk.img   copy
    qpair trace                         where I/Os spend their time

    Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 no server answers;
    130 interrupted. With --json, errors are JSON too. More: docs/cli.md.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_PASS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Address = Annotated[
    str,
    typer.Option(
        "--rpc-socket", "-r", metavar="ADDRESS", help="Where the server answers: PATH or HOST:PORT.", autocompletion=complete.sockets
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; errors too.")]
Cores = Annotated[str, typer.Option("--cores", "-m", metavar="LIST", help="Reactors of its own: 0, 0,2-3 or 0x3.")]
Driver = Annotated[
    str,
    typer.Option("--driver", metavar="NAME", help="auto, io_uring or epoll.", autocompletion=complete.words("auto", "io_uring", "epoll")),
]


@app.command("serve", cls=complete.ServeCommand, context_settings=_PASS)
def serve(context: typer.Context) -> None:
    """Run a stack and answer JSON-RPC until stopped."""
    from qpair.cli.serve import serve as real

    raise typer.Exit(real(context.args))


@app.command("rpc", cls=complete.RpcCommand, context_settings=_PASS)
def rpc(context: typer.Context) -> None:
    """Call a method of a running server."""
    from qpair.cli.rpc import rpc as real

    raise typer.Exit(real(context.args))


@app.command(
    "ls",
    epilog="""\b
Examples:
  qpair ls                      everything, with half a second of rates
  qpair ls disk0                disk0, what it stands on and what stands on it
  qpair ls --watch -i 2         until interrupted, every two seconds
  qpair ls --json | jq '.bdevs[] | {name, size_bytes}'""",
)
def ls(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[BDEV]...", help="These and what is connected with them; default: all.", autocompletion=complete.bdevs),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", min=0, max=3600, help="Sample rates for so long; 0: show none.")
    ] = 0.5,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again after each interval, until interrupted.")] = False,
    rounds: Annotated[int, typer.Option("--count", "-n", metavar="N", min=0, help="With --watch: so many times; 0: no end.")] = 0,
    inverse: Annotated[bool, typer.Option("--inverse", help="Exports first, below each what it stands on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which bdev stands on which, and what each is doing.

    Base devices come first, below each what stands on it: other bdevs, then
    what is exported (vhost, NVMe-oF, iSCSI, NBD, ublk). A bdev on several
    bases (raid) is shown under each, its own tree under the first.

    Works with any server that speaks SPDK's JSON-RPC.
    """
    from qpair.cli.ls import LsOptions
    from qpair.cli.ls import ls as real

    raise typer.Exit(
        real(
            LsOptions(
                names=tuple(names or ()), address=address, interval_s=interval, watch=watch, rounds=rounds, inverse=inverse, as_json=as_json
            )
        )
    )


@app.command(
    "dd",
    epilog="""\b
Examples:
  qpair dd --ib disk0 --of disk0.img --sparse     save a server's bdev
  qpair dd --if disk0.img --ob disk0 --verify     and put it back
  zcat disk.gz | qpair dd --if - --ob disk0       from a pipe
  qpair dd --if vhost:/tmp/a.sock --of /tmp/b.sock --qd 32

A BDEV is the name of one on the server at -r, or in the file given with -c;
or malloc:SIZE, null:SIZE, file:PATH, python:MODULE:CLASS, vhost:SOCKET.""",
)
def dd(
    input_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--if", metavar="FILE", help="Read a file, a vhost socket, or - (standard input).", autocompletion=complete.files),
    ] = None,
    input_bdev: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ib", metavar="BDEV", help="Read a bdev.", autocompletion=complete.bdevs),
    ] = None,
    output_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--of", metavar="FILE", help="Write a file, a vhost socket, or - (standard output).", autocompletion=complete.files),
    ] = None,
    output_bdev: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ob", metavar="BDEV", help="Write a bdev.", autocompletion=complete.bdevs),
    ] = None,
    unit: Annotated[str, typer.Option("--bs", metavar="SIZE", help="Bytes of one I/O: 64k, 1MiB.")] = "1MiB",
    depth: Annotated[int, typer.Option("--qd", "--depth", metavar="N", min=1, max=1024, help="I/Os in flight.")] = 16,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--count", metavar="N", help="Copy so many units of --bs; default: all."),
    ] = None,
    skip: Annotated[int, typer.Option("--skip", metavar="N", help="Leave out so many units of the input.")] = 0,
    seek: Annotated[int, typer.Option("--seek", metavar="N", help="Leave out so many units of the output.")] = 0,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Do not send zeros: holes in files, write_zeroes on bdevs; holes of the input are not read.")
    ] = False,
    unmap: Annotated[
        bool, typer.Option("--unmap", help="As --sparse, but discard on bdevs. For those whose discarded blocks read as zeros.")
    ] = False,
    notrunc: Annotated[bool, typer.Option("--notrunc", help="Keep what an output file has past the copy.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read the output again and compare.")] = False,
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--config", "-c", metavar="FILE", help="Take bdevs from this JSON configuration.", autocompletion=complete.files),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    cores: Cores = "0",
    driver: Driver = "auto",
    as_json: AsJson = False,
) -> None:
    """Copy between bdevs, vhost sockets, files and pipes."""
    from qpair.cli.dd import DdOptions
    from qpair.cli.dd import dd as real

    raise typer.Exit(
        real(
            DdOptions(
                input_file=input_file,
                input_bdev=input_bdev,
                output_file=output_file,
                output_bdev=output_bdev,
                unit=unit,
                depth=depth,
                count=count,
                skip=skip,
                seek=seek,
                sparse=sparse,
                unmap=unmap,
                notrunc=notrunc,
                verify=verify,
                config=config,
                address=address,
                cores=cores,
                driver=driver,
                as_json=as_json,
            )
        )
    )


@app.command(
    "perf",
    epilog="""\b
Examples:
  qpair perf malloc:1GiB -w randrw -M 70 -q 32
  qpair perf vhost:/tmp/disk0.sock -t 30 --plot disk0.svg
  qpair perf bdev:disk0 -o 128k -w read --json""",
)
def perf(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="malloc:512MiB, null:1TiB, file:PATH, python:MODULE:CLASS, vhost:SOCKET, or bdev:NAME on the server at -r.",
            autocompletion=complete.targets,
        ),
    ],
    pattern: Annotated[
        str,
        typer.Option(
            "--pattern",
            "-w",
            metavar="NAME",
            help="randread, randwrite, randrw, read, write, rw, flush, unmap or write_zeroes.",
            autocompletion=complete.patterns,
        ),
    ] = "randread",
    mix: Annotated[int, typer.Option("--mix", "-M", metavar="PERCENT", min=0, max=100, help="Reads in randrw and rw.")] = 50,
    size: Annotated[str, typer.Option("--size", "-o", metavar="SIZE", help="Bytes of one I/O: 4096, 4k, 128KiB.")] = "4KiB",
    depth: Annotated[int, typer.Option("--depth", "-q", metavar="N", min=1, max=65536, help="I/Os in flight on each core.")] = 128,
    seconds: Annotated[float, typer.Option("--time", "-t", metavar="SECONDS", help="How long.")] = 5.0,
    ios: Annotated[Optional[int], typer.Option("--ios", metavar="N", min=1, help="Stop after so many I/Os instead.")] = None,  # noqa: UP045
    cores: Cores = "0",
    block_size: Annotated[int, typer.Option("--block-size", metavar="BYTES", help="Of malloc and null targets.")] = 512,
    verify: Annotated[bool, typer.Option("--verify", help="Write patterns, read them back, compare.")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the random offsets.")] = 1,
    plot: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw latency distribution and IOPS over time: .svg, .png or .pdf. Needs matplotlib: pip install 'qpair[plot]'.",
            autocompletion=complete.files,
        ),
    ] = None,
    interval: Annotated[
        float,
        typer.Option("--interval", "-i", metavar="SECONDS", min=0.01, max=3600, help="Of the points over time, in --plot and --json."),
    ] = 0.2,
    address: Address = DEFAULT_ADDRESS,
    driver: Driver = "auto",
    busy_poll: Annotated[bool, typer.Option("--busy-poll", help="Reactors never sleep.")] = False,
    as_json: AsJson = False,
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
        plot=plot,
        interval_s=interval,
        address=address,
        as_json=as_json,
    )
    raise typer.Exit(measure(options))


@app.command(
    "trace",
    epilog="""\b
Examples:
  qpair trace                   two seconds, every bdev
  qpair trace -t 10 disk0       ten seconds, disk0 alone
  qpair trace --json | jq '.layers[] | {bdev, op, p99_ns}'""",
)
def trace(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[BDEV]...", help="Show these; default: all.", autocompletion=complete.bdevs),
    ] = None,
    seconds: Annotated[float, typer.Option("--time", "-t", metavar="SECONDS", min=0.01, max=3600, help="How long.")] = 2.0,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Show how long I/Os take at each bdev that they come through.

    Trace points of the server are turned on meanwhile. OWN is the time
    without the bdevs below, WAIT what came before the bdev's module had
    it: limits, a full device, locks. Ctrl-C ends it early.
    """
    from qpair.cli.trace import TraceOptions
    from qpair.cli.trace import trace as real

    raise typer.Exit(real(TraceOptions(names=tuple(names or ()), address=address, seconds=seconds, as_json=as_json)))


@app.command("version")
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    import json

    print(json.dumps({"version": VERSION}) if as_json else f"qpair {VERSION}")


def run(arguments: list[str]) -> int:
    """Run it; the exit code."""
    if not (kept := complete.join_colons(os.environ)):
        return _run(arguments)
    # typer prints what it offers, and leaves
    with contextlib.redirect_stdout(io.StringIO()) as offered, contextlib.suppress(SystemExit):
        _run(arguments)
    print(*(line.removeprefix(kept) for line in offered.getvalue().splitlines()), sep="\n")
    return 0


def _run(arguments: list[str]) -> int:
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    as_json = "--json" in arguments
    try:
        result = app(arguments, prog_name="qpair", standalone_mode=False)
    except QpairError as error:
        return fail(command, explain(error), as_json=as_json)
    except typer.Exit as leave:
        return leave.exit_code
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:
        # click's usage errors know what to say, and their exit code
        told: Callable[[], str] | None = getattr(error, "format_message", None)
        if told is None:
            raise
        code = int(getattr(error, "exit_code", USAGE))
        if not told() or type(error).__name__ == "NoArgsIsHelpError":
            if told():
                print(told())
            return code  # help was asked for by giving nothing
        known = [name for info in app.registered_commands if (name := info.name)]
        hints = [f"its options: qpair {command} --help"] if command in known else _command_hints(command, known)
        if "id you mean" in told():
            hints = []
        return fail(command if command in known else "", Explained(told(), -22, code, hints), as_json=as_json)
    return result if isinstance(result, int) else 0


def _command_hints(command: str, known: list[str]) -> list[str]:
    from qpair.cli.report import near

    guesses = near(command, known)
    return [f"did you mean {' or '.join(guesses)}?"] if guesses else [f"there are: {', '.join(known)}"]


def _reader_left() -> int:
    """``qpair ls | head``: nothing more to say, and nothing to be said at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED
