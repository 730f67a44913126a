"""What many disks, several reactors and the inflight region cost or bring a vhost disk."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import servers

DISKS = 256
BUSY = 10
PAIRS = 9
DISK_BLOCKS = (512 << 20) // 4096
REQUESTS = 2_000_000

Measure = Callable[[Callable[[], Any]], Any]
Example = Callable[..., dict[str, Any]]


def null_disks(folder: Path, count: int) -> list[Path]:
    return [servers.export(folder, f"null{n}", "bdev_null_create", num_blocks=DISK_BLOCKS, block_size=4096) for n in range(count)]


def pairs(measure: Measure, one: Callable[[], float], other: Callable[[], float], count: int) -> list[tuple[float, float]]:
    """Both measured one right after the other, every other time the other way round."""

    def forth() -> tuple[float, float]:
        return one(), other()

    def back() -> tuple[float, float]:
        second = other()
        return one(), second

    return [measure(forth if number % 2 == 0 else back) for number in range(count)]


def many_disks(report: Any, measure: Measure) -> None:
    """Ten busy disks of 256 on two reactors, against ten that are alone."""
    both = servers.cores()
    with ExitStack() as running:
        few, many = (Path(running.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        for folder in (few, many):
            running.enter_context(servers.qpair_server(folder, core=both))
        alone, among = ([f"vhost:{disk}" for disk in null_disks(folder, count)] for folder, count in ((few, BUSY), (many, DISKS)))
        found = pairs(measure, lambda: servers.loads(alone, depth=8), lambda: servers.loads(among[:: DISKS // BUSY][:BUSY], depth=8), PAIRS)
    share = statistics.median(crowded / empty for empty, crowded in found)
    report.raw["many_disks"] = found
    report.add(
        f"{BUSY} busy disks alone, two reactors, randread, depth 8 each", f"{statistics.median(one for one, _ in found) / 1e6:.2f} M/s"
    )
    report.add(f"  the same among {DISKS}, as a share", f"{share:.1%}", "at least 95 %", share >= 0.95)


def two_reactors(report: Any, measure: Measure) -> None:
    """One disk with two queues: both on one reactor, then each on its own, under the same client on two other cores."""
    usable = sorted(os.sched_getaffinity(0))
    name = "a two-queue disk on two reactors, as a multiple of one"
    if len(usable) < 4:
        return report.skip(name, f"needs 4 cores, there are {len(usable)}")  # type: ignore[no-any-return]
    with tempfile.TemporaryDirectory() as folder, servers.qpair_server(Path(folder), core=usable[:2]):
        [socket] = null_disks(Path(folder), 1)

        def once(reactors: list[int]) -> float:
            servers.rpc(Path(folder) / "rpc.sock", "qpair_vhost_set_cpumask", ctrlr=socket.name, cpumask=str(reactors))
            return float(servers.load(f"vhost:{socket}", depth=128, core=f"{usable[2]},{usable[3]}")["iops"])

        found = pairs(measure, lambda: once(usable[:1]), lambda: once(usable[:2]), PAIRS)
    ratio = statistics.median(two / one for one, two in found)
    report.raw["two_reactors"] = found
    report.add(name, f"{ratio:.2f} x", "at least 1.8 x", ratio >= 1.8)
    return None


def inflight(report: Any, measure: Measure, example: Example) -> None:
    """Requests that are tracked in an inflight region, against those that are not: the target alone, guest and reactor on one core."""
    for module, limit in (("null", 0.05), ("malloc", 0.02)):
        for kind in ("split", "packed"):
            words = [module, "128", str(REQUESTS), *(["packed"] if kind == "packed" else [])]

            def plain(words: list[str] = words) -> float:
                return float(example("qpair-vhost", "ring", *words)["ns_per_request"])

            def tracked(words: list[str] = words) -> float:
                return float(example("qpair-vhost", "ring", *words, "inflight")["ns_per_request"])

            found = pairs(measure, plain, tracked, PAIRS)
            cost = statistics.median(with_it / without - 1 for without, with_it in found)
            report.raw[f"inflight_{module}_{kind}"] = found
            value = f"{statistics.median(without for without, _ in found):.1f} ns + {cost:.1%}"
            report.add(f"inflight tracking, {module}, {kind} ring, depth 128", value, f"under {limit:.0%}", cost < limit)
