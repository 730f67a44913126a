"""Arrays whose members change size, and mirrors whose current leg is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qpair.errors import Busy, InvalidArgument, NoSuchDevice

UUID = "5a0e6f0c-5a8c-4a8c-9d1b-2a6b7a1f6f11"
BLOCK = 512
MIB = 1 << 20


async def array(stack: Any) -> dict[str, Any]:
    (found,) = await stack.rpc("bdev_raid_get_bdevs", category="all")
    return dict(found)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        # Neither a rebuild's progress nor a superblock that is written anew has an event.
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def nulls(stack: Any, *blocks: int) -> None:
    for number, count in enumerate(blocks):
        await stack.rpc("bdev_null_create", name=f"n{number}", num_blocks=count, block_size=BLOCK)


async def leg(stack: Any, folder: Path, number: int, size: int = 8 * MIB) -> None:
    path = folder / f"leg{number}.img"
    if not path.exists():
        path.touch()
        with path.open("r+b") as file:
            file.truncate(size)
    uuid = f"00000000-0000-4000-8000-00000000000{number}"
    await stack.rpc("bdev_aio_create", name=f"a{number}", filename=str(path), block_size=BLOCK, uuid=uuid)
    await stack.rpc("bdev_wait_for_examine")


async def grow(stack: Any, folder: Path, number: int, size: int) -> None:
    with (folder / f"leg{number}.img").open("r+b") as file:
        file.truncate(size)
    await stack.rpc("bdev_aio_rescan", name=f"a{number}")


async def mirror(stack: Any, *names: str, superblock: bool = True) -> None:
    await stack.rpc("bdev_raid_create", name="r0", raid_level="raid1", base_bdevs=list(names), superblock=superblock, uuid=UUID)


def superblock(stack: Any, folder: Path, number: int) -> dict[str, Any]:
    return dict(stack.engine.raid_superblock_decode((folder / f"leg{number}.img").read_bytes()[:4096]))


async def rebuilt(stack: Any) -> None:
    async def is_whole() -> bool:
        found = await array(stack)
        return "process" not in found and found["num_base_bdevs_operational"] == found["num_base_bdevs"]

    await until(is_whole)


# ---- sizes ------------------------------------------------------------------------------------------------------------------------


async def test_a_raid0_follows_the_smallest_of_its_members_by_whole_strips(stack: Any) -> None:
    await nulls(stack, 16384, 16384)
    await stack.rpc("bdev_raid_create", name="r0", raid_level="raid0", strip_size_kb=1024, base_bdevs=["n0", "n1"])
    await stack.rpc("bdev_null_resize", name="n0", new_size=20)
    assert stack.bdevs.info("r0").num_blocks == 2 * 16384, "the other has not grown"
    await stack.rpc("bdev_null_resize", name="n1", new_size=12)
    assert stack.bdevs.info("r0").num_blocks == 2 * 12 * 2048
    assert [base["data_size"] for base in (await array(stack))["base_bdevs_list"]] == [12 * 2048] * 2
    async with await stack.open("r0") as disk:
        await disk.write(24 * MIB - BLOCK, bytes(BLOCK))
    await stack.rpc("bdev_null_resize", name="n1", new_size=4)
    assert stack.bdevs.info("r0").num_blocks == 2 * 4 * 2048


async def test_a_concat_keeps_its_size_as_spdks_does(stack: Any) -> None:
    await nulls(stack, 16384, 16384)
    await stack.rpc("bdev_raid_create", name="r0", raid_level="concat", strip_size_kb=64, base_bdevs=["n0", "n1"])
    await stack.rpc("bdev_null_resize", name="n1", new_size=16)
    assert stack.bdevs.info("r0").num_blocks == 2 * 16384


@pytest.mark.parametrize("grown", [4, 16])
async def test_a_member_that_changes_its_size_while_others_are_waited_for_counts_as_it_is_then(stack: Any, grown: int) -> None:
    await nulls(stack, 16384)
    await mirror(stack, "n0", "n1", superblock=False)
    await stack.rpc("bdev_null_resize", name="n0", new_size=grown)
    await stack.rpc("bdev_null_create", name="n1", num_blocks=12 * 2048, block_size=BLOCK)
    await stack.rpc("bdev_wait_for_examine")
    assert (await array(stack))["state"] == "online"
    assert stack.bdevs.info("r0").num_blocks == min(grown, 12) * 2048


async def test_a_mirror_that_grew_is_brought_back_as_large_and_with_its_data(make_stack: Any, tmp_path: Path) -> None:
    data = bytes(range(256)) * 16
    async with make_stack() as stack:
        await leg(stack, tmp_path, 0)
        await leg(stack, tmp_path, 1)
        await mirror(stack, "a0", "a1")
        for number in (0, 1):
            await grow(stack, tmp_path, number, 16 * MIB)
        assert stack.bdevs.info("r0").num_blocks == 15 * 2048
        await stack.bdevs.handle("r0").write(15 * MIB - len(data), data)

        async def is_on_media() -> bool:
            return all(superblock(stack, tmp_path, number)["raid_size"] == 15 * 2048 for number in (0, 1))

        await until(is_on_media)
        assert [base["data_size"] for base in superblock(stack, tmp_path, 1)["base_bdevs"]] == [15 * 2048] * 2
    async with make_stack() as stack:
        await leg(stack, tmp_path, 0)
        await leg(stack, tmp_path, 1)
        assert (await array(stack))["state"] == "online"
        assert stack.bdevs.info("r0").num_blocks == 15 * 2048
        assert await stack.bdevs.handle("r0").read(15 * MIB - len(data), len(data)) == data


async def test_a_leg_that_shrank_below_its_superblock_is_refused_by_name(make_stack: Any, tmp_path: Path, caplog: Any) -> None:
    async with make_stack() as stack:
        await leg(stack, tmp_path, 0)
        await leg(stack, tmp_path, 1)
        await mirror(stack, "a0", "a1")
    with (tmp_path / "leg1.img").open("r+b") as file:
        file.truncate(4 * MIB)
    async with make_stack() as stack:
        await leg(stack, tmp_path, 0)
        await leg(stack, tmp_path, 1)
        found = await array(stack)
        assert (found["state"], found["num_base_bdevs_discovered"]) == ("configuring", 1)
    assert "num_blocks 8192 of base bdev a1: at least 16384 for data from block 2048" in caplog.text


# ---- a current leg that is lost ---------------------------------------------------------------------------------------------------


async def lose_one(make_stack: Any, folder: Path, data: bytes) -> None:
    async with make_stack() as stack:
        await leg(stack, folder, 0)
        await leg(stack, folder, 1)
        await mirror(stack, "a0", "a1")
        await stack.bdevs.handle("r0").write(0, data)


async def test_a_mirror_is_started_without_the_leg_that_was_lost_and_rebuilt_onto_another(make_stack: Any, tmp_path: Path) -> None:
    data = bytes(range(256)) * 32
    await lose_one(make_stack, tmp_path, data)
    async with make_stack() as stack:
        await leg(stack, tmp_path, 0)
        assert (await array(stack))["state"] == "configuring"
        assert await stack.rpc("qpair_raid_start", name="r0") is True
        found = await array(stack)
        assert (found["state"], found["num_base_bdevs_operational"], found["uuid"]) == ("online", 1, UUID)
        assert found["base_bdevs_list"][1]["name"] is None
        assert await stack.bdevs.handle("r0").read(0, len(data)) == data
        assert [base["slot"] for base in superblock(stack, tmp_path, 0)["base_bdevs"]] == [0], "the lost one is named no more"
        await leg(stack, tmp_path, 2)
        await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="a2")
        await rebuilt(stack)
    (tmp_path / "leg0.img").unlink()
    async with make_stack() as stack:
        await leg(stack, tmp_path, 2)
        await stack.rpc("qpair_raid_start", name="r0")
        assert await stack.bdevs.handle("r0").read(0, len(data)) == data


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_legs_that_went_on_without_each_other_are_never_written_over_unasked(
    make_stack: Any, tmp_path: Path, order: tuple[int, int]
) -> None:
    old, ours, theirs = (bytes([value]) * 8192 for value in (1, 2, 3))
    await lose_one(make_stack, tmp_path, old)
    async with make_stack() as stack:  # Leg 1 goes on by itself: its array dropped leg 0, and that is recorded.
        await leg(stack, tmp_path, 0)
        await leg(stack, tmp_path, 1)
        await stack.rpc("bdev_aio_delete", name="a0")
        await stack.bdevs.handle("r0").write(0, theirs)
    async with make_stack() as stack:  # Leg 0, which does not know that, is forced.
        await leg(stack, tmp_path, 0)
        await stack.rpc("qpair_raid_start", name="r0")
        await stack.bdevs.handle("r0").write(0, ours)
    async with make_stack() as stack:
        for number in order:
            await leg(stack, tmp_path, number)
        found = await array(stack)
        assert (found["state"], found["num_base_bdevs_operational"]) == ("online", 1)
        assert found["base_bdevs_list"][order[0]]["name"] == f"a{order[0]}", "the first that came is the array"
        assert "process" not in found
    contents = [(tmp_path / f"leg{number}.img").read_bytes()[MIB : MIB + 8192] for number in (0, 1)]
    assert contents == [ours, theirs]


async def test_a_newcomer_does_not_take_the_place_of_a_current_leg(make_stack: Any, tmp_path: Path) -> None:
    data = bytes([7]) * 4096
    await lose_one(make_stack, tmp_path, data)
    async with make_stack() as stack:
        await leg(stack, tmp_path, 0)
        await leg(stack, tmp_path, 2)
        with pytest.raises(
            InvalidArgument, match="base_bdev a2: one that the superblock of raid bdev r0 calls current, as long as it is not online"
        ):
            await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="a2")
        assert (await array(stack))["state"] == "configuring"
        await leg(stack, tmp_path, 1)
        assert await stack.bdevs.handle("r0").read(0, len(data)) == data


async def test_what_cannot_be_started_by_force_is_refused_by_name(make_stack: Any, tmp_path: Path) -> None:
    async with make_stack() as stack:
        with pytest.raises(NoSuchDevice, match=r"^raid bdev r0 not found$"):
            await stack.rpc("qpair_raid_start", name="r0")
        await nulls(stack, 16384)
        await stack.rpc("bdev_raid_create", name="r0", raid_level="raid0", strip_size_kb=64, base_bdevs=["n0", "n1"])
        with pytest.raises(
            InvalidArgument, match=r"^Failed to start raid bdev r0: .*raid_level RAID0 of raid bdev r0: raid1: no other does without"
        ):
            await stack.rpc("qpair_raid_start", name="r0")
        await stack.rpc("bdev_raid_delete", name="r0")
        await mirror(stack, "absent0", "absent1", superblock=False)
        with pytest.raises(InvalidArgument, match="base_bdevs 0 current of raid bdev r0: at least 1"):
            await stack.rpc("qpair_raid_start", name="r0")
        await stack.rpc("bdev_raid_delete", name="r0")
        await mirror(stack, "n0", "absent", superblock=False)
        await stack.rpc("qpair_raid_start", name="r0")
        with pytest.raises(Busy, match="raid bdev r0 is online, and waits for nothing"):
            await stack.rpc("qpair_raid_start", name="r0")
