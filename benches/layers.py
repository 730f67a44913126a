"""What the block-device layer adds to an I/O: a stacked bdev, limits that do not limit, a histogram, trace points; and what is left of malloc's pace in an array of two.

Each process has pairs of runs in turn, with and without.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from run import Report

Measure = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]

PAIRS = 3
"""In each process; processes are repeated as other figures are, until enough of them were undisturbed."""
ROUNDS = 5
TARGETS = {"passthru": 15.0, "limit": 10.0, "group_and_all_limits": 10.0, "histogram": 5.0}
RAID_PROCESSES = 9
"""Where a process's memory comes to lie moves malloc alone by a tenth, for all of its life: so there are many processes, and few pairs in each."""
RAID_SHARE = 0.9
NAMES = {
    "nothing": "null beside null: what is resolved here",
    "passthru": "a stacked bdev (passthru) on null",
    "limit": "an I/O limit that does not limit",
    "group_and_all_limits": "all four limits and a group's, not limiting",
    "histogram": "a histogram",
    "traces_off": "trace points off: on once, beside never on",
    "traces_on": "trace points on",
}


def layers(report: Report, example: Callable[..., dict[str, Any]], measure: Measure) -> None:
    """``example(package, name, *words)`` runs an example; ``measure(source)`` calls ``source`` in a quiet moment."""
    kept: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for _ in range(ROUNDS):
        last = measure(lambda: example("qpair-perf", "layers", str(PAIRS), "150", "128"))
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


def raid(report: Report, example: Callable[..., dict[str, Any]], measure: Measure) -> None:
    """raid0 of two mallocs, as a share of one malloc that is as large as both, on one reactor."""
    kept: dict[str, list[list[float]]] = {"randread": [], "randwrite": []}
    for _ in range(RAID_PROCESSES):
        last = measure(lambda: example("qpair-raid", "stripe", str(PAIRS), "100", "128"))
        for pattern, pairs in last.items():
            # The first pair warms up.
            kept[pattern].extend(pairs[1:])
    report.raw["raid"] = kept
    for pattern, pairs in kept.items():
        shares = sorted(array / alone for alone, array in pairs)
        quarter = len(shares) // 4
        report.add(f"malloc alone, {pattern}, depth 128", f"{statistics.median(alone for alone, _ in pairs) / 1e6:.2f} M/s")
        share = statistics.median(shares)
        report.add("  raid0 of two, as a share of it", f"{share:.1%}", f"at least {RAID_SHARE:.0%}", share >= RAID_SHARE)
        report.add("  the middle half of the pairs", f"{shares[quarter]:.0%} to {shares[-1 - quarter]:.0%}")
        cost = statistics.median(1e9 / array - 1e9 / alone for alone, array in pairs)
        report.add("  what raid0 adds to an I/O", f"{cost:+.1f} ns")
