"""Delay: reads and writes that come back late, by spdk-rpc."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from qpair.bdev.derive import delay_uuid
from vbdevs import Spdk, bdev_calls, reloaded

BASE = "c2f2f5e1-0c43-4a39-b1c5-6d38a0b9e0d2"
MS = 1000


async def made(spdk: Spdk, read_us: int, write_us: int) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "-u", BASE, "4", "512")
    latencies = ["-r", str(read_us), "-t", str(read_us), "-w", str(write_us), "-n", str(write_us)]
    assert await spdk("bdev_delay_create", "-b", "disk", "-d", "slow", *latencies) == "slow"


async def seconds(action: Any) -> float:
    begun = time.monotonic()
    await action
    return time.monotonic() - begun


async def test_reads_and_writes_take_as_long_as_was_said(spdk: Spdk, stack: Any) -> None:
    await made(spdk, 200 * MS, 300 * MS)
    async with await stack.bdevs.handle("slow").open() as disk:
        assert await seconds(disk.write(0, b"x" * 512)) >= 0.3
        assert await seconds(disk.read(0, 512)) >= 0.2
        assert await seconds(asyncio.gather(*(disk.read(at * 512, 512) for at in range(32)))) < 32 * 0.2, "they are held side by side"
        assert await seconds(disk.unmap(512, 512)) < 0.2
    assert await stack.bdevs.handle("disk").read(0, 512) == b"x" * 512


async def test_it_shows_itself_as_spdks(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "-u", BASE, "4", "512")
    await spdk("bdev_delay_create", "-b", "disk", "-d", "slow", "-r", "1", "-t", "2", "-w", "3", "-n", "4")
    (slow,) = await spdk("bdev_get_bdevs", "-b", "slow")
    assert slow["product_name"] == "delay"
    assert slow["uuid"] == delay_uuid(BASE)
    assert list(slow["driver_specific"]["delay"].items()) == [
        ("name", "slow"),
        ("base_bdev_name", "disk"),
        ("uuid", delay_uuid(BASE)),
        ("avg_read_latency", 1),
        ("p99_read_latency", 2),
        ("avg_write_latency", 3),
        ("p99_write_latency", 4),
    ]


async def test_a_latency_is_changed_while_it_is_used(spdk: Spdk, stack: Any) -> None:
    await made(spdk, 0, 0)
    async with await stack.bdevs.handle("slow").open() as disk:
        assert await seconds(disk.read(0, 512)) < 0.3
        for kind in ("avg_read", "p99_read"):
            await spdk("bdev_delay_update_latency", "slow", kind, str(400 * MS))
        assert await seconds(disk.read(0, 512)) >= 0.4
    (slow,) = await spdk("bdev_get_bdevs", "-b", "slow")
    assert slow["driver_specific"]["delay"]["avg_read_latency"] == 400 * MS


async def test_refusals_are_worded_as_spdks(spdk: Spdk) -> None:
    await made(spdk, 1, 1)
    latencies = ["-r", "2", "-t", "1", "-w", "1", "-n", "1"]
    assert await spdk.refusal("bdev_delay_create", "-b", "disk", "-d", "other", *latencies) == (-22, "Invalid argument")
    assert await spdk.refusal("bdev_delay_create", "-b", "disk", "-d", "slow", *["-r", "1", "-t", "1", "-w", "1", "-n", "1"]) == (
        -17,
        "File exists",
    )
    gone = (-32602, "The requested bdev does not exist.")
    assert await spdk.refusal("bdev_delay_update_latency", "disk", "avg_read", "5") == gone
    assert await spdk.refusal("bdev_delay_update_latency", "nothing", "avg_read", "5") == gone
    assert await spdk.refusal("bdev_delay_delete", "disk") == (-19, "No such device")


async def test_what_is_held_for_ever_ends_when_the_bdev_goes(spdk: Spdk, stack: Any) -> None:
    await made(spdk, 2**63, 2**63)
    async with await stack.bdevs.handle("slow").open() as disk:
        held = asyncio.ensure_future(disk.read(0, 512))
        await asyncio.sleep(0.05)
        assert not held.done()
        await stack.bdevs.delete("disk", deadline_ms=50)
        (outcome,) = await asyncio.gather(held, return_exceptions=True)
        assert isinstance(outcome, Exception)
    assert await spdk("bdev_get_bdevs") == []


async def test_a_base_may_come_later_go_and_come_back(spdk: Spdk) -> None:
    await spdk("bdev_delay_create", "-b", "late", "-d", "slow", "-r", "1", "-t", "1", "-w", "1", "-n", "1")
    for _ in range(2):
        await spdk("bdev_malloc_create", "-b", "late", "4", "512")
        await spdk("bdev_wait_for_examine")
        assert [disk["name"] for disk in await spdk("bdev_get_bdevs")] == ["late", "slow"]
        await spdk("bdev_delay_update_latency", "slow", "p99_write", "9")
        await spdk("bdev_malloc_delete", "late")
        assert await spdk("bdev_get_bdevs") == []
    await spdk("bdev_delay_delete", "slow")
    await spdk("bdev_malloc_create", "-b", "late", "4", "512")
    await spdk("bdev_wait_for_examine")
    assert [disk["name"] for disk in await spdk("bdev_get_bdevs")] == ["late"]


async def test_it_is_saved_as_it_is_now(spdk: Spdk, make_stack: Any, tmp_path: Path) -> None:
    await made(spdk, 11, 12)
    await spdk("bdev_delay_update_latency", "slow", "p99_write", "99")
    before = await spdk("bdev_get_bdevs")
    async with reloaded(spdk, make_stack, str(tmp_path / "second.sock")) as (config, _, other):
        (call,) = [call for call in bdev_calls(config) if call["method"] == "bdev_delay_create"]
        assert call["params"]["p99_write_latency"] == 99
        assert await other("bdev_get_bdevs") == before
