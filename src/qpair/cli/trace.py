"""``qpair trace``: turn trace points of a running server on for some seconds, and show how long I/Os took at each bdev.

How it works: points that were off are turned off again in the end, also when it is interrupted, which waits for the answer that is under way. What the server overwrote before it was fetched is lost, and said.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from qpair.bdev.trace import LAYER_POINTS, LayerTimes, Summary, TracePage
from qpair.cli.report import explain, fail
from qpair.errors import QpairError
from qpair.rpc.client import RpcClient

__all__ = ["TraceOptions", "trace"]

PAUSE_S = 0.02
ENOUGH = 1024
"""After a page with fewer records there is time for a pause."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What the command line says."""

    names: tuple[str, ...] = ()
    address: str = "/var/tmp/spdk.sock"
    seconds: float = 2.0
    as_json: bool = False


class _Follower:
    def __init__(self, client: RpcClient) -> None:
        self._client = client
        self._cursor = client.call("qpair_trace_get", newest=True)["cursor"]
        self.summary = Summary()
        self.records = self.lost = 0

    def fetch(self) -> int:
        page = msgspec.convert(self._client.call("qpair_trace_get", cursor=self._cursor), TracePage)
        self.summary.add(page.records)
        self._cursor = page.cursor
        self.records += len(page.records)
        self.lost += page.lost
        return len(page.records)

    def follow(self, seconds: float, interrupted: Callable[[], bool]) -> float:
        """For so long, or until interrupted; how long it was."""
        began = time.monotonic()
        while (left := seconds - (time.monotonic() - began)) > 0 and not interrupted():
            if self.fetch() < ENOUGH:
                time.sleep(min(PAUSE_S, left))
        return time.monotonic() - began


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, without an exception in the middle of a call."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def trace(options: TraceOptions) -> int:
    """Follow and print; the exit code."""
    try:
        with RpcClient(options.address) as client:
            names = {client.call("bdev_get_bdevs", name=name)[0]["name"] for name in options.names}
            follower = _Follower(client)
            on = LAYER_POINTS & ~int(client.call("trace_get_info")["bdev"]["tpoint_mask"], 16)
            with _interrupts() as interrupted:
                client.call("trace_set_tpoint_mask", name="bdev", tpoint_mask=on)
                try:
                    seconds = follower.follow(options.seconds, interrupted)
                finally:
                    client.call("trace_clear_tpoint_mask", name="bdev", tpoint_mask=on)
            left = True
            while left and on == LAYER_POINTS:  # somebody else's points never come to an end
                left = follower.fetch() > 0
    except QpairError as error:
        return fail("trace", explain(error, address=options.address), as_json=options.as_json)
    layers = [layer for layer in follower.summary.layers() if not names or layer.bdev in names]
    if options.as_json:
        shown = {"seconds": round(seconds, 3), "records": follower.records, "lost": follower.lost, "layers": msgspec.to_builtins(layers)}
        print(json.dumps(shown, indent=2))
        return 0
    _print(layers)
    if follower.lost:
        print(f"{follower.records} records seen, {follower.lost} overwritten before they were fetched", file=sys.stderr)
    return 0


COLUMNS = ("BDEV", "OP", "IOS", "ERRORS", "MEAN µs", "P50 µs", "P99 µs", "OWN µs", "WAIT µs")


def _print(layers: list[LayerTimes]) -> None:
    if not layers:
        print("no I/O was seen", file=sys.stderr)
        return
    rows = [COLUMNS, *(_row(layer) for layer in layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        cells = [
            text.ljust(width) if column < 2 else text.rjust(width) for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _row(layer: LayerTimes) -> tuple[str, ...]:
    def microseconds(ns: Any) -> str:
        return f"{ns / 1000:.1f}"

    times = (layer.mean_ns, layer.p50_ns, layer.p99_ns, layer.own_ns, layer.wait_ns)
    return (layer.bdev, layer.op, str(layer.ios), str(layer.errors), *map(microseconds, times))
