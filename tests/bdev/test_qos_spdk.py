"""Limits, histograms, counters and options by ``spdk-rpc``, unmodified, and its histograms read as SPDK's ``scripts/histogram.py`` reads them."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from qpair.bdev.measures import Histogram
from vbdevs import Spdk, bdev_calls, reloaded

NONE = {"rw_ios_per_sec": 0, "rw_mbytes_per_sec": 0, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 0}
MIB = 1 << 20


async def assigned(spdk: Spdk, name: str) -> Any:
    [disk] = await spdk("bdev_get_bdevs", "-b", name)
    return disk["assigned_rate_limits"]


async def iostat(spdk: Spdk, name: str, *words: str) -> dict[str, Any]:
    [found] = (await spdk("bdev_get_iostat", "--names", name, *words))["bdevs"]
    return dict(found)


# -- limits -----------------------------------------------------------------------------------------


async def test_limits_are_set_rounded_changed_and_taken_away(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "m0", "4", "512")
    assert await assigned(spdk, "m0") == NONE
    await spdk("bdev_set_qos_limit", "m0", "--rw-ios-per-sec", "1001", "--r-mbytes-per-sec", "5")
    assert await assigned(spdk, "m0") == {**NONE, "rw_ios_per_sec": 2000, "r_mbytes_per_sec": 5}
    await spdk("bdev_set_qos_limit", "m0", "--w-mbytes-per-sec", "3", "--rw-ios-per-sec", "0")
    assert await assigned(spdk, "m0") == {**NONE, "r_mbytes_per_sec": 5, "w_mbytes_per_sec": 3}
    await spdk("bdev_set_qos_limit", "m0", "--r-mbytes-per-sec", "0", "--w-mbytes-per-sec", "0")
    assert await assigned(spdk, "m0") == NONE


async def test_what_spdk_refuses_is_refused_alike(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "m0", "4", "512")
    assert await spdk.refusal("bdev_set_qos_limit", "m0") == (-22, "No rate limits specified")
    assert (await spdk.refusal("bdev_set_qos_limit", "m1", "--rw-ios-per-sec", "1000"))[0] == -19
    assert (await spdk.refusal("bdev_set_qos_limit", "m0", "--rw-ios-per-sec", "-1"))[0] == -32602


async def test_a_limit_holds_as_spdks_own_test_looks_at_it(spdk: Spdk, stack: Any) -> None:
    """Counters before and after a load of some seconds; SPDK allows 85 to 105 %."""
    stack.bdevs.examiner.auto = False
    await spdk("bdev_malloc_create", "-b", "m0", "64", "512")
    for words, limit, of in (
        (("--rw-ios-per-sec", "20000"), 20_000, "num_read_ops"),
        (("--rw-ios-per-sec", "0", "--rw-mbytes-per-sec", "12"), 12 * MIB, "bytes_read"),
        (("--rw-mbytes-per-sec", "23", "--r-mbytes-per-sec", "9"), 9 * MIB, "bytes_read"),
    ):
        await spdk("bdev_set_qos_limit", "m0", *words)
        before = await iostat(spdk, "m0")
        run = await stack.measure("m0", io_size=1024, depth=128, seconds=2.0)
        after = await iostat(spdk, "m0")
        found = (after[of] - before[of]) / run.elapsed_s
        assert 0.85 * limit < found < 1.05 * limit, (words, found)


async def test_limits_and_histograms_are_saved_and_loaded(spdk: Spdk, make_stack: Callable[..., Any], tmp_path: Any) -> None:
    await spdk("bdev_malloc_create", "-b", "m0", "4", "512")
    await spdk("bdev_set_qos_limit", "m0", "--rw-ios-per-sec", "7000", "--w-mbytes-per-sec", "2")
    await spdk("bdev_enable_histogram", "m0", "--histogram", "-o", "write", "--granularity", "6")
    async with reloaded(spdk, make_stack, str(tmp_path / "second.sock")) as (config, _, other):
        assert {"name": "m0", "rw_ios_per_sec": 7000, "w_mbytes_per_sec": 2} in [
            call["params"] for call in bdev_calls(config) if call["method"] == "bdev_set_qos_limit"
        ]
        assert await assigned(other, "m0") == {**NONE, "rw_ios_per_sec": 7000, "w_mbytes_per_sec": 2}
        assert (await other("bdev_get_histogram", "m0"))["granularity"] == 6


# -- histograms -------------------------------------------------------------------------------------


def as_the_script_reads(answer: Mapping[str, Any]) -> Iterator[tuple[int, int, float, float, int]]:
    """(range counted from the first, bucket, from and to in microseconds, count), by the arithmetic of SPDK's script: it knows neither the last range, nor where the first begins unless that is 0."""
    data, granularity, low, high = base64.b64decode(answer["histogram"]), answer["granularity"], answer["min_range"], answer["max_range"]
    border = 0
    for number in range(high - low):
        for bucket in range(1 << granularity):
            place = ((number << granularity) + bucket) * 8
            start = border
            doubled = number + low - 1
            border = (1 << (doubled + granularity)) + ((bucket + 1) << doubled) if number else (bucket + 1) << low
            microsecond = answer["tsc_rate"] / 1e6
            yield number, bucket, start / microsecond, border / microsecond, int.from_bytes(data[place : place + 8], "little")


async def test_spdks_script_reads_the_latencies_that_there_were(spdk: Spdk, stack: Any) -> None:
    stack.bdevs.examiner.auto = False
    await spdk("bdev_malloc_create", "-b", "m0", "4", "512")
    # Reads take 3 ms, writes 40 ms.
    await spdk("bdev_delay_create", "-b", "m0", "-d", "slow", "-r", "3000", "-t", "3000", "-w", "40000", "-n", "40000")
    await spdk("bdev_enable_histogram", "slow", "--histogram")
    disk, took = stack.bdevs.handle("slow"), {"read": 0.0, "write": 0.0}
    async with await disk.open() as opened:
        for kind in ("read", "write"):
            for _ in range(5):
                start = time.monotonic()
                await (opened.read(0, 512) if kind == "read" else opened.write(0, bytes(512)))
                took[kind] = max(took[kind], (time.monotonic() - start) * 1e6)
    answer = await spdk("bdev_get_histogram", "slow")
    assert set(answer) == {"histogram", "granularity", "min_range", "max_range", "tsc_rate"}
    assert len(base64.b64decode(answer["histogram"])) == 8 * (answer["max_range"] - answer["min_range"] + 1) << answer["granularity"]
    found = [(start, end, count) for _, _, start, end, count in as_the_script_reads(answer) if count]
    assert sum(count for *_, count in found) == 10
    width = 1 + 2 ** -answer["granularity"]
    reads = [entry for entry in found if entry[0] < 40_000 / width]
    writes = [entry for entry in found if entry not in reads]
    if took["read"] < 35_000:  # or the machine was away that long
        assert sum(count for *_, count in reads) == sum(count for *_, count in writes) == 5
        assert all(start * width >= 3000 and start <= took["read"] for start, _, _ in reads), reads
    assert all(start * width >= 40_000 and start <= took["write"] for start, _, _ in writes), writes
    borders = (await spdk("bdev_get_histogram_borders", "slow", "--borders", "100,20000000"))["borders_count"]
    assert borders == [0, 10, 10]


@pytest.mark.parametrize("granularity", [1, 5, 7, 14])
@pytest.mark.parametrize(("low", "high"), [(0, 9), (3, 30), (10, 12)])
def test_ours_and_the_script_mean_the_same_buckets(granularity: int, low: int, high: int) -> None:
    high = min(high, low + 4)
    counts = tuple(range((high - low + 1) << granularity))
    ours = Histogram(granularity=granularity, min_range=low, max_range=high, counts=counts)
    again = Histogram.from_rpc(ours.to_rpc())
    assert again == ours
    theirs = list(as_the_script_reads(ours.to_rpc()))
    assert [count for *_, count in theirs] == list(counts[: (high - low) << granularity])
    for (number, bucket, start, end, _), (own_start, own_end, _) in zip(theirs, ours, strict=False):
        if number > 0 or low == 0:
            assert end * 1000 == pytest.approx(own_end)
        if number > 1 or (number == 1 and bucket) or low == 0:
            assert start * 1000 == pytest.approx(own_start)


async def test_a_histogram_is_of_one_type_and_ends(spdk: Spdk, stack: Any) -> None:
    stack.bdevs.examiner.auto = False
    await spdk("bdev_malloc_create", "-b", "m0", "4", "512")
    await spdk(
        "bdev_enable_histogram", "m0", "--histogram", "-o", "write", "--granularity", "4", "--min-nsec", "0", "--max-nsec", "1000000000000"
    )
    disk = stack.bdevs.handle("m0")
    await asyncio.gather(disk.read(0, 512), disk.write(0, bytes(512)), disk.write(512, bytes(512)))
    answer = await spdk("bdev_get_histogram", "m0")
    assert (answer["granularity"], answer["min_range"]) == (4, 0)
    assert sum(count for *_, count in as_the_script_reads(answer)) == 2
    await spdk("bdev_enable_histogram", "m0", "--no-histogram")
    code, text = await spdk.refusal("bdev_get_histogram", "m0")
    assert (code, text.partition(":")[0]) == (-32603, "Bad address")
    assert (await spdk.refusal("bdev_enable_histogram", "m0", "--histogram", "-o", "reed"))[0] == -32602
    assert (await spdk.refusal("bdev_get_histogram", "m1"))[0] == -19


# -- counters, queue depth, options -----------------------------------------------------------------


async def test_iostat_is_told_and_reset_by_channel_and_by_mode(make_stack: Callable[..., Any], spdk: Spdk, tmp_path: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    async with make_stack(cores=",".join(map(str, cores))) as stack:
        stack.bdevs.examiner.auto = False
        await stack.listen(str(tmp_path / "two.sock"))
        other = spdk.at(str(tmp_path / "two.sock"))
        await other("bdev_malloc_create", "-b", "base", "4", "512")
        await other("bdev_delay_create", "-b", "base", "-d", "m0", "-r", "500", "-t", "500", "-w", "500", "-n", "500")
        run = await stack.perf("m0", pattern="randrw", depth=4, seconds=30)
        await asyncio.sleep(0.3)
        by_channel = await other("bdev_get_iostat", "--names", "m0", "--per-channel")
        threads = (await other("thread_get_stats"))["threads"]
        assert by_channel["name"] == "m0"
        assert [channel["thread_id"] for channel in by_channel["channels"]] == [thread["id"] for thread in threads]
        assert all(channel["num_read_ops"] and channel["num_write_ops"] for channel in by_channel["channels"])
        run.stop()
        result = await run.result()
        first = await iostat(other, "m0", "--reset-mode", "none")
        assert (first["num_read_ops"], first["num_write_ops"]) == (result.reads, result.writes)
        assert first["max_read_latency_ticks"] >= first["min_read_latency_ticks"] >= 500_000
        assert await iostat(other, "m0", "--reset-mode", "maxmin") == first, "told before it is reset"
        second = await iostat(other, "m0", "--reset-mode", "all")
        assert second == {**first, **{name: 0 for name in first if name.startswith(("max_", "min_"))}}
        assert not any(value for name, value in (await iostat(other, "m0")).items() if name != "name")
        assert (await other.refusal("bdev_get_iostat", "--per-channel"))[0] == -22


async def test_queue_depth_is_sampled(spdk: Spdk, stack: Any) -> None:
    stack.bdevs.examiner.auto = False
    await spdk("bdev_malloc_create", "-b", "m0", "4", "512")
    await spdk("bdev_delay_create", "-b", "m0", "-d", "slow", "-r", "20000", "-t", "20000", "-w", "20000", "-n", "20000")
    await spdk("bdev_set_qd_sampling_period", "slow", "1000")
    run = await stack.perf("slow", depth=8, io_size=512, seconds=30)
    await asyncio.sleep(0.5)
    stat = await iostat(spdk, "slow")
    run.stop()
    await run.result()
    assert (stat["queue_depth_polling_period"], stat["queue_depth"]) == (1000, 8)
    assert 0 < stat["io_time"] <= stat["weighted_io_time"] <= 8 * stat["io_time"]
    await spdk("bdev_set_qd_sampling_period", "slow", "0")
    assert "queue_depth" not in await iostat(spdk, "slow")
    assert (await spdk.refusal("bdev_set_qd_sampling_period", "m1", "5"))[0] == -19


async def test_options_are_set_before_the_start_and_saved(spdk: Spdk, make_stack: Callable[..., Any], tmp_path: Any) -> None:
    assert (await spdk.refusal("bdev_set_options", "-p", "4096"))[0] == -1
    async with make_stack(wait_for_rpc=True) as stack:
        await stack.listen(str(tmp_path / "early.sock"))
        early = spdk.at(str(tmp_path / "early.sock"))
        assert (await early.refusal("bdev_set_options", "-p", "10", "-c", "256"))[0] == -32602
        await early("bdev_set_options", "-p", "4096", "-c", "64", "--no-auto-examine")
        await early("framework_start_init")
        [options] = [call["params"] for call in bdev_calls(await early("save_config")) if call["method"] == "bdev_set_options"]
        assert (options["bdev_io_pool_size"], options["bdev_io_cache_size"], options["bdev_auto_examine"]) == (4096, 64, False)
        await early("bdev_malloc_create", "-b", "m0", "4", "512")
        assert (await iostat(early, "m0"))["num_read_ops"] == 0, "nobody has looked at what it holds"
