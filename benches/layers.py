"""What the block-device layer adds to an I/O: a stacked bdev, limits that do not limit, a histogram. Differences of runs in turn in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from run import Report

PAIRS = 3
"""In each process; processes are repeated as other figures are, until enough of them were undisturbed."""
ROUNDS = 5
TARGETS = {"passthru": 15.0, "limit": 10.0, "group_and_all_limits": 10.0, "histogram": 5.0}
NAMES = {
    "nothing": "null beside null: what is resolved here",
    "passthru": "a stacked bdev (passthru) on null",
    "limit": "an I/O limit that does not limit",
    "group_and_all_limits": "all four limits and a group's, not limiting",
    "histogram": "a histogram",
}


def layers(report: Report, example: Callable[..., dict[str, Any]], measure: Callable[[Callable[[], float]], float]) -> None:
    """``example(package, name, *words)`` runs an example; ``measure(source)`` calls ``source`` in a quiet moment."""
    kept: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for _ in range(ROUNDS):
        last: dict[str, Any] = {}

        def once(into: dict[str, Any] = last) -> float:
            into.clear()
            into.update(example("qpair-perf", "layers", str(PAIRS), "150", "128"))
            return 0.0

        measure(once)
        for name, pairs in last.items():
            # The first pair warms up.
            kept[name].extend(pairs[1:])
    report.raw["layers"] = kept
    alone = statistics.median(without for pairs in kept.values() for without, _ in pairs)
    report.add("null alone, depth 128", f"{alone:.1f} ns")
    for name, text in NAMES.items():
        cost = statistics.median(with_it - without for without, with_it in kept[name])
        target = TARGETS.get(name)
        if target is None:
            report.add(f"  {text}", f"{cost:+.1f} ns")
        else:
            report.add(f"  {text}", f"{cost:+.1f} ns", f"under {target:.0f} ns", cost < target)
