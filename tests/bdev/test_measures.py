"""Limits, groups, histograms, statistics by channel, queue depth and time-outs: what they do to I/O, and what the methods answer."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Sequence
from typing import Any

import pytest

from qpair import Bdev, Request
from qpair.bdev.events import Throttled
from qpair.bdev.measures import Histogram, HistogramDisabled, Limits
from qpair.errors import AlreadyExists, Busy, InvalidArgument, InvalidParameters, NoSpace, NoSuchBdev, NoSuchFile, QpairError

NONE = {"rw_ios_per_sec": 0, "rw_mbytes_per_sec": 0, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 0}


@pytest.fixture(autouse=True)
def no_examining(request: pytest.FixtureRequest) -> None:
    if "stack" in request.fixturenames:
        # Modules that know bdevs by their content would read each that appears, and so count.
        request.getfixturevalue("stack").bdevs.examiner.auto = False


async def assigned(stack: Any, name: str) -> dict[str, int]:
    (disk,) = await stack.rpc("bdev_get_bdevs", name=name)
    found: dict[str, int] = disk["assigned_rate_limits"]
    return found


# -- limits -----------------------------------------------------------------------------------------


async def test_limits_are_rounded_and_shown_as_spdk_does(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    assert await stack.rpc("bdev_set_qos_limit", name="m0", rw_ios_per_sec=20_001, r_mbytes_per_sec=7) is True
    assert await assigned(stack, "m0") == {**NONE, "rw_ios_per_sec": 21_000, "r_mbytes_per_sec": 7}
    await stack.rpc("bdev_set_qos_limit", name="m0", rw_ios_per_sec=0, w_mbytes_per_sec=3)
    assert await assigned(stack, "m0") == {**NONE, "r_mbytes_per_sec": 7, "w_mbytes_per_sec": 3}
    await stack.rpc("bdev_set_qos_limit", name="m0", r_mbytes_per_sec=0, w_mbytes_per_sec=2**64 - 1, rw_mbytes_per_sec=2**63)
    assert await assigned(stack, "m0") == {**NONE, "rw_mbytes_per_sec": (2**64 - 1) // 2**20, "w_mbytes_per_sec": 3}
    assert stack.bdevs.measures.limits("m0").w_bytes == 3 << 20


async def test_a_limit_of_nothing_is_refused_as_spdk_does(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    with pytest.raises(InvalidArgument, match="no rate limits specified") as refused:
        await stack.rpc("bdev_set_qos_limit", name="m0")
    assert (refused.value.code, refused.value.text) == (-22, "No rate limits specified")
    with pytest.raises(NoSuchBdev):
        await stack.rpc("bdev_set_qos_limit", name="m1", rw_ios_per_sec=1000)


async def test_io_keeps_its_rate_and_the_first_to_wait_is_news(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    events = stack.events()
    await stack.rpc("bdev_set_qos_limit", name="m0", rw_ios_per_sec=20_000)
    result = await stack.measure("m0", depth=32, seconds=1.0)
    assert 18_000 <= result.iops <= 20_800, "this machine may be late; the simulator holds it to the slice"
    assert (await anext(events)) == Throttled(
        bdev="m0", limit="rw_ios_per_sec", value=20_000, id=1, time=pytest.approx(time.time(), abs=60)
    )
    notifications = await stack.rpc("notify_get_notifications", id=1)
    details = {"limit": "rw_ios_per_sec", "value": 20_000}
    assert notifications == [{"type": "qpair_bdev_throttled", "ctx": "m0", "id": 1, "qpair": details}]


async def test_a_limit_changes_and_goes_under_load(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    await stack.bdevs.measures.set_limits("m0", w_bytes="2MiB")
    run = await stack.perf("m0", pattern="randwrite", depth=16, io_size=4096, seconds=1.5)
    await asyncio.sleep(0.5)
    slow = run.snapshot().ios
    assert 230 <= slow <= 300, "512 a second"
    await stack.bdevs.measures.set_limits("m0", w_bytes=0)
    assert (await run.result()).ios > 10_000
    assert stack.bdevs.measures.limits("m0") == Limits()


async def test_bdevs_of_a_group_share_its_limit(stack: Any) -> None:
    for name in ("a", "b", "c"):
        await stack.malloc(name, "1MiB")
    assert await stack.rpc("qpair_bdev_qos_group_create", name="gold", rw_ios_per_sec=4000) is True
    for name in ("a", "b"):
        assert await stack.rpc("qpair_bdev_qos_group_add_bdev", name="gold", bdev_name=name) is True
    results = await asyncio.gather(*(stack.measure(name, depth=8, seconds=1.0) for name in ("a", "b")))
    ios = [result.iops for result in results]
    assert 3600 <= sum(ios) <= 4200
    assert min(ios) >= 1500, f"{ios}: neither starves"
    assert await stack.rpc("qpair_bdev_qos_get_groups") == [
        {"name": "gold", "rw_ios_per_sec": 4000, "rw_bytes_per_sec": 0, "r_bytes_per_sec": 0, "w_bytes_per_sec": 0, "bdevs": ["a", "b"]}
    ]
    assert await assigned(stack, "a") == NONE, "that is the bdev's own"
    await stack.rpc("qpair_bdev_qos_group_set_limits", name="gold", rw_ios_per_sec=0)
    assert (await stack.measure("a", depth=8, seconds=0.2)).iops > 10_000
    await stack.rpc("qpair_bdev_qos_group_remove_bdev", name="gold", bdev_name="b")
    await stack.bdevs.delete("a")
    assert [group.bdevs for group in stack.bdevs.measures.groups()] == [()]
    await stack.rpc("qpair_bdev_qos_group_delete", name="gold")
    assert stack.bdevs.measures.groups() == []


async def test_groups_that_make_no_sense_are_refused(stack: Any) -> None:
    await stack.malloc("a", "1MiB")
    measures = stack.bdevs.measures
    await measures.create_group("gold", rw_bytes="10MiB")
    await measures.create_group("silver")
    await measures.add_to_group("gold", "a")
    with pytest.raises(AlreadyExists, match="QoS group gold"):
        await measures.create_group("gold")
    with pytest.raises(Busy, match="bdev a is claimed by QoS group gold"):
        await measures.add_to_group("silver", "a")
    with pytest.raises(NoSuchFile, match="QoS group bronze") as missing:
        await measures.set_group("bronze", rw_ios=5)
    assert missing.value.code == -2
    with pytest.raises(NoSuchFile):
        await measures.delete_group("bronze")
    with pytest.raises(InvalidArgument, match="name a: a bdev of QoS group silver"):
        await measures.remove_from_group("silver", "a")
    with pytest.raises(InvalidArgument, match="1 to 255 bytes"):
        await measures.create_group("")
    with pytest.raises(InvalidArgument, match="rw_ios_per_sec -1: 0 to"):
        await measures.set_limits("a", rw_ios=-1)


async def test_what_was_set_is_in_the_saved_configuration(stack: Any, make_stack: Any) -> None:
    for name in ("a", "b", "c"):
        await stack.malloc(name, "1MiB")
    await stack.rpc("bdev_set_qos_limit", name="a", rw_ios_per_sec=2000, w_mbytes_per_sec=9)
    await stack.bdevs.measures.set_limits("b", rw_ios=150, r_bytes=1_000_000)
    await stack.rpc("bdev_enable_histogram", name="c", enable=True, opc="read", granularity=5)
    await stack.bdevs.measures.create_group("gold", rw_bytes="10MiB")
    await stack.bdevs.measures.add_to_group("gold", "b")
    entries = await stack.rpc("framework_get_config", name="bdev")
    assert [entry for entry in entries if "_create" not in entry["method"] or "group" in entry["method"]] == [
        {"method": "bdev_wait_for_examine"},
        {"method": "bdev_set_qos_limit", "params": {"name": "a", "rw_ios_per_sec": 2000, "w_mbytes_per_sec": 9}},
        {"method": "qpair_bdev_set_limits", "params": {"name": "b", "rw_ios_per_sec": 150, "r_bytes_per_sec": 1_000_000}},
        {
            "method": "bdev_enable_histogram",
            "params": {"name": "c", "enable": True, "opc": "read", "granularity": 5, "min_nsec": 1000, "max_nsec": 120_000_000_000},
        },
        {"method": "qpair_bdev_qos_group_create", "params": {"name": "gold", "rw_bytes_per_sec": 10 << 20}},
        {"method": "qpair_bdev_qos_group_add_bdev", "params": {"name": "gold", "bdev_name": "b"}},
    ]
    async with make_stack() as other:
        for entry in entries:
            await other.rpc(entry["method"], **entry.get("params", {}))
        assert await other.rpc("framework_get_config", name="bdev") == entries


# -- histograms -------------------------------------------------------------------------------------


def ends(answer: dict[str, Any]) -> list[tuple[int, int]]:
    """Buckets that are not empty, as SPDK's reader has them: (the first value past it in ticks, count)."""
    raw, granularity, low = base64.b64decode(answer["histogram"]), answer["granularity"], answer["min_range"]
    assert len(raw) == 8 * (answer["max_range"] - low + 1) << granularity
    found = []
    for place in range(len(raw) // 8):
        count = int.from_bytes(raw[8 * place : 8 * place + 8], "little")
        power, within = low + (place >> granularity), place % (1 << granularity)
        end = (1 << (power + granularity - 1)) + ((within + 1) << (power - 1)) if power else within + 1
        if count:
            found.append((end, count))
    return found


class Slow(Bdev):
    """Answers reads after 20 ms."""

    async def read(self, requests: Sequence[Request]) -> None:  # type: ignore[override]
        await asyncio.sleep(0.02)

    def write(self, requests: Sequence[Request]) -> None:
        pass


async def test_a_histogram_counts_what_was_asked_for(stack: Any) -> None:
    await stack.add(Slow("slow", "1MiB"))
    disk = stack.bdevs.handle("slow")
    assert await stack.rpc("bdev_enable_histogram", name="slow", enable=True, opc="read") is True
    await asyncio.gather(*(disk.read(0, 512) for _ in range(8)))
    await disk.write(0, bytes(512))
    answer = await stack.rpc("bdev_get_histogram", name="slow")
    assert (answer["granularity"], answer["min_range"], answer["max_range"], answer["tsc_rate"]) == (7, 3, 30, 1_000_000_000)
    assert list(answer) == ["histogram", "granularity", "min_range", "max_range", "tsc_rate"]
    found = ends(answer)
    assert sum(count for _, count in found) == 8
    assert all(20_000_000 <= end <= 2_000_000_000 for end, _ in found)
    decoded = Histogram.from_rpc(answer)
    assert [(end, count) for _, end, count in decoded if count] == found
    assert decoded.percentile(100) == found[-1][0]
    assert decoded.percentile(1) == found[0][0]
    borders = await stack.rpc("bdev_get_histogram_borders", name="slow", borders=[10_000, 10_000_000])
    assert borders == {"borders_count": [0, 8, 8]}


async def test_a_histogram_outlives_channels_and_begins_anew(stack: Any) -> None:
    disk = await stack.malloc("m0", "1MiB")
    measures = stack.bdevs.measures
    await measures.enable_histogram("m0", min_ns=0)
    for _ in range(3):
        await disk.write(0, bytes(512))  # opens and closes
    assert (await measures.histogram("m0")).total == 3
    await measures.enable_histogram("m0")
    assert (await measures.histogram("m0")).total == 0
    await measures.enable_histogram("m0", False)
    with pytest.raises(HistogramDisabled) as disabled:
        await stack.rpc("bdev_get_histogram", name="m0")
    assert (disabled.value.code, disabled.value.text) == (-32603, "Bad address")


async def test_histograms_that_make_no_sense_are_refused(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    with pytest.raises(InvalidParameters, match="'opc': 'reed'"):
        await stack.rpc("bdev_enable_histogram", name="m0", enable=True, opc="reed")
    with pytest.raises(InvalidArgument, match="granularity 15: 1 to 14"):
        await stack.rpc("bdev_enable_histogram", name="m0", enable=True, granularity=15)
    with pytest.raises(InvalidArgument, match="min_nsec 9: less than max_nsec 9"):
        await stack.rpc("bdev_enable_histogram", name="m0", enable=True, min_nsec=9, max_nsec=9)
    with pytest.raises(InvalidParameters, match="'borders': not ascending"):
        await stack.rpc("bdev_get_histogram_borders", name="m0", borders=[2, 1])


def test_percentiles_and_borders_of_known_counts() -> None:
    histogram = Histogram(granularity=2, min_range=0, max_range=2, counts=(1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1))
    assert [(start, end) for start, end, count in histogram if count] == [(0, 1), (5, 6), (14, 16)]
    assert [histogram.percentile(percent) for percent in (0, 25, 50, 75, 76, 100)] == [1, 1, 6, 6, 16, 16]
    assert histogram.cumulated([0, 5, 100]) == [1, 3, 4, 4]
    assert Histogram(granularity=2, min_range=0, max_range=0, counts=(0,) * 4).percentile(50) == 0
    with pytest.raises(InvalidArgument, match="percent 101: 0 to 100"):
        histogram.percentile(101)


# -- statistics -------------------------------------------------------------------------------------


async def test_iostat_has_spdks_members_in_spdks_order(stack: Any) -> None:
    disk = await stack.malloc("m0", "1MiB")
    await disk.write(0, bytes(1024))
    stat = (await stack.rpc("bdev_get_iostat", names=["m0"]))["bdevs"][0]
    kinds = [("read", "read"), ("write", "written"), ("unmap", "unmapped"), ("copy", "copied")]
    expected = ["name"]
    expected += [member for kind, done in kinds for member in (f"bytes_{done}", f"num_{kind}_ops")]
    expected += [f"{which}{kind}_latency_ticks" for kind, _ in kinds for which in ("", "max_", "min_")]
    assert list(stat) == [*expected, "io_error"]
    assert (stat["num_write_ops"], stat["bytes_written"], stat["io_error"]) == (1, 1024, {})


async def test_counters_of_each_channel_name_its_thread(make_stack: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    async with make_stack(cores=",".join(map(str, cores))) as stack:
        await stack.malloc("m0", "1MiB")
        run = await stack.perf("m0", depth=4, seconds=0.5)
        await asyncio.sleep(0.2)
        answer = await stack.rpc("bdev_get_iostat", names=["m0"], per_channel=True)
        threads = (await stack.rpc("thread_get_stats"))["threads"]
        await run.result()
        assert list(answer) == ["tick_rate", "ticks", "name", "channels"]
        assert answer["name"] == "m0"
        told = [(channel["thread_id"], channel["thread_name"]) for channel in answer["channels"]]
        assert told == [(thread["id"], thread["name"]) for thread in threads]
        assert all(channel["num_read_ops"] > 0 for channel in answer["channels"])
        with pytest.raises(InvalidArgument, match="needs 'names' with one bdev"):
            await stack.rpc("bdev_get_iostat", per_channel=True)


class Full(Slow):
    """And takes no writes."""

    def write(self, requests: Sequence[Request]) -> None:
        raise NoSpace("full")


async def test_each_reset_mode_resets_its_own(stack: Any) -> None:
    await stack.add(Full("slow", "1MiB"))
    disk = stack.bdevs.handle("slow")

    async def stat(**params: Any) -> dict[str, Any]:
        return dict((await stack.rpc("bdev_get_iostat", names=["slow"], **params))["bdevs"][0])

    async with await disk.open() as opened:
        await opened.read(0, 512)
        with pytest.raises(NoSpace):
            await opened.write(0, bytes(512))
        before = await stat(reset_mode="none")
        assert (before["num_read_ops"], before["io_error"]) == (1, {"failed": 1})
        assert before["max_read_latency_ticks"] == before["min_read_latency_ticks"] == before["read_latency_ticks"] >= 20_000_000
        assert await stat(reset_mode="maxmin") == before
        assert await stat(reset_mode="error") == {**before, "max_read_latency_ticks": 0, "min_read_latency_ticks": 0}
        assert (await stat())["io_error"] == {}
        assert await stack.rpc("bdev_reset_iostat", name="slow", mode="none") is True
        assert (await stat())["num_read_ops"] == 1
        await stack.rpc("bdev_reset_iostat", name="slow")
        after = await stat()
        assert not any(value for name, value in after.items() if name != "name")


async def test_queue_depth_is_looked_at_from_time_to_time(stack: Any) -> None:
    await stack.add(Slow("slow", "1MiB"))
    disk = stack.bdevs.handle("slow")
    await stack.rpc("bdev_set_qd_sampling_period", name="slow", period=1000)
    async with await disk.open() as opened:
        for _ in range(10):
            await asyncio.gather(*(opened.read(0, 512) for _ in range(4)))
        stat = (await stack.rpc("bdev_get_iostat", names=["slow"]))["bdevs"][0]
    assert list(stat)[-4:] == ["queue_depth_polling_period", "queue_depth", "io_time", "weighted_io_time"]
    assert stat["queue_depth_polling_period"] == 1000
    assert 100_000 <= stat["io_time"] <= 10_000_000, "ten times 20 ms with I/O under way"
    assert 2 * stat["io_time"] <= stat["weighted_io_time"] <= 4 * stat["io_time"]
    await stack.rpc("bdev_set_qd_sampling_period", name="slow", period=0)
    assert "queue_depth" not in (await stack.rpc("bdev_get_iostat", names=["slow"]))["bdevs"][0]


# -- time-outs --------------------------------------------------------------------------------------


class Stuck(Bdev):
    """Answers no read until told."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "1MiB")
        self.go = asyncio.Event()

    async def read(self, requests: Sequence[Request]) -> None:  # type: ignore[override]
        await self.go.wait()

    def write(self, requests: Sequence[Request]) -> None:
        pass


async def test_a_late_io_is_told_to_its_descriptor_and_to_no_other(stack: Any) -> None:
    bdev = Stuck("stuck")
    await stack.add(bdev)
    disk = stack.bdevs.handle("stuck")
    async with await disk.open() as mine, await disk.open() as other:
        seen: list[Any] = []
        mine.set_timeout(0.05, seen.append)
        other.set_timeout(0.05, lambda late: pytest.fail(f"told of {late}"))
        reading = asyncio.ensure_future(mine.read(4096, 1024))
        await asyncio.sleep(0.2)
        assert len(seen) >= 2, "again for each further time-out"
        assert (seen[0].op, seen[0].offset, seen[0].length) == ("read", 4096, 1024)
        assert 0.05 <= seen[0].age < seen[1].age
        assert not reading.done(), "nothing happens to it"
        mine.set_timeout(0, None)
        told = len(seen)
        await asyncio.sleep(0.1)
        assert len(seen) == told
        bdev.go.set()
        assert await reading == bytes(1024)


async def test_a_late_io_that_waits_for_its_limit_can_be_aborted(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    disk = stack.bdevs.handle("m0")
    await stack.bdevs.measures.set_limits("m0", rw_bytes=65536)
    async with await disk.open() as opened:
        opened.set_timeout(0.05, lambda late: late.abort())
        await opened.write(0, bytes(1 << 20))  # owes 16 seconds
        start = time.monotonic()
        with pytest.raises(QpairError):
            await opened.read(0, 512)
        assert time.monotonic() - start < 8


async def test_a_timeout_that_makes_no_sense_is_refused(stack: Any) -> None:
    disk = await stack.malloc("m0", "1MiB")
    async with await disk.open() as opened:
        with pytest.raises(InvalidArgument, match="timeout -1 s: 0 to 604800, with a callback"):
            opened.set_timeout(-1, print)
        with pytest.raises(InvalidArgument, match="with a callback"):
            opened.set_timeout(1, None)
