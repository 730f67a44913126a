"""Bdevs that stand on others: passthru as the example, what happens when its base comes late, goes or changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qpair.errors import AlreadyExists, Busy, InvalidArgument, NoSuchBdev, NoSuchDevice

UUID = "5a0e6f0c-5a8c-4a8c-9d1b-2a6b7a1f6f11"


async def names(stack: Any) -> list[str]:
    return [bdev["name"] for bdev in await stack.rpc("bdev_get_bdevs")]


async def test_a_passthru_is_its_base_by_another_name(stack: Any) -> None:
    base = await stack.malloc("m0", "1MiB", block_size=4096)
    assert await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0", uuid=UUID) == "p0"
    (shown,) = await stack.rpc("bdev_get_bdevs", name="p0")
    assert (shown["product_name"], shown["uuid"], shown["num_blocks"], shown["block_size"]) == ("passthru", UUID, 256, 4096)
    assert shown["driver_specific"] == {"passthru": {"name": "p0", "base_bdev_name": "m0"}}
    (below,) = await stack.rpc("bdev_get_bdevs", name="m0")
    assert below["claimed"]
    assert below["supported_io_types"] == shown["supported_io_types"]
    assert stack.bdevs.info("p0").bases == ("m0",)
    await stack.bdevs.handle("p0").write(8192, b"through".ljust(4096))
    assert (await base.read(8192, 4096)).startswith(b"through")


async def test_a_claimed_base_is_written_by_nobody_else_and_free_afterwards(stack: Any) -> None:
    base = await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    with pytest.raises(Busy, match="m0 is claimed by passthru"):
        await base.write(0, bytes(512))
    with pytest.raises(Busy, match="m0 is claimed by passthru"):
        await stack.rpc("bdev_passthru_create", name="p1", base_bdev_name="m0")
    await stack.rpc("bdev_passthru_delete", name="p0")
    await base.write(0, bytes(512))


async def test_names_are_unique_also_those_that_are_only_declared(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="late")
    for name in ("p0", "m0"):
        with pytest.raises(AlreadyExists, match=f"'{name}' exists or is declared"):
            await stack.rpc("bdev_passthru_create", name=name, base_bdev_name="m0")


async def test_a_base_that_comes_later_brings_what_was_declared(stack: Any) -> None:
    await stack.rpc("bdev_passthru_create", name="p1", base_bdev_name="p0")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    assert await names(stack) == []
    await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_wait_for_examine")
    assert await names(stack) == ["m0", "p0", "p1"]


async def test_a_base_that_goes_takes_all_above_along_and_brings_them_back(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    await stack.rpc("bdev_passthru_create", name="p1", base_bdev_name="p0")
    async with await stack.open("p1") as disk:
        await stack.rpc("bdev_malloc_delete", name="m0")
        assert await names(stack) == []
        with pytest.raises(NoSuchDevice, match="p1 is being removed"):
            await disk.read(0, 512)
    await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_wait_for_examine")
    assert await names(stack) == ["m0", "p0", "p1"]


async def test_what_was_deleted_by_intent_does_not_come_back(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    await stack.rpc("bdev_passthru_create", name="never", base_bdev_name="nothing")
    await stack.rpc("bdev_passthru_delete", name="p0")
    await stack.rpc("bdev_passthru_delete", name="never")
    await stack.rpc("bdev_malloc_delete", name="m0")
    await stack.malloc("m0", "1MiB")
    await stack.malloc("nothing", "1MiB")
    await stack.rpc("bdev_wait_for_examine")
    assert await names(stack) == ["m0", "nothing"]
    with pytest.raises(NoSuchBdev):
        await stack.rpc("bdev_passthru_delete", name="never")


async def test_a_base_that_grows_or_shrinks_tells_those_above(stack: Any) -> None:
    await stack.null("n0", "4MiB")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="n0")
    await stack.rpc("bdev_passthru_create", name="p1", base_bdev_name="p0")
    for size in (8, 2):
        await stack.rpc("bdev_null_resize", name="n0", new_size=size)
        assert stack.bdevs.info("p1").size_bytes == size << 20
    with pytest.raises(InvalidArgument, match="num_blocks 10: its base's 4096"):
        await stack.bdevs.resize("p1", 5120)


async def test_a_stack_is_only_so_high(stack: Any) -> None:
    await stack.null("f0", "1MiB")
    for floor in range(1, 10):
        await stack.rpc("bdev_passthru_create", name=f"f{floor}", base_bdev_name=f"f{floor - 1}")
    with pytest.raises(InvalidArgument, match="base_bdev f9: at most 9 bdevs below a bdev"):
        await stack.rpc("bdev_passthru_create", name="f10", base_bdev_name="f9")


async def test_the_configuration_brings_the_stack_back(stack: Any, make_stack: Any, tmp_path: Any) -> None:
    await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    await stack.rpc("bdev_passthru_create", name="a1", base_bdev_name="p0", uuid=UUID)
    stack.save_config(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    calls = next(room["config"] for room in saved["subsystems"] if room["subsystem"] == "bdev")
    assert {"method": "bdev_passthru_create", "params": {"base_bdev_name": "p0", "name": "a1", "uuid": UUID}} in calls
    async with make_stack() as other:
        await other.load_config(tmp_path / "config.json")
        assert sorted(await names(other)) == ["a1", "m0", "p0"]


async def test_examining_by_hand_is_for_those_who_switched_it_off(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    with pytest.raises(InvalidArgument, match="bdev_auto_examine"):
        await stack.rpc("bdev_examine", name="m0")
    stack.bdevs.examiner.auto = False
    assert await stack.rpc("bdev_examine", name="m0") is True
    with pytest.raises(NoSuchBdev):
        await stack.rpc("bdev_examine", name="m1")
