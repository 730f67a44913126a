"""``qpair ls``: a tree of what stands on what, asked of a running server by JSON-RPC (qpair's or SPDK's).

How it works: two bdev_get_iostat with the interval between them, then the bdevs and whatever exports them. With ``--watch`` the second statistics of a round are the first of the next one.
On a terminal narrower than the table the least wanted columns go; what is piped is never cut.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpair.cli.report import INTERRUPTED, Explained, bdev_hints, explain, fail
from qpair.cli.tree import EXPORTS, Bdev, Export, Forest, Line, rates
from qpair.errors import NoSuchBdev, QpairError
from qpair.rpc.client import RpcClient, RpcError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LsOptions", "ls"]

PIPED_WIDTH = 1000
# Least wanted first; the table is narrowed by them until it fits.
OPTIONAL_COLUMNS = ("DETAIL", "PRODUCT", "BLOCK", "CLAIMED BY")


@dataclass(frozen=True, slots=True)
class LsOptions:
    """What the command line says."""

    names: tuple[str, ...] = ()
    address: str = "/var/tmp/spdk.sock"
    interval_s: float = 0.5
    watch: bool = False
    rounds: int = 0
    inverse: bool = False
    as_json: bool = False


def ls(options: LsOptions) -> int:
    """Ask and print; the exit code."""
    try:
        with RpcClient(options.address) as client:
            forests = _rounds(client, options)
            if options.as_json:
                _print_json(forests, options)
            else:
                _print_trees(forests, options)
    except KeyboardInterrupt:
        return 0 if options.watch else INTERRUPTED
    except NoSuchBdev as error:
        missing = str(error.args[0]).split("'")[1]
        return fail("ls", Explained(str(error), error.code, hints=bdev_hints(options.address, [missing])), as_json=options.as_json)
    except QpairError as error:
        return fail("ls", explain(error, address=options.address), as_json=options.as_json)
    return 0


def _rounds(client: RpcClient, options: LsOptions) -> Iterator[Forest]:
    """A forest a round, one in all without --watch."""
    known = set(client.call("rpc_get_methods"))
    counted = options.interval_s > 0 or options.watch
    before = client.call("bdev_get_iostat") if counted else None
    number = 0
    while True:
        if counted:
            time.sleep(options.interval_s or 1.0)
        forest, before = _ask(client, known, before)
        yield forest
        number += 1
        if not options.watch or number == options.rounds:
            return


def _ask(client: RpcClient, known: set[str], before: Any) -> tuple[Forest, Any]:
    after = client.call("bdev_get_iostat") if before is not None else None
    exports: list[Export] = []
    for method, read in EXPORTS.items():
        if method in known:
            # a subsystem that has not been started says so by an error
            with contextlib.suppress(RpcError):
                exports.extend(read(client.call(method)))
    forest = Forest(client.call("bdev_get_bdevs"), exports)
    if after is not None:
        for name, found in rates(before, after).items():
            if name in forest.bdevs:
                forest.bdevs[name].rates = found
    return forest, after


def _chosen(forest: Forest, options: LsOptions) -> set[str] | None:
    if not options.names:
        return None
    found: list[str] = []
    for name in options.names:
        if (real := forest.find(name)) is None:
            raise NoSuchBdev(f"no bdev is named '{name:.256}'")
        found.append(real)
    return forest.connected(found)


def _print_json(forests: Iterator[Forest], options: LsOptions) -> None:
    for forest in forests:
        chosen = _chosen(forest, options)
        shown = {
            "interval_s": options.interval_s,
            "bdevs": [bdev.as_dict() for bdev in forest.bdevs.values() if chosen is None or bdev.name in chosen],
        }
        print(json.dumps(shown, indent=None if options.watch else 2), flush=True)


def _print_trees(forests: Iterator[Forest], options: LsOptions) -> None:
    from rich.console import Console, Group
    from rich.text import Text

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPED_WIDTH)
    if options.watch and console.is_terminal:
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            for forest in forests:
                heading = Text(f"{options.address}, every {options.interval_s or 1.0:g} s, {time.strftime('%H:%M:%S')}; Ctrl-C ends", "dim")
                live.update(Group(heading, _table(forest, options, console.width)), refresh=True)
        return
    for number, forest in enumerate(forests):
        if number:
            print()
        if not forest.bdevs:
            print(f"no bdevs on {options.address}", file=sys.stderr)
        else:
            _put(console, _table(forest, options, console.width))
        sys.stdout.flush()


def _put(console: Any, table: Table) -> None:
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _table(forest: Forest, options: LsOptions, width: int) -> Table:
    from rich.console import Console

    lines = forest.lines(chosen=_chosen(forest, options), inverse=options.inverse)
    hidden: set[str] = set()
    for column in ("", *OPTIONAL_COLUMNS):
        hidden.add(column)
        table = _made(lines, hidden, rates_shown=options.interval_s > 0 or options.watch)
        if Console(width=PIPED_WIDTH).measure(table).maximum <= width:
            break
    return table


def _made(lines: list[Line], hidden: set[str], *, rates_shown: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    columns = [("NAME", "left"), ("SIZE", "right"), ("BLOCK", "right"), ("PRODUCT", "left"), ("CLAIMED BY", "left")]
    if rates_shown:
        columns += [("IOPS R", "right"), ("IOPS W", "right"), ("MB/s R", "right"), ("MB/s W", "right")]
    columns += [("DETAIL", "left")]
    columns = [column for column in columns if column[0] not in hidden]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title, justify in columns:
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for line in lines:
        cells = _export_cells(line.item) if isinstance(line.item, Export) else _bdev_cells(line.item, again=line.again)
        name = Text()
        name.append(line.stem, "dim")
        name.append(*cells.pop("NAME"))
        row = [name, *(Text(*cells.get(title, ("", ""))) for title, _ in columns[1:])]
        table.add_row(*row)
    return table


def _bdev_cells(bdev: Bdev, *, again: bool) -> dict[str, tuple[str, str]]:
    if again:
        return {"NAME": (bdev.name, "dim"), "DETAIL": ("shown above", "dim")}
    cells = {
        "NAME": (bdev.name, "bold"),
        "SIZE": (_size(bdev.size_bytes), ""),
        "BLOCK": (str(bdev.block_size), ""),
        "PRODUCT": (bdev.product, ""),
        "CLAIMED BY": (bdev.claimed_by or ("yes" if bdev.claimed else "-"), "" if bdev.claimed else "dim"),
        "DETAIL": (bdev.told, "yellow" if "of" in bdev.told.split() else ""),
    }
    if (found := bdev.rates) is not None:
        for title, value, shown in (
            ("IOPS R", found.read_iops, _count(found.read_iops)),
            ("IOPS W", found.write_iops, _count(found.write_iops)),
            ("MB/s R", found.read_mb_per_s, f"{found.read_mb_per_s:,.1f}"),
            ("MB/s W", found.write_mb_per_s, f"{found.write_mb_per_s:,.1f}"),
        ):
            cells[title] = (shown, "green") if value else ("0", "dim")
    return cells


def _export_cells(export: Export) -> dict[str, tuple[str, str]]:
    return {"NAME": (f"{export.kind} {export.name}", "cyan"), "DETAIL": (export.detail, "")}


def _size(size_bytes: int) -> str:
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 1000 or value == int(value) else f"{value:.3g} {unit}"


def _count(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            scale = {"G": 1e9, "M": 1e6, "k": 1e3}[letter]
            return f"{value / scale:.2f} {letter}"
    return f"{value:.0f}"
