"""Bdevs that go or change their size, and controllers that are deleted, while a load is on them."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.front_end import READ_IN, SET_VRING_KICK, FrontEnd
from hostile.process import Perf, RpcFailed, Serve, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serve]:
    with Serve(tmp_path) as there:
        yield there
        assert there.end() == 0, there.log()
        assert not there.lines("Traceback"), there.log()


def under_load(server: Serve, path: Path, bdev: str) -> Perf:
    perf = Perf(f"vhost:{path}", "--time", "30", "--depth", "16", "--pattern", "randread")
    until(lambda: server.rpc("bdev_get_iostat", names=[bdev])["bdevs"][0]["num_read_ops"] > 100, "the load")
    return perf


@pytest.mark.parametrize("kind", ["malloc", "aio", "null"])
def test_a_bdev_removed_under_vhost_load_answers_with_errors_and_is_gone(server: Serve, kind: str) -> None:
    if kind == "malloc":
        server.malloc("d")
    elif kind == "null":
        server.rpc("bdev_null_create", name="d", num_blocks=8192, block_size=512)
    else:
        with (server.folder / "image").open("wb") as file:
            file.truncate(4 << 20)
        server.rpc("bdev_aio_create", name="d", filename=str(server.folder / "image"), block_size=512)
    path = server.export("c", "d")
    perf = under_load(server, path, "d")
    begin = time.monotonic()
    server.rpc(f"bdev_{kind}_delete", name="d")
    assert time.monotonic() - begin < 10
    assert server.rpc("bdev_get_bdevs") == []
    perf.process.terminate()
    _, err = perf.process.communicate(timeout=20)
    assert b"Traceback" not in err, err.decode()
    # The controller is there without a bdev: it fails every request, and can be deleted.
    until(lambda: server.rpc("vhost_get_controllers")[0]["sessions"] == [], "the load's session ends")
    server.rpc("vhost_delete_controller", ctrlr="c")


def test_a_front_end_whose_bdev_is_removed_gets_errors_and_goes_on_asking(server: Serve) -> None:
    server.malloc("d")
    with FrontEnd(server.export("c", "d")).ready() as front_end:
        (queue,) = front_end.queues
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        server.rpc("bdev_malloc_delete", name="d")
        for _ in range(10):
            assert front_end.io(queue, READ_IN, 0, 512)[0] == 1
        # A ring that is started anew has no bdev to open: refused, and nothing breaks.
        assert front_end.order(SET_VRING_KICK, struct.pack("<Q", 0), [queue.kick]) in (0, 19)
        server.malloc("d")
    server.rpc("vhost_delete_controller", ctrlr="c")


def test_a_controller_with_a_live_session_is_busy(server: Serve) -> None:
    server.malloc("d")
    path = server.export("c", "d")
    with FrontEnd(path).ready() as front_end:
        with pytest.raises(RpcFailed) as refused:
            server.rpc("vhost_delete_controller", ctrlr="c")
        assert refused.value.code == -16
        assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
    server.rpc("vhost_delete_controller", ctrlr="c")  # the session that is leaving is waited for
    assert not path.exists()


def test_a_file_that_shrinks_under_its_bdev_gives_errors_or_zeros_and_nothing_else(server: Serve) -> None:
    image = server.folder / "image"
    image.write_bytes(b"z" * (1 << 20))
    server.rpc("bdev_aio_create", name="d", filename=str(image), block_size=512)
    with FrontEnd(server.export("c", "d")).ready() as front_end:
        (queue,) = front_end.queues
        assert front_end.io(queue, READ_IN, 1024, 512) == (0, b"z" * 512)
        os.truncate(image, 4096)
        status, data = front_end.io(queue, READ_IN, 1024, 512)
        assert status == 1 or data == bytes(512), "bytes from nowhere"
        assert front_end.io(queue, READ_IN, 0, 512) == (0, b"z" * 512)
    server.rpc("vhost_delete_controller", ctrlr="c")


async def test_resizing_under_a_load_gives_errors_past_the_end_only(make_stack: Callable[..., Any], tmp_path: Path) -> None:
    async with make_stack() as stack:
        await stack.null("d", "16MiB")
        await stack.export("d", "c")
        run = await stack.perf("d", seconds=3, depth=16, pattern="randread")
        sizes = [32, 1, 64, 2, 16] * 8
        for mebibytes in sizes:
            await stack.bdevs.resize("d", mebibytes << 20)
            assert stack.bdevs.info("d").num_blocks == mebibytes * 2048
            await asyncio.sleep(0.01)
        result = await run.result()
        assert result.ios > 1000
        assert (await stack.measure("d", seconds=0.3, depth=4)).errors == 0


async def test_a_bdev_removed_under_a_perf_load_ends_the_run_by_name(make_stack: Callable[..., Any]) -> None:
    async with make_stack() as stack:
        for round_number in range(20):
            await stack.malloc("d", "4MiB")
            run = await stack.perf("d", seconds=30, depth=32, pattern="randrw", verify=bool(round_number & 1))
            await asyncio.sleep(0.01)
            await stack.delete("d")
            result = await asyncio.wait_for(run.result(), 10)
            assert result.verify_errors == 0
            assert stack.engine.bdev_info() == []


async def test_claims_refuse_a_second_owner_by_name(make_stack: Callable[..., Any]) -> None:
    async with make_stack() as stack:
        await stack.malloc("d", "1MiB")
        stack.engine.bdev_claim("d", "one")
        with pytest.raises(OSError, match="one"):
            stack.engine.bdev_claim("d", "two")
        with pytest.raises(OSError, match="claimed by one"):
            stack.engine.bdev_release("d", "two")
        stack.engine.bdev_release("d", "one")
        stack.engine.bdev_claim("d", "two")
        await stack.delete("d")  # a claim keeps writers out, not the removal
