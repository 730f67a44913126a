"""Split: parts of one size, by spdk-rpc."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from qpair.bdev.derive import delay_uuid, part_uuid, zone_block_uuid
from qpair.errors import NoSuchBdev
from vbdevs import Spdk, bdev_calls, reloaded

MIB = 1 << 20


async def test_parts_have_ranges_of_their_own(spdk: Spdk, stack: Any) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "64", "512")
    assert (await spdk("bdev_split_create", "disk", "4")).split() == ["diskp0", "diskp1", "diskp2", "diskp3"]
    for number in range(4):
        await stack.bdevs.handle(f"diskp{number}").write(0, bytes([number + 1]) * 4096)
        await stack.bdevs.handle(f"diskp{number}").write(16 * MIB - 512, bytes([number + 17]) * 512)
    for number in range(4):
        assert await stack.bdevs.handle("disk").read(number * 16 * MIB, 4096) == bytes([number + 1]) * 4096
        assert await stack.bdevs.handle("disk").read((number + 1) * 16 * MIB - 512, 512) == bytes([number + 17]) * 512


async def test_a_part_shows_itself_as_spdks(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "-u", "c2f2f5e1-0c43-4a39-b1c5-6d38a0b9e0d2", "8", "512")
    await spdk("bdev_split_create", "disk", "2")
    (part,) = await spdk("bdev_get_bdevs", "-b", "diskp1")
    assert part["product_name"] == "Split Disk"
    assert part["num_blocks"] == 8192
    assert part["driver_specific"] == {"split": {"base_bdev": "disk", "offset_blocks": 8192}}
    assert part["uuid"] == part_uuid("c2f2f5e1-0c43-4a39-b1c5-6d38a0b9e0d2", 8192, 8192)
    (base,) = await spdk("bdev_get_bdevs", "-b", "disk")
    assert base["claimed"] is True


def test_derived_uuids_are_of_version_5_and_all_different() -> None:
    base = "c2f2f5e1-0c43-4a39-b1c5-6d38a0b9e0d2"
    derived = [part_uuid(base, 0, 8), part_uuid(base, 8, 8), delay_uuid(base), zone_block_uuid(base)]
    assert len(set(derived)) == 4
    assert all(UUID(one).version == 5 for one in derived)
    assert derived[0] == part_uuid(base.upper(), 0, 8)


async def test_a_size_makes_as_many_parts_as_fit(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "10", "512")
    assert (await spdk("bdev_split_create", "disk", "8", "-s", "3")).split() == ["diskp0", "diskp1", "diskp2"]
    (part,) = await spdk("bdev_get_bdevs", "-b", "diskp2")
    assert part["num_blocks"] * 512 == 3 * MIB


async def test_refusals_are_worded_as_spdks(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "4", "512")
    said = "Failed to create {} split bdevs from 'disk': {} ({})"
    assert await spdk.refusal("bdev_split_create", "disk", "0") == (
        -32602,
        said.format(0, "Invalid argument", "split_count 0: 1 to 65536"),
    )
    assert await spdk.refusal("bdev_split_create", "disk", "2", "-s", "5") == (
        -32602,
        said.format(2, "Invalid argument", f"split_size_mb 5: bdev 'disk' has {4 * MIB} bytes"),
    )
    await spdk("bdev_split_create", "disk", "2")
    assert await spdk.refusal("bdev_split_create", "disk", "3") == (
        -32602,
        said.format(3, "File exists", "bdev 'disk' is split already"),
    )
    assert await spdk.refusal("bdev_split_delete", "other") == (-32602, "No such file or directory (bdev 'other' is not split)")


async def test_a_claimed_base_is_refused_and_nothing_is_left_behind(spdk: Spdk, stack: Any) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "4", "512")
    await spdk("bdev_passthru_create", "-b", "disk", "-p", "above")
    code, message = await spdk.refusal("bdev_split_create", "disk", "2")
    assert (code, message.partition(" (")[0]) == (-32602, "Failed to create 2 split bdevs from 'disk': Device or resource busy")
    assert [info.name for info in stack.bdevs.infos()] == ["disk", "above"]
    await spdk("bdev_passthru_delete", "above")
    assert (await spdk("bdev_split_create", "disk", "2")).split() == ["diskp0", "diskp1"]


async def test_a_name_that_is_taken_leaves_no_parts(spdk: Spdk, stack: Any) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "4", "512")
    await spdk("bdev_malloc_create", "-b", "diskp1", "4", "512")
    code, message = await spdk.refusal("bdev_split_create", "disk", "3")
    assert (code, message.partition(" (")[0]) == (-32602, "Failed to create 3 split bdevs from 'disk': File exists")
    assert [info.name for info in stack.bdevs.infos()] == ["disk", "diskp1"]
    await spdk("bdev_malloc_delete", "diskp1")
    assert len((await spdk("bdev_split_create", "disk", "3")).split()) == 3


async def test_delete_makes_the_base_whole_again(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "4", "512")
    await spdk("bdev_split_create", "disk", "2")
    await spdk("bdev_split_delete", "disk")
    (base,) = await spdk("bdev_get_bdevs")
    assert (base["name"], base["claimed"]) == ("disk", False)
    assert (await spdk("bdev_split_create", "disk", "3")).split() == ["diskp0", "diskp1", "diskp2"]


async def test_a_base_may_come_later_and_takes_its_parts_along(spdk: Spdk, stack: Any) -> None:
    assert (await spdk("bdev_split_create", "late", "2")).split() == []
    await spdk("bdev_malloc_create", "-b", "late", "4", "512")
    await spdk("bdev_wait_for_examine")
    assert (await spdk("bdev_get_bdevs", "-b", "latep1"))[0]["num_blocks"] == 4096
    await spdk("bdev_malloc_delete", "late")
    assert await spdk("bdev_get_bdevs") == []
    # As in SPDK: with its base a split is forgotten.
    await spdk("bdev_malloc_create", "-b", "late", "4", "512")
    await spdk("bdev_wait_for_examine")
    assert [info.name for info in stack.bdevs.infos()] == ["late"]
    assert (await spdk("bdev_split_create", "late", "4")).split() == ["latep0", "latep1", "latep2", "latep3"]


async def test_one_that_waits_for_its_base_can_be_deleted(spdk: Spdk, stack: Any) -> None:
    await spdk("bdev_split_create", "late", "2")
    await spdk("bdev_split_delete", "late")
    await spdk("bdev_malloc_create", "-b", "late", "4", "512")
    await spdk("bdev_wait_for_examine")
    with pytest.raises(NoSuchBdev):
        stack.bdevs.info("latep0")


async def test_it_is_saved_and_loaded(spdk: Spdk, make_stack: Any, tmp_path: Path) -> None:
    await spdk("bdev_split_create", "later", "5", "-s", "1")
    await spdk("bdev_malloc_create", "-b", "disk", "4", "512")
    await spdk("bdev_split_create", "disk", "3", "-s", "1")
    before = await spdk("bdev_get_bdevs")
    async with reloaded(spdk, make_stack, str(tmp_path / "second.sock")) as (config, _, other):
        calls = [call["params"] for call in bdev_calls(config) if call["method"] == "bdev_split_create"]
        assert calls == [
            {"base_bdev": "later", "split_count": 5, "split_size_mb": 1},
            {"base_bdev": "disk", "split_count": 3, "split_size_mb": 1},
        ]
        assert await other("bdev_get_bdevs") == before
        assert bdev_calls(await other("save_config")) == bdev_calls(config)
