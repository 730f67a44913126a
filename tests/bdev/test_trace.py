"""Trace points: the codec, the summary, and what a running stack tells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpair import BlockingStack
from qpair.bdev.trace import DONE, ISSUE, LOST, POINTS, SET, START, WAIT, LayerTimes, Summary, TraceRecord, decode, parse_groups
from qpair.errors import InvalidArgument, StackStopped

VECTOR = Path(__file__).parent.parent / "vectors/trace/record.bin"
BLOCK = 512


# -- codec --------------------------------------------------------------------------------------------


def test_a_record_is_decoded_as_the_engine_encodes_it() -> None:
    wanted = TraceRecord(reactor=5, time_ns=1, point=DONE, bdev="m0", io=2, parent=None, op="write", lba=3, blocks=1 << 40, status=0x281)
    assert decode(VECTOR.read_bytes(), 5, {4: "m0"}) == [wanted]
    assert decode(VECTOR.read_bytes(), 5, {})[0].bdev == "#4"


@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_refused(data: bytes) -> None:
    if len(data) % 48:
        with pytest.raises(ValueError, match="48 each"):
            decode(data, 0, {})
    else:
        assert len(decode(data, 0, {})) == len(data) // 48


# -- what -e says -------------------------------------------------------------------------------------

ALL64 = 2**64 - 1


@pytest.mark.parametrize(
    ("text", "mask", "idle"),
    [
        ("bdev", ALL64, []),
        ("all", ALL64, []),
        ("0x8", ALL64, []),
        ("8", ALL64, []),
        ("0xffff", ALL64, []),
        ("bdev:0x3", 3, []),
        ("0x8:0x3", 3, []),
        ("0x8:BDEV_IO_START+bdev_io_done", 3, []),
        ("bdev:1,bdev:0x20", 0x21, []),
        ("thread,bdev:0x1", 1, ["thread"]),
        ("nvmf_tcp", 0, ["nvmf_tcp"]),
        ("0x10:0x1", 0, ["0x10:0x1"]),
        ("", 0, []),
    ],
)
def test_groups_are_named_as_spdk_has_them(text: str, mask: int, idle: list[str]) -> None:
    assert parse_groups(text) == (mask, idle)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nothing", "no trace group is named 'nothing'; there are: bdev, all"),
        ("-1", "no trace group is named '-1'"),
        ("0x1_0", "no trace group is named '0x1_0'"),
        ("0x1ffffffffffffffff", "no trace group is named '0x1fff"),
        ("bdev:BDEV_IO_NEVER", "no trace point is named 'BDEV_IO_NEVER'; there are: BDEV_IO_START"),
        ("bdev:-1", "no trace point is named '-1'"),
        ("0x18:0x1", "'0x18' names several groups"),
        (":0x1", "'' names several groups"),
    ],
)
def test_a_group_that_nobody_has_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_groups(text)
    assert why in str(refused.value)


# -- summary ------------------------------------------------------------------------------------------


def at(time_ns: int, point: str, bdev: str, io: int = 1, **more: Any) -> TraceRecord:
    return TraceRecord(reactor=0, time_ns=time_ns, point=point, bdev=bdev, io=io, op="read", **more)


def layers(*records: TraceRecord) -> list[LayerTimes]:
    summary = Summary()
    summary.add(records)
    return summary.layers()


def test_each_bdev_of_a_tower_has_its_own_time() -> None:
    found = layers(
        at(100, START, "top"),
        at(100, WAIT, "top", waits_for="limit"),
        at(130, ISSUE, "top"),
        at(140, START, "base"),
        at(140, ISSUE, "base"),
        at(190, DONE, "base"),
        at(200, DONE, "top", status=0x281),
    )
    base, top = found
    assert base == LayerTimes(bdev="base", op="read", ios=1, errors=0, mean_ns=50, p50_ns=50, p99_ns=50, own_ns=50, wait_ns=0)
    assert top == LayerTimes(bdev="top", op="read", ios=1, errors=1, mean_ns=100, p50_ns=100, p99_ns=100, own_ns=50, wait_ns=30)


def test_legs_at_once_count_from_the_first_to_the_last() -> None:
    found = layers(
        at(0, START, "mirror"),
        at(10, START, "a", io=7, parent=1),
        at(20, START, "b", io=8, parent=1),
        at(50, DONE, "a", io=7),
        at(60, DONE, "b", io=8),
        at(65, DONE, "mirror"),
    )
    assert [(layer.bdev, layer.mean_ns, layer.own_ns) for layer in found] == [("a", 40, 40), ("b", 40, 40), ("mirror", 65, 15)]


def test_parts_that_a_bdev_does_one_io_in_are_not_counted_as_its_ios() -> None:
    found = layers(
        at(0, START, "top"), at(5, START, "top", io=9, parent=1), at(6, START, "base", io=9), at(8, DONE, "base", io=9),
        at(9, DONE, "top", io=9), at(10, DONE, "top"),
    )  # fmt: skip
    assert [(layer.bdev, layer.ios, layer.own_ns) for layer in found] == [("base", 1, 2), ("top", 1, 8)]


@pytest.mark.parametrize("gap", [SET, LOST])
def test_what_is_seen_in_part_does_not_count(gap: str) -> None:
    other = TraceRecord(reactor=1, time_ns=0, point=START, bdev="x", io=1, op="read")
    whole = TraceRecord(reactor=1, time_ns=9, point=DONE, bdev="x", io=1, op="read")
    found = layers(other, at(0, START, "m"), TraceRecord(reactor=0, time_ns=5, point=gap, bdev=""), at(9, DONE, "m"), whole)
    assert [(layer.bdev, layer.mean_ns) for layer in found] == [("x", 9)], "a gap is one reactor's"


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    records = [record for time in range(1, 101) for record in (at(0, START, "m", io=time), at(time, DONE, "m", io=time))]
    (found,) = layers(*records)
    assert (found.p50_ns, found.p99_ns, found.mean_ns) == (50, 99, 50.5)


@given(
    st.lists(
        st.builds(
            at,
            st.integers(0, 100),
            st.sampled_from([*POINTS, SET, LOST]),
            st.sampled_from("ab"),
            st.integers(0, 3),
            parent=st.none() | st.integers(0, 3),
        )
    )
)
def test_no_order_of_records_is_too_strange(records: list[TraceRecord]) -> None:
    layers(*records)


# -- a running stack ----------------------------------------------------------------------------------


async def malloc(stack: Any, *names: str) -> None:
    for name in names:
        await stack.malloc(name, "4MiB", block_size=BLOCK)
    # whoever looks for partitions and superblocks reads, too
    await stack.rpc("bdev_wait_for_examine")


async def tower(stack: Any) -> None:
    await malloc(stack, "m0")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    await stack.rpc("bdev_wait_for_examine")


async def test_an_io_is_seen_at_each_bdev_with_what_it_does(stack: Any) -> None:
    await tower(stack)
    async with await stack.open("p0") as disk, stack.trace() as trace:
        await disk.write(8 * BLOCK, bytes(2 * BLOCK))
        await disk.read(8 * BLOCK, 2 * BLOCK)
    told = [
        (record.point, record.bdev, record.op, record.lba, record.blocks, record.status)
        for record in trace.records
        if record.io is not None
    ]
    steps = [(START, "p0"), (ISSUE, "p0"), (START, "m0"), (ISSUE, "m0"), (DONE, "m0"), (DONE, "p0")]
    assert told == [(point, bdev, op, 8, 2, 0) for op in ("write", "read") for point, bdev in steps]
    assert len({record.io for record in trace.records if record.op == "write"}) == 1
    assert trace.lost == 0
    assert [(layer.bdev, layer.op, layer.ios, layer.errors) for layer in trace.summary()] == [
        ("m0", "read", 1, 0), ("m0", "write", 1, 0), ("p0", "read", 1, 0), ("p0", "write", 1, 0),
    ]  # fmt: skip
    times = [record.time_ns for record in trace.records]
    assert times == sorted(times)


async def test_operations_bear_their_names(stack: Any) -> None:
    await malloc(stack, "m0")
    async with await stack.open("m0") as disk, stack.trace(["BDEV_IO_DONE"]) as trace:
        await disk.flush()
        await disk.unmap(0, BLOCK)
        await disk.write_zeroes(0, BLOCK)
        await disk.compare(0, bytes(BLOCK))
        await disk.copy(0, 4 * BLOCK, BLOCK)
        await disk.compare_and_write(0, bytes(BLOCK), bytes(BLOCK))
        await disk.reset()
    whole = [record.op for record in trace.records if record.point == DONE]
    for op in ("flush", "unmap", "write_zeroes", "compare", "copy", "compare_and_write", "reset"):
        assert op in whole, op


async def test_a_leg_of_a_mirror_names_the_io_that_it_does_a_part_of(stack: Any) -> None:
    await malloc(stack, "a", "b")
    await stack.rpc("bdev_raid_create", name="mirror", raid_level="raid1", base_bdevs=["a", "b"], superblock=False)
    await stack.rpc("bdev_wait_for_examine")
    async with await stack.open("mirror") as disk, stack.trace(bdevs=["mirror", "a", "b"]) as trace:
        await disk.write(0, bytes(BLOCK))
    starts = {record.bdev: record for record in trace.records if record.point == START}
    assert starts["mirror"].parent is None
    assert starts["a"].parent == starts["b"].parent == starts["mirror"].io
    assert starts["a"].io != starts["b"].io


async def test_what_two_want_stays_on_until_neither_does(stack: Any) -> None:
    await stack.malloc("m0", "4MiB", block_size=BLOCK)
    await stack.tracing.set(1)
    async with stack.trace(["BDEV_IO_DONE"]):
        assert stack.tracing.mask == 3
        async with stack.trace(["BDEV_IO_DONE"]):
            await stack.tracing.clear(3)
            assert stack.tracing.mask == 2
        assert stack.tracing.mask == 2
    assert stack.tracing.mask == 0


async def test_only_bdevs_that_are_asked_for_are_kept(stack: Any) -> None:
    await tower(stack)
    async with await stack.open("p0") as disk, stack.trace(bdevs=["m0"]) as trace:
        await disk.read(0, BLOCK)
    assert {record.bdev for record in trace.records} == {"", "m0"}
    with pytest.raises(InvalidArgument, match="no trace point is named 'X'"):
        stack.trace(["X"])


async def test_what_is_overwritten_is_told_as_lost(stack: Any) -> None:
    await stack.null("n0", "1GiB", block_size=4096)
    await stack.tracing.set(3)
    await stack.measure("n0", ios=60_000, depth=64, seconds=None)
    page = await stack.tracing.read()
    assert page.lost > 50_000
    assert page.records[0].point == LOST
    assert page.records[0].blocks == page.lost
    assert len(page.records) == 4097
    following = await stack.tracing.read(page.cursor)
    assert following.lost == 0
    await stack.tracing.forget()
    assert (await stack.tracing.read(page.cursor)).records == []


async def test_tracing_ends_with_the_stack(make_stack: Any) -> None:
    stack = make_stack()
    await stack.start()
    async with stack.trace() as trace:
        await stack.stop()
    assert trace.records == []
    with pytest.raises(StackStopped):
        await stack.tracing.set(1)


def test_the_blocking_twin_traces(engine_factory: Any, tmp_path: Path) -> None:
    with BlockingStack(cores=min(os.sched_getaffinity(0)), pin=False, vhost_dir=tmp_path, engine_factory=engine_factory) as stack:
        disk = stack.malloc("m0", "4MiB")
        stack.rpc("bdev_wait_for_examine")
        with stack.trace() as trace:
            disk.write(0, bytes(BLOCK))
        assert [(layer.bdev, layer.op, layer.ios) for layer in trace.summary()] == [("m0", "write", 1)]
        assert any(record.point == DONE for record in trace.records)
