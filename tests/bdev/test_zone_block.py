"""zone_block: zones on a plain bdev, by spdk-rpc and by I/O on zones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qpair.bdev.derive import zone_block_uuid
from qpair.bdev.zones import ZoneState
from qpair.errors import InvalidArgument, QpairError
from vbdevs import Spdk, bdev_calls, reloaded

BASE = "c2f2f5e1-0c43-4a39-b1c5-6d38a0b9e0d2"
ZONE = 4096 * 512
CAPACITY = 4000 * 512


async def made(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "-u", BASE, "8", "512")
    assert await spdk("bdev_zone_block_create", "-b", "zoned", "-n", "disk", "-z", "4000", "-o", "2") == "zoned"


async def test_it_shows_itself_as_spdks(spdk: Spdk) -> None:
    await made(spdk)
    (shown,) = await spdk("bdev_get_bdevs", "-b", "zoned")
    assert shown["product_name"] == "zone_block"
    assert shown["uuid"] == zone_block_uuid(BASE)
    assert (shown["zoned"], shown["zone_size"], shown["max_open_zones"], shown["optimal_open_zones"]) == (True, 4096, 0, 2)
    assert shown["num_blocks"] == 4 * 4096
    assert shown["supported_io_types"]["zone_append"] is True
    assert shown["supported_io_types"]["zone_management"] is True
    assert shown["driver_specific"] == {
        "zoned_block": {"name": "zoned", "base_bdev": "disk", "zone_capacity": 4000, "optimal_open_zones": 2}
    }
    (base,) = await spdk("bdev_get_bdevs", "-b", "disk")
    assert (base["zoned"], "zone_size" in base) == (False, False)


async def test_zones_are_reset_written_appended_to_and_reported(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    async with await stack.bdevs.handle("zoned").open() as disk:
        zones = disk.zones
        assert (zones.size, zones.capacity) == (ZONE, CAPACITY)
        assert [(zone.start, zone.capacity, zone.state) for zone in await zones.report()] == [
            (number * ZONE, CAPACITY, ZoneState.FULL) for number in range(4)
        ]
        with pytest.raises(QpairError, match="the zone is full"):
            await disk.write(ZONE, bytes(512))
        await zones.reset(ZONE)
        await disk.write(ZONE, b"w" * 1024)
        assert await zones.append(ZONE, b"a" * 512) == ZONE + 1024
        with pytest.raises(QpairError, match="write pointer"):
            await disk.write(ZONE, bytes(512))
        assert await disk.read(ZONE, 1536) == b"w" * 1024 + b"a" * 512
        (zone,) = await zones.report(ZONE, 1)
        assert (zone.state, zone.write_pointer) == (ZoneState.IMPLICITLY_OPEN, ZONE + 1536)
        await zones.close(ZONE)
        await zones.open(ZONE)
        await zones.finish(ZONE)
        (zone,) = await zones.report(ZONE, 1)
        assert (zone.state, zone.write_pointer) == (ZoneState.FULL, ZONE + CAPACITY)
        with pytest.raises(QpairError, match="passes the end of its zone"):
            await disk.read(CAPACITY - 512, 1024)


async def test_appends_at_once_get_places_of_their_own(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    async with await stack.bdevs.handle("zoned").open() as disk:
        await disk.zones.reset(0)
        places = await asyncio.gather(*(disk.zones.append(0, bytes([number]) * 1024) for number in range(200)))
        assert sorted(places) == [number * 1024 for number in range(200)]
        for number, place in enumerate(places):
            assert await disk.read(place, 1024) == bytes([number]) * 1024


async def test_zones_pass_through_what_stands_on_them(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    await spdk("bdev_passthru_create", "-b", "zoned", "-p", "above")
    await spdk("bdev_split_create", "above", "2")
    (part,) = await spdk("bdev_get_bdevs", "-b", "abovep1")
    assert (part["zoned"], part["zone_size"], part["num_blocks"]) == (True, 4096, 2 * 4096)
    async with await stack.bdevs.handle("abovep1").open() as disk:
        await disk.zones.reset(ZONE)
        assert await disk.zones.append(ZONE, b"x" * 512) == ZONE
        assert [zone.write_pointer - zone.start for zone in await disk.zones.report()] == [CAPACITY, 512]
    assert await stack.bdevs.handle("disk").read(3 * ZONE, 512) == b"x" * 512


async def test_a_bdev_without_zones_has_none(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    async with await stack.bdevs.handle("disk").open(write=False) as disk:
        with pytest.raises(InvalidArgument, match="bdev 'disk' is not zoned"):
            _ = disk.zones
        with pytest.raises(InvalidArgument, match="disk is none"):
            await disk.zone_io("report", 0, 512)
    async with await stack.bdevs.handle("zoned").open(write=False) as disk:
        assert len(await disk.zones.report()) == 4
        with pytest.raises(QpairError, match="open for reading only"):
            await disk.zones.reset(0)
    async with await stack.bdevs.handle("zoned").open() as disk:
        with pytest.raises(QpairError, match="a field of the command has a value"):
            await disk.zones.reset(512)


async def test_refusals_are_worded_as_spdks(spdk: Spdk) -> None:
    await made(spdk)
    said = "Failed to create block zoned vbdev: "
    for words, message in (
        (("-b", "zoned", "-n", "other", "-z", "8", "-o", "1"), "File exists"),
        (("-b", "again", "-n", "disk", "-z", "8", "-o", "1"), "File exists"),
        (("-b", "twice", "-n", "zoned", "-z", "8", "-o", "1"), "File exists"),
        (("-b", "none", "-n", "disk", "-z", "0", "-o", "1"), "Invalid argument"),
        (("-b", "none", "-n", "disk", "-z", "8", "-o", "0"), "Invalid argument"),
    ):
        code, text = await spdk.refusal("bdev_zone_block_create", *words)
        assert (code, text.partition(" (")[0]) == (-32603, said + message), words
    assert await spdk.refusal("bdev_zone_block_delete", "disk") == (-19, "No such device")


async def test_delete_frees_the_base(spdk: Spdk) -> None:
    await made(spdk)
    await spdk("bdev_zone_block_delete", "zoned")
    (base,) = await spdk("bdev_get_bdevs")
    assert (base["name"], base["claimed"]) == ("disk", False)
    assert await spdk("bdev_zone_block_create", "-b", "zoned", "-n", "disk", "-z", "2048", "-o", "1") == "zoned"


async def test_a_base_may_come_later_and_takes_it_along(spdk: Spdk) -> None:
    await spdk("bdev_zone_block_create", "-b", "zoned", "-n", "late", "-z", "2048", "-o", "1")
    for _ in range(2):
        await spdk("bdev_malloc_create", "-b", "late", "8", "512")
        await spdk("bdev_wait_for_examine")
        assert [disk["name"] for disk in await spdk("bdev_get_bdevs")] == ["late", "zoned"]
        await spdk("bdev_malloc_delete", "late")
        assert await spdk("bdev_get_bdevs") == []


async def test_it_is_saved_and_loaded(spdk: Spdk, make_stack: Any, tmp_path: Path) -> None:
    await made(spdk)
    before = await spdk("bdev_get_bdevs")
    async with reloaded(spdk, make_stack, str(tmp_path / "second.sock")) as (config, _, other):
        (call,) = [call for call in bdev_calls(config) if call["method"] == "bdev_zone_block_create"]
        assert call["params"] == {"base_bdev": "disk", "name": "zoned", "zone_capacity": 4000, "optimal_open_zones": 2}
        assert await other("bdev_get_bdevs") == before
