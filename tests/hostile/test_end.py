"""Ends: of the server by signals while I/O is under way, of its clients by SIGKILL; and two hundred comings and goings."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.front_end import DATA_AT, READ_IN, WRITE_OUT, FrontEnd, Gone
from hostile.process import CORE, Perf, Serve, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serve]:
    with Serve(tmp_path) as there:
        yield there


def file_disk(server: Serve, name: str = "f0") -> Path:
    image = server.folder / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    server.rpc("bdev_aio_create", name=name, filename=str(image), block_size=512)
    return server.export(name, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_with_io_in_flight_ends_the_server_in_order(server: Serve, number: signal.Signals) -> None:
    path = file_disk(server)
    server.malloc("m0")
    with FrontEnd(server.export("m0", "m0")).ready() as idle, FrontEnd(path).ready() as busy:
        (queue,) = busy.queues
        busy.request(queue, WRITE_OUT, 0, 4096)
        for slot in range(1, 16):
            busy.request(queue, WRITE_OUT, 8 * slot, 4096, head=3 * slot, at=DATA_AT + 0x2000 * slot)
        busy.offer(queue, *range(0, 48, 3))
        begin = time.monotonic()
        assert server.end(number) == 0, server.log()
        assert time.monotonic() - begin < 10
        # Whatever had been taken was answered before the connection was closed.
        assert busy.closed()
        assert idle.closed()
        used = busy.used_index(queue)
        assert used <= 16
        for slot in range(used):
            head = int.from_bytes(busy.memory[queue.used + 4 + 8 * slot :][:4], "little")
            assert busy.memory[DATA_AT + 0x2000 * (head // 3) + 16] == 0
    assert not server.socket.exists()
    assert not path.exists()
    assert not (server.folder / "m0").exists()
    assert sorted(file.name for file in server.folder.iterdir()) == ["f0.img", "q.log"]
    assert not server.lines("ERROR|Traceback"), server.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_load_sees_the_end_of_its_server_and_ends_by_name(server: Serve, number: signal.Signals) -> None:
    path = file_disk(server)
    perf = Perf(f"vhost:{path}", "--time", "30", "--depth", "8", "--pattern", "randrw")
    until(lambda: server.rpc("bdev_get_iostat", names=["f0"])["bdevs"][0]["num_read_ops"] > 100, "the load")
    assert server.end(number) == 0, server.log()
    out, err = perf.process.communicate(timeout=20)
    assert perf.process.returncode in (0, 1), (out, err)
    assert b"Traceback" not in err, err.decode()


SLOW = """
import asyncio, os, sys
import qpair

class Slow(qpair.Bdev):
    async def write(self, requests):
        await asyncio.sleep(3600)

async def main():
    async with qpair.Stack(cores=CORE, pin=False, vhost_dir=sys.argv[1], stop_deadline_ms=4000) as stack:
        await stack.add(Slow("slow", "1MiB"))
        await stack.export("slow", "slow")
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await asyncio.sleep(0.5)
    left = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
    print([name for name in left if name not in ("python", "python3") and not name.startswith("asyncio")], flush=True)

asyncio.run(main())
"""


def test_a_python_bdev_that_never_answers_does_not_keep_the_stack_from_ending(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW.replace("CORE", str(CORE)), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with FrontEnd(tmp_path / "slow").ready() as front_end:
            (queue,) = front_end.queues
            front_end.request(queue, WRITE_OUT, 0, 512)
            front_end.offer(queue, 0)
            time.sleep(0.3)
            begin = time.monotonic()
            process.stdin.write("\n")
            process.stdin.flush()
            assert front_end.closed()
            out, err = process.communicate(timeout=30)
            assert time.monotonic() - begin < 15, err
        assert process.returncode == 0, err
        assert out == "[]\n", "threads of the engine are left"
        assert not (tmp_path / "slow").exists()


def test_a_second_signal_ends_a_server_that_still_stops(server: Serve) -> None:
    """Nothing is in flight, so the second one may come while it stops or be the one too many: either way it ends, and nothing is left."""
    file_disk(server)
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) in (0, 128 + signal.SIGTERM)
    assert not server.socket.exists()


def test_the_next_server_takes_the_sockets_that_a_killed_one_left(server: Serve) -> None:
    path = file_disk(server)
    server.end(signal.SIGKILL)
    assert server.socket.exists()
    assert path.exists()
    with Serve(server.folder) as successor:
        path = successor.export("f0", (successor.rpc("bdev_null_create", name="f0", num_blocks=2048, block_size=512)))
        with FrontEnd(path).ready() as front_end:
            assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
        assert successor.end() == 0


def memfds(server: Serve) -> int:
    """How many of its mappings are of memory files, as a client's are."""
    return Path(f"/proc/{server.pid}/maps").read_text().count("memfd:")


def own_threads(server: Serve) -> int:
    """Threads that the server started. The kernel's workers for its io_uring are listed beside them, and come and go as the kernel likes."""
    names = []
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended as we looked
            names.append((task / "comm").read_text())
    return sum(not name.startswith("iou-") for name in names)


def test_a_killed_client_is_forgotten_and_the_next_attaches_at_once(server: Serve) -> None:
    path = file_disk(server)
    perf = Perf(f"vhost:{path}", "--time", "1", "--depth", "8")  # what stays after a first client is no leak
    assert perf.result()["errors"] == 0
    until(lambda: server.rpc("vhost_get_controllers")[0]["sessions"] == [], "the first client's end")
    quiet = memfds(server)
    fds, mappings, threads = len(server.fds()), server.mappings(), own_threads(server)
    for _ in range(5):
        perf = Perf(f"vhost:{path}", "--time", "30", "--depth", "32", "--pattern", "randwrite")
        until(lambda: any(session["inflight_task_cnt"] for session in server.rpc("vhost_get_controllers")[0]["sessions"]), "I/O in flight")
        assert memfds(server) > quiet, "the client's memory is mapped"
        perf.process.kill()
        perf.process.communicate()
        begin = time.monotonic()
        with FrontEnd(path).ready() as front_end:
            assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
        assert time.monotonic() - begin < 5
    until(lambda: server.rpc("vhost_get_controllers")[0]["sessions"] == [], "the last session's end")
    until(lambda: len(server.fds()) <= fds, f"descriptors back to {fds}: {server.fds()}")
    assert memfds(server) == quiet
    assert server.mappings() <= mappings + 8
    assert own_threads(server) <= threads
    assert server.end() == 0


@pytest.mark.parametrize("abrupt", [False, True])
def test_200_comings_and_goings_leak_nothing(server: Serve, abrupt: bool) -> None:
    server.malloc("m0")
    path = server.export("m0", "m0")

    def round_trip() -> None:
        with FrontEnd(path).ready(queues=4) as front_end:
            (queue, *_) = front_end.queues
            assert front_end.io(queue, WRITE_OUT, 0, b"x" * 4096)[0] == 0
            if abrupt:  # requests that nobody waits for
                front_end.request(queue, READ_IN, 0, 4096, head=3)
                front_end.offer(queue, 3)

    for _ in range(20):
        round_trip()
    until(lambda: server.rpc("vhost_get_controllers")[0]["sessions"] == [], "the last session's end")
    fds, mappings, rss = len(server.fds()), server.mappings(), server.rss_bytes()
    for _ in range(200):
        round_trip()
    until(lambda: server.rpc("vhost_get_controllers")[0]["sessions"] == [], "the last session's end")
    until(lambda: len(server.fds()) <= fds, f"descriptors back to {fds}: {server.fds()}")
    assert server.mappings() <= mappings + 4
    assert server.guest_mappings() == []
    assert server.rss_bytes() <= rss + (4 << 20), f"{(server.rss_bytes() - rss) >> 10} KiB more than before"
    assert server.end() == 0


def test_200_controllers_and_bdevs_made_and_deleted_leak_nothing(server: Serve) -> None:
    def round_trip() -> None:
        server.malloc("m0", 1)
        with FrontEnd(server.export("c0", "m0")).ready() as front_end:
            assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
        until(lambda: server.rpc("vhost_get_controllers")[0]["sessions"] == [], "the session's end")
        server.rpc("vhost_delete_controller", ctrlr="c0")
        server.rpc("bdev_malloc_delete", name="m0")

    for _ in range(20):
        round_trip()
    fds, mappings, rss = len(server.fds()), server.mappings(), server.rss_bytes()
    for _ in range(200):
        round_trip()
    until(lambda: len(server.fds()) <= fds, f"descriptors back to {fds}: {server.fds()}")
    assert server.mappings() <= mappings + 4
    assert server.rss_bytes() <= rss + (6 << 20), f"{(server.rss_bytes() - rss) >> 10} KiB more than before"
    assert server.end() == 0


def test_a_second_front_end_is_refused_and_the_first_goes_on(server: Serve) -> None:
    server.malloc("m0")
    path = server.export("m0", "m0")
    with FrontEnd(path).ready() as first:
        with FrontEnd(path) as second, pytest.raises((Gone, AssertionError)):
            second.agree()
        assert first.io(first.queues[0], READ_IN, 0, 512)[0] == 0
