"""Figures of bdevs in Python: in process, in a worker process, and nbdkit's Python plugin behind the client that drives it best; in turn, in one run.

All serve 64 MiB out of a bytearray, 4 KiB reads at random, depth 128; the engine or the client on one core, Python on the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import qpair

SIZE = 64 << 20
SECONDS = 1
DEPTH = 128
CORES = sorted(os.sched_getaffinity(0))[:2]

PLUGIN = f"""
import nbdkit
API_VERSION = 2
store = bytearray({SIZE})
def open(readonly):
    return 1
def get_size(handle):
    return {SIZE}
def can_multi_conn(handle):
    return True
def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL
def pread(handle, buffer, offset, flags):
    buffer[:] = store[offset : offset + len(buffer)]
"""


class Ram(qpair.Bdev):
    """A bytearray."""

    def __init__(self, name: str) -> None:
        super().__init__(name, SIZE, block_size=4096)
        self.store = bytearray(self.size_bytes)

    def read(self, requests: Sequence[qpair.Request]) -> None:
        """The whole of it."""
        store = self.store
        for request in requests:
            request.data[:] = store[request.offset : request.end]


async def _measure(process: bool) -> float:
    async with qpair.Stack(cores=str(CORES[0])) as stack:
        os.sched_setaffinity(0, {CORES[-1]})
        disk = await stack.add(Ram, process=True, name="ram0") if process else await stack.add(Ram("ram0"))
        return (await stack.measure(disk, seconds=SECONDS, depth=DEPTH)).iops


def own(*, process: bool) -> float:
    """I/Os a second, measured in an interpreter of its own."""
    command = [sys.executable, str(Path(__file__)), "process" if process else "here"]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@contextlib.contextmanager
def nbdkit() -> Iterator[str]:
    """nbdkit with the plugin above, on the core where our Python would be; the socket's path. `OSError` where it is not installed."""
    if shutil.which("nbdkit") is None or shutil.which("fio") is None:
        raise FileNotFoundError("nbdkit and fio are needed")
    with tempfile.TemporaryDirectory() as directory:
        plugin, socket = Path(directory, "ram.py"), Path(directory, "nbd.sock")
        plugin.write_text(PLUGIN)
        server = subprocess.Popen(["taskset", "-c", str(CORES[-1]), "nbdkit", "-f", "-U", str(socket), "python", str(plugin)])
        try:
            deadline = time.monotonic() + 10
            while not socket.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise OSError("nbdkit did not start: is its Python plugin installed?")
                time.sleep(0.02)
            yield str(socket)
        finally:
            server.terminate()
            server.wait()


def client(socket: str, jobs: int) -> float:
    """fio over libnbd with so many connections that share the depth."""
    words = [
        *("taskset", "-c", str(CORES[0]), "fio", "--name=nbd", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}", "--rw=randread"),
        *("--bs=4k", f"--size={SIZE}", f"--iodepth={DEPTH // jobs}", f"--numjobs={jobs}", "--group_reporting", "--time_based"),
        *(f"--runtime={SECONDS}", "--output-format=json"),
    ]
    out = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout.decode()
    return float(json.loads(out[out.index("{") :])["jobs"][0]["read"]["iops"])


def figures(report: Any, medians: Callable[..., list[list[float]]]) -> None:
    """Rows of ``run.py``'s report: the best number of connections is found first, then all are measured in turn."""
    peers: list[Callable[[], float]] = []
    with contextlib.ExitStack() as stack:
        try:
            socket = stack.enter_context(nbdkit())
            best = max((1, 2, 4), key=lambda jobs: client(socket, jobs))
            peers.append(lambda: client(socket, best))
        except OSError as error:
            report.skip("nbdkit, Python plugin", f"not here: {error}"[:60])
        values = medians(lambda: own(process=False), lambda: own(process=True), *peers)
    here, process, *other = (statistics.median(kept) for kept in values)
    report.raw["python_bdev"] = dict(zip(("here", "process", "nbdkit"), values, strict=False))
    report.add("Python bdev, in process, randread, depth 128", f"{here / 1e3:.0f} k/s", "at least 150 k/s", here >= 150e3)
    report.add("Python bdev, worker process", f"{process / 1e3:.0f} k/s", "at least half of it", process >= here / 2)
    for rival in other:
        report.add(f"nbdkit, Python plugin, fio, {best} connections", f"{rival / 1e3:.0f} k/s")
        report.add("  ratio", f"{here / rival:.1f} x", "at least 5 x", here >= 5 * rival)


if __name__ == "__main__":
    print(asyncio.run(_measure(sys.argv[1] == "process")))
