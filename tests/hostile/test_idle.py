"""What nothing costs."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from hostile.front_end import READ_IN, FrontEnd
from hostile.process import CORE, Perf, Serve

DISKS, ATTACHED, SECONDS = 64, 16, 5


@pytest.mark.parametrize("driver", ["io_uring", "epoll"])
def test_64_exported_disks_with_16_idle_front_ends_cost_next_to_nothing(tmp_path: Path, driver: str) -> None:
    with Serve(tmp_path, "--driver", driver) as server:
        paths = []
        for number in range(DISKS):
            server.rpc("bdev_null_create", name=f"d{number}", num_blocks=2048, block_size=512)
            paths.append(server.export(f"c{number}", f"d{number}"))
        front_ends = [FrontEnd(path).ready(queues=2) for path in paths[:ATTACHED]]
        try:
            for front_end in front_ends:
                assert front_end.io(front_end.queues[1], READ_IN, 0, 512)[0] == 0
            time.sleep(0.5)
            before = server.cpu_s()
            time.sleep(SECONDS)
            spent = server.cpu_s() - before
            assert spent / SECONDS < 0.05, f"{spent:.2f} s of CPU in {SECONDS} s of nothing"
            assert server.rss_bytes() < 80 << 20, f"{server.rss_bytes() >> 20} MiB"
            # Asleep, a kick wakes it.
            for front_end in front_ends:
                assert front_end.io(front_end.queues[0], READ_IN, 0, 512, timeout_s=5)[0] == 0
        finally:
            for front_end in front_ends:
                front_end.close()
        assert server.end() == 0


def test_front_ends_that_kick_without_a_request_cost_only_while_they_kick(tmp_path: Path) -> None:
    with Serve(tmp_path) as server:
        server.malloc("m0")
        with FrontEnd(server.export("m0", "m0")).ready() as front_end:
            (queue,) = front_end.queues
            os.set_blocking(queue.kick, False)
            try:
                os.eventfd_write(queue.kick, 0xFFFF_FFFF_FFFF_FFFE)  # readable for ever: nobody reads it
            except BlockingIOError:
                front_end.kick(queue)
            time.sleep(0.5)
            before = server.cpu_s()
            time.sleep(2)
            assert (server.cpu_s() - before) / 2 < 0.05
        assert server.end() == 0


async def test_an_idle_initiator_costs_next_to_nothing(tmp_path: Path) -> None:
    from qpair import Stack

    with Serve(tmp_path) as server:
        server.malloc("m0")
        path = server.export("m0", "m0")
        async with Stack(cores=CORE, pin=False) as stack:
            await stack.rpc("bdev_virtio_attach_controller", name="v", trtype="user", traddr=str(path), dev_type="blk")
            assert (await stack.measure("v", seconds=0.2, depth=4)).errors == 0
            await asyncio.sleep(0.5)
            before = server.cpu_s() + time.process_time()
            await asyncio.sleep(3)
            spent = server.cpu_s() + time.process_time() - before
            assert spent / 3 < 0.08, f"{spent:.2f} s of CPU of both in 3 s of nothing"
        assert server.end() == 0


def test_a_load_that_has_ended_costs_nothing(tmp_path: Path) -> None:
    with Serve(tmp_path) as server:
        server.malloc("m0")
        path = server.export("m0", "m0")
        assert Perf(f"vhost:{path}", "--time", "0.5", "--depth", "4").result()["errors"] == 0
        time.sleep(0.5)
        before = server.cpu_s()
        time.sleep(2)
        assert (server.cpu_s() - before) / 2 < 0.05
        assert server.end() == 0
