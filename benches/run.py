"""``make bench``: the figures of docs/performance.md, on this machine.

Each figure is the median of `ROUNDS` measurements (the cost of idle disks, of `PAIRS` pairs); those that are compared are measured in turn, in one run, so that a slow minute of a shared machine meets
both. A peer that is not installed is named and left out. ``run.py NAME...`` measures some figures only; ``--json FILE`` keeps all raw values.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import layers as layer_costs
import python_bdev
import servers
import vhost_scale
from quiet import Quiet

ROOT = Path(__file__).parent.parent
ROUNDS = 5
DISK_BLOCKS = (512 << 20) // 4096
IDLE_DISKS = 64
BDEVS = 1000
PAIRS = 25


@dataclass
class Report:
    """What was measured, and what it is to be held against."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: str, target: str = "", met: bool | None = None, *, resolved: bool = True) -> None:
        verdict = "" if met is None else "not resolved" if not resolved else "met" if met else "MISSED"
        self.rows.append((name, value, target, verdict))
        print(f"  {name:<58} {value:>16}  {target:<26} {verdict}", flush=True)

    def skip(self, name: str, why: str) -> None:
        self.add(name, "not measured", why)


@cache
def moments() -> Quiet:
    """The probe, made when the first figure asks for it."""
    return Quiet(list(servers.cores()))


def medians(*sources: Callable[[], float]) -> list[list[float]]:
    """Each source measured `ROUNDS` times, in turn, in quiet moments; the values of each, sorted."""
    values: list[list[float]] = [[] for _ in sources]
    for _ in range(ROUNDS):
        for kept, source in zip(values, sources, strict=True):
            kept.append(moments().measure(source))
    return [sorted(kept) for kept in values]


def middle(values: list[float]) -> float:
    return statistics.median(values)


def example(package: str, name: str, *words: str) -> dict[str, Any]:
    command = ["cargo", "run", "--quiet", "--release", "-p", package, "--example", name, "--", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def million(value: float) -> str:
    return f"{value / 1e6:.2f} M/s"


def yardstick(report: Report) -> None:
    """The copy loop and the ping-pong, alone."""
    found = example("qpair-memory", "yardstick")
    report.raw["yardstick"] = found
    report.add("copy yardstick (best loop: " + found["variant"] + ")", million(found["copies_per_second"]))
    if found["ping_pong_ns"] is not None:
        report.add("cache-line ping-pong, round trip", f"{found['ping_pong_ns']:.0f} ns")


def in_process(report: Report) -> None:
    """The load generator on null and malloc, one reactor, no ring between."""
    null, malloc = medians(
        lambda: float(example("qpair-perf", "inprocess", "null", "128", "500")["iops"]),
        lambda: float(example("qpair-perf", "inprocess", "malloc", "128", "500")["iops"]),
    )
    report.raw["in_process"] = {"null": null, "malloc": malloc}
    report.add("in process, null, depth 128", million(middle(null)), "at least 20 M/s", middle(null) >= 20e6)
    report.add("in process, malloc, depth 128", million(middle(malloc)))


def vhost_malloc(report: Report) -> None:
    """The whole way to a disk in memory, against the copy alone, in turn."""
    with tempfile.TemporaryDirectory() as name, servers.qpair_server(Path(name)):
        socket = servers.export(Path(name), "ram", "bdev_malloc_create", num_blocks=DISK_BLOCKS, block_size=4096)
        target = f"vhost:{socket}"
        # Pages that were never written are all one page of zeros, in the cache: every block is written first.
        servers.load(target, depth=32, pattern="write", size="128KiB", seconds=2)
        best = str(example("qpair-memory", "yardstick")["variant"]).partition("/")[0]
        copies, reads, writes = medians(
            lambda: float(example("qpair-memory", "yardstick", best)["copies_per_second"]),
            lambda: float(servers.load(target, depth=128)["iops"]),
            lambda: float(servers.load(target, depth=128, pattern="randwrite")["iops"]),
        )
    report.raw["vhost_malloc"] = {"copies": copies, "reads": reads, "writes": writes}
    share = middle(reads) / middle(copies)
    report.add(f"copy yardstick in this run ({best})", million(middle(copies)))
    report.add("vhost, malloc, randread, depth 128", million(middle(reads)))
    report.add("vhost, malloc, randwrite, depth 128", million(middle(writes)))
    report.add("  reads as a share of the yardstick", f"{share:.0%}", "at least 75 %", share >= 0.75)


def vhost_null(report: Report) -> None:
    """null against qemu-storage-daemon's null-co, with the same client."""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs, servers.qpair_server(Path(ours)):
        socket = servers.export(Path(ours), "null", "bdev_null_create", num_blocks=DISK_BLOCKS, block_size=4096)
        for depth in (1, 32, 128):
            own = lambda: float(servers.load(f"vhost:{socket}", depth=depth)["iops"])  # noqa: B023, E731
            try:
                with servers.storage_daemon(Path(theirs), f"driver=null-co,size={DISK_BLOCKS * 4096}") as peer:
                    mine, other = medians(own, lambda: float(servers.load(f"vhost:{peer}", depth=depth)["iops"]))  # noqa: B023
            except (OSError, RuntimeError) as error:
                [mine], other = medians(own), []
                report.skip(f"qemu-storage-daemon, null-co, depth {depth}", f"not here: {error}"[:60])
            report.raw[f"vhost_null_{depth}"] = {"qpair": mine, "qemu": other}
            report.add(f"vhost, null, randread, depth {depth}", million(middle(mine)))
            if other:
                ratio = middle(mine) / middle(other)
                report.add(f"qemu-storage-daemon, null-co, depth {depth}", million(middle(other)))
                wanted = depth == 128
                report.add("  ratio", f"{ratio:.1f} x", "at least 4 x" if wanted else "", ratio >= 4 if wanted else None)


def packed(report: Report) -> None:
    """Packed rings against split ones: the same null, the same client, in turn."""
    with tempfile.TemporaryDirectory() as name, servers.qpair_server(Path(name)):
        sockets = [
            servers.export(Path(name), kind, "bdev_null_create", packed_ring=kind == "packed", num_blocks=DISK_BLOCKS, block_size=4096)
            for kind in ("split", "packed")
        ]
        for depth in (1, 128):
            split, other = medians(*(lambda s=socket: float(servers.load(f"vhost:{s}", depth=depth)["iops"]) for socket in sockets))  # type: ignore[misc]  # noqa: B023
            ratio = middle(other) / middle(split)
            report.raw[f"packed_{depth}"] = {"split": split, "packed": other}
            report.add(f"vhost, null, randread, depth {depth}, split ring", million(middle(split)))
            report.add(f"vhost, null, randread, depth {depth}, packed ring", million(middle(other)))
            report.add("  ratio", f"{ratio:.2f} x", "at least 1 x", ratio >= 1)


def depth_one(report: Report) -> None:
    """One I/O at a time: against the ping-pong while polling, against qemu-storage-daemon when both sleep."""
    with tempfile.TemporaryDirectory() as name, servers.qpair_server(Path(name)):
        socket = servers.export(Path(name), "null", "bdev_null_create", num_blocks=DISK_BLOCKS, block_size=4096)
        trips, latencies = medians(
            lambda: float(example("qpair-memory", "yardstick", "ping-pong")["ping_pong_ns"]),
            lambda: 1e9 / float(servers.load(f"vhost:{socket}", depth=1)["iops"]),
        )
    ratio = middle(latencies) / middle(trips)
    report.raw["depth_one"] = {"ping_pong_ns": trips, "latency_ns": latencies}
    report.add("ping-pong in this run", f"{middle(trips):.0f} ns")
    report.add("vhost, null, depth 1, both polling", f"{middle(latencies):.0f} ns")
    report.add("  as a multiple of the ping-pong", f"{ratio:.2f} x", "at most 2.5 x", ratio <= 2.5)


def asleep(report: Report) -> None:
    """One request at a time, and a server that does not spin.

    First with a client that is neither side's own and sleeps too (qemu-img bench over libblkio): a kick and an interrupt for each
    request, as most guests have it. Then with our client, which spins: its next kick comes within half a microsecond of the answer.
    """
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as spins, tempfile.TemporaryDirectory() as theirs:
        try:
            with (
                servers.qpair_server(Path(ours), "--spin-us", "0"),
                servers.qpair_server(Path(spins)),
                servers.storage_daemon(Path(theirs), f"driver=null-co,size={DISK_BLOCKS * 4096}") as peer,
            ):
                socket, default = (
                    servers.export(Path(folder), "null", "bdev_null_create", num_blocks=DISK_BLOCKS, block_size=4096)
                    for folder in (ours, spins)
                )
                mine, usual, other = medians(*(partial(servers.image_bench, path) for path in (socket, default, peer)))
                mine_hot, other_hot = medians(
                    lambda: float(servers.load(f"vhost:{socket}", depth=1)["iops"]),
                    lambda: float(servers.load(f"vhost:{peer}", depth=1)["iops"]),
                )
        except (OSError, RuntimeError) as error:
            return report.skip("asleep, depth 1, against qemu-storage-daemon", f"not here: {error}"[:60])
    report.raw["asleep"] = {"qpair": mine, "qpair_default": usual, "qemu": other, "qpair_hot": mine_hot, "qemu_hot": other_hot}
    for name, own, peers in [("asleep, both sides (qemu-img bench)", mine, other), ("asleep, our client spins", mine_hot, other_hot)]:
        met = middle(own) >= middle(peers)
        report.add(f"{name}, null, depth 1", f"{middle(own) / 1e3:.0f} k/s", f"qemu: {middle(peers) / 1e3:.0f} k/s", met)
    report.add("  the same qemu-img bench, qpair as it is started", f"{middle(usual) / 1e3:.0f} k/s")
    return None


def idle(report: Report) -> None:
    """64 disks exported and attached by another process that is asleep; what that costs, and what it costs a busy disk beside them.

    The cost is less than this machine's mood: so it is the median of pairs, each of a server with the idle disks and one without,
    measured one right after the other and every other time the other way round.
    """
    with ExitStack() as running:
        few, many, guest = (Path(running.enter_context(tempfile.TemporaryDirectory())) for _ in range(3))
        running.enter_context(servers.qpair_server(few))
        server = running.enter_context(servers.qpair_server(many))
        alone, among = (servers.export(at, "busy", "bdev_null_create", num_blocks=DISK_BLOCKS, block_size=4096) for at in (few, many))
        disks = [servers.export(many, f"idle{n}", "bdev_null_create", num_blocks=DISK_BLOCKS, block_size=4096) for n in range(IDLE_DISKS)]
        client = running.enter_context(servers.attached(guest, disks))
        time.sleep(1)
        shares = servers.shares([server, client], seconds=10)
        resident = server.resident_mb()
        pairs = []
        for number in range(PAIRS):
            order = (alone, among) if number % 2 == 0 else (among, alone)

            def once(order: tuple[Path, Path] = order) -> tuple[float, float]:
                found = {socket: float(servers.load(f"vhost:{socket}", depth=32, seconds=0.5)["iops"]) for socket in order}
                return found[alone], found[among]

            pairs.append(moments().measure(once))
    costs = sorted(1 - crowded / empty for empty, crowded in pairs)
    report.raw["idle"] = {"shares": shares, "resident_mb": resident, "pairs": pairs}
    report.add(f"idle, {IDLE_DISKS} disks attached: one core's share", f"{shares[0]:.2%}", "under 1 %", shares[0] < 0.01)
    report.add("  of the process that attached them", f"{shares[1]:.2%}")
    report.add(f"idle, {IDLE_DISKS} disks attached: resident memory", f"{resident:.0f} MB", "under 80 MB", resident < 80)
    # The true median lies between these two in 95 of 100 runs: each pair is above or below it as a coin falls.
    rank = int(PAIRS / 2 - 0.98 * PAIRS**0.5)
    low, high = costs[rank], costs[-1 - rank]
    cost, resolved = middle(costs), not low < 0.02 <= high
    report.add(f"what {IDLE_DISKS} idle disks cost a busy one", f"{cost:.1%}", "under 2 %", cost < 0.02, resolved=resolved)
    report.add(f"  95 % interval of that, from {PAIRS} pairs", f"{low:.1%} to {high:.1%}")


def start_up(report: Report) -> None:
    """From exec to the first RPC answer."""

    def once() -> float:
        with tempfile.TemporaryDirectory() as name:
            start = time.monotonic()
            with servers.qpair_server(Path(name)):
                servers.rpc(Path(name) / "rpc.sock", "spdk_get_version")
                return time.monotonic() - start

    [times] = medians(once)
    report.raw["start_up"] = times
    report.add("first RPC answer after start", f"{middle(times) * 1e3:.0f} ms", "under 300 ms", middle(times) < 0.3)


def system_calls(report: Report) -> None:
    """System calls of the server under load (strace slows it, so the count is what matters)."""
    if shutil.which("strace") is None:
        return report.skip("system calls per I/O", "strace is not installed")
    with tempfile.TemporaryDirectory() as name, servers.qpair_server(Path(name)) as server:
        socket = servers.export(Path(name), "null", "bdev_null_create", num_blocks=DISK_BLOCKS, block_size=4096)
        client = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "qpair.cli",
                "perf",
                f"vhost:{socket}",
                "--time",
                "5",
                "--depth",
                "128",
                "--cores",
                str(servers.cores()[1]),
                "--json",
            ],
            stdout=subprocess.PIPE,
        )
        time.sleep(2)
        calls = server.system_calls(2)
        ios = json.loads(client.communicate()[0])["ios"] * 2 / 5
    report.raw["system_calls"] = {"calls": calls, "ios": ios}
    total = sum(calls.values())
    report.add("system calls in 2 s of load", str(total), f"of about {ios / 1e6:.1f} M I/Os", total < ios / 1000)
    return None


def thousand_bdevs(report: Report) -> None:
    """A thousand bdevs by one batch of RPCs, and then all of them shown: what a client on the socket waits for, to the last byte of the answer."""

    def ask(path: Path, document: Any) -> tuple[float, bytes]:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
            request = json.dumps(document).encode()
            start = time.monotonic()
            peer.sendall(request)
            with peer.makefile("rb") as answers:
                line = answers.readline()
            return time.monotonic() - start, line

    def once() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as name, servers.qpair_server(Path(name)):
            path = Path(name) / "rpc.sock"
            params = {"num_blocks": 128, "block_size": 512}
            made, answers = ask(path, [{"id": number, "method": "bdev_malloc_create", "params": params} for number in range(BDEVS)])
            if json.loads(answers)[-1].get("result") != f"Malloc{BDEVS - 1}":
                raise RuntimeError(f"not all were made: {answers[-200:]!r}")
            shown, answer = min(ask(path, {"id": 1, "method": "bdev_get_bdevs"}) for _ in range(3))
            if len(json.loads(answer)["result"]) != BDEVS:
                raise RuntimeError("not all are shown")
            return made, shown

    times = [moments().measure(once) for _ in range(ROUNDS)]
    report.raw["thousand_bdevs"] = times
    made, shown = (statistics.median(column) for column in zip(*times, strict=True))
    report.add(f"{BDEVS} bdevs by one batch of RPCs", f"{made * 1e3:.0f} ms", "under 2 s", made < 2)
    report.add(f"bdev_get_bdevs of {BDEVS}", f"{shown * 1e3:.1f} ms", "under 50 ms", shown < 0.05)


def python_bdevs(report: Report) -> None:
    """Bdevs in Python, against nbdkit's Python plugin."""
    python_bdev.figures(report, medians)


def layers(report: Report) -> None:
    """What the block-device layer adds to an I/O."""
    layer_costs.layers(report, example, moments().measure)


def raid(report: Report) -> None:
    """What is left of malloc's pace in a raid0."""
    layer_costs.raid(report, example, moments().measure)


def many_disks(report: Report) -> None:
    """Ten busy disks among 256."""
    vhost_scale.many_disks(report, moments().measure)


def two_reactors(report: Report) -> None:
    """One disk on two reactors."""
    vhost_scale.two_reactors(report, moments().measure)


def inflight(report: Report) -> None:
    """What tracking costs."""
    vhost_scale.inflight(report, moments().measure, example)


FIGURES: dict[str, Callable[[Report], None]] = {
    "yardstick": yardstick,
    "in_process": in_process,
    "layers": layers,
    "raid": raid,
    "vhost_malloc": vhost_malloc,
    "vhost_null": vhost_null,
    "packed": packed,
    "inflight": inflight,
    "many_disks": many_disks,
    "two_reactors": two_reactors,
    "depth_one": depth_one,
    "asleep": asleep,
    "idle": idle,
    "start_up": start_up,
    "system_calls": system_calls,
    "thousand_bdevs": thousand_bdevs,
    "python_bdevs": python_bdevs,
}


def machine() -> str:
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    return f"{model}, {len(servers.cores())} cores used of {platform.machine()}, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--json", type=Path, help="keep the raw values here")
    options = parser.parse_args()
    unknown = [name for name in options.figures if name not in FIGURES]
    if unknown:
        parser.error(f"no figure is named {unknown[0]}; there are {', '.join(FIGURES)}")
    report = Report()
    report.raw["machine"] = machine()
    print(machine(), flush=True)
    for name in options.figures or FIGURES:
        print(name, flush=True)
        moments().figure()
        FIGURES[name](report)
    report.raw["moments"] = moments().summary()
    print(moments().summary())
    if options.json:
        options.json.write_text(json.dumps(report.raw, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
