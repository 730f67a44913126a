"""What the benchmark measures: servers pinned to one core, and our client on another.

Everything is started by a command line that a user could type, and ended by its pid when its ``with`` block is left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
START_S = 20.0


def cores() -> tuple[int, int]:
    """The server's core and the client's."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


class Process:
    """A running server, looked at from outside."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_seconds(self) -> float:
        """User and system time so far, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def resident_mb(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

    def system_calls(self, seconds: float) -> dict[str, int]:
        """System calls by name over some seconds, by strace."""
        report = self.folder / "strace.txt"
        tracer = subprocess.Popen(["strace", "-f", "-c", "-o", str(report), "-p", str(self.pid)], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        tracer.terminate()
        tracer.wait()
        calls: dict[str, int] = {}
        for line in report.read_text().splitlines():
            words = line.split()
            if len(words) >= 5 and words[0].replace(".", "").isdigit() and words[-1] != "total":
                calls[words[-1]] = int(words[3])
        return calls


def shares(processes: list[Process], *, seconds: float) -> list[float]:
    """What part of one core each of them used over some seconds."""
    before, start = [process.cpu_seconds() for process in processes], time.monotonic()
    time.sleep(seconds)
    wall = time.monotonic() - start
    return [(process.cpu_seconds() - used) / wall for process, used in zip(processes, before, strict=True)]


@contextmanager
def _running(command: list[str], folder: Path, ready: Path, environment: dict[str, str] | None = None) -> Iterator[Process]:
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{(folder / 'server.log').read_text()}")
            time.sleep(0.001)
        yield Process(process, folder)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rpc(socket: Path, method: str, **params: Any) -> Any:
    """One call, by our client library."""
    from qpair.rpc.client import RpcClient

    with RpcClient(str(socket)) as client:
        return client.call(method, **params)


@contextmanager
def qpair_server(folder: Path, *options: str, core: int | Sequence[int] | None = None) -> Iterator[Process]:
    """``qpair serve`` on the server's core (or others)."""
    socket = folder / "rpc.sock"
    chosen = cores()[0] if core is None else core
    mask = [chosen] if isinstance(chosen, int) else list(chosen)
    command = [sys.executable, "-m", "qpair.cli", "serve", "-m", str(mask), "-r", str(socket), "-S", str(folder), *options]
    with _running(command, folder, socket) as process:
        yield process


def export(folder: Path, name: str, method: str, *, packed_ring: bool = False, **params: Any) -> Path:
    """A new bdev behind a socket of its own. ``packed_ring``: packed rings are offered, and our client takes them."""
    rpc(folder / "rpc.sock", method, name=name, **params)
    rpc(folder / "rpc.sock", "vhost_create_blk_controller", ctrlr=f"{name}.sock", dev_name=name, packed_ring=packed_ring)
    return folder / f"{name}.sock"


@contextmanager
def attached(folder: Path, sockets: list[Path]) -> Iterator[Process]:
    """A second ``qpair serve``, on the client's core, that has the disks behind the sockets for bdevs and does nothing with them."""
    with qpair_server(folder, core=cores()[1]) as process:
        for number, socket in enumerate(sockets):
            rpc(
                folder / "rpc.sock", "bdev_virtio_attach_controller", name=f"far{number}", trtype="user", traddr=str(socket), dev_type="blk"
            )
        yield process


@contextmanager
def storage_daemon(folder: Path, node: str) -> Iterator[Path]:
    """qemu-storage-daemon on the server's core, exporting ``node`` (its --blockdev words without node-name)."""
    from linux_guest import Guest, GuestPaths

    guest = Guest(GuestPaths.default())
    socket = folder / "daemon.sock"
    export = (
        f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},num-queues=1,writable=on,logical-block-size=512"
    )
    words = ["--blockdev", f"{node},node-name=disk", "--export", export]
    command = ["taskset", "-c", str(cores()[0]), *guest.qemu_command("qemu-storage-daemon"), *words]
    with _running(command, folder, socket, guest.environment):
        yield socket


def load(
    target: str, *, seconds: float = 0.5, depth: int, pattern: str = "randread", size: str = "4KiB", core: int | str | None = None
) -> dict[str, Any]:
    """``qpair perf TARGET --json`` on the client's core (or others: "2,3")."""
    done = subprocess.run(_load_command(target, seconds, depth, pattern, size, core), stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def loads(targets: Sequence[str], *, seconds: float = 0.5, depth: int, pattern: str = "randread", size: str = "4KiB") -> float:
    """IOPS of as many clients at once, all on the client's core, together."""
    commands = [_load_command(target, seconds, depth, pattern, size, None) for target in targets]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    outcomes = [(client, client.communicate()[0]) for client in clients]
    for client, _ in outcomes:
        if client.returncode != 0:
            raise RuntimeError(f"a client ended with {client.returncode}")
    return sum(float(json.loads(text)["iops"]) for _, text in outcomes)


def _load_command(target: str, seconds: float, depth: int, pattern: str, size: str, core: int | str | None) -> list[str]:
    chosen = cores()[1] if core is None else core
    return [
        sys.executable,
        "-m",
        "qpair.cli",
        "perf",
        target,
        "--pattern",
        pattern,
        "--size",
        size,
        "--depth",
        str(depth),
        "--time",
        str(seconds),
        "--cores",
        str(chosen),
        "--json",
    ]


def image_bench(socket: Path, count: int = 50_000) -> float:
    """IOPS of ``qemu-img bench`` at depth 1, on the client's core: libblkio, asleep while it waits."""
    from linux_guest import Guest, GuestPaths

    guest = Guest(GuestPaths.default())
    image = f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"
    words = [*guest.qemu_command("qemu-img"), "bench", "-c", str(count), "-d", "1", "-s", "4096", "--image-opts", image]
    command = ["taskset", "-c", str(cores()[1]), *words]
    done = subprocess.run(command, env=guest.environment, stdout=subprocess.PIPE, check=True, text=True)
    # Its last line: "Run completed in 0.812 seconds."
    found = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if found is None:
        raise RuntimeError(f"qemu-img bench said no time: {done.stdout[-200:]}")
    return count / float(found[1])
