"""RAID bdevs through SPDK's methods: striped and mirrored, waiting for members, degraded and rebuilt, brought back by their superblocks."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from missing import missing
from qpair.errors import AlreadyExists, Busy, InvalidArgument, NoSuchDevice

UUID = "5a0e6f0c-5a8c-4a8c-9d1b-2a6b7a1f6f11"
NOBODY = "00000000-0000-0000-0000-000000000000"
VECTORS = Path(__file__).parents[1] / "vectors" / "raid"
BLOCK = 512


async def array(stack: Any, name: str = "r0") -> dict[str, Any]:
    (found,) = [found for found in await stack.rpc("bdev_raid_get_bdevs", category="all") if found["name"] == name]
    return dict(found)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        # A rebuild's progress has no event.
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def rebuilt(stack: Any) -> None:
    async def is_whole() -> bool:
        found = await array(stack)
        return "process" not in found and found["num_base_bdevs_operational"] == found["num_base_bdevs"]

    await until(is_whole)


async def bases(stack: Any, *names: str, size: str = "8MiB") -> None:
    for name in names:
        await stack.malloc(name, size, block_size=BLOCK)


async def mirror(stack: Any, *names: str, superblock: bool = False) -> None:
    assert await stack.rpc("bdev_raid_create", name="r0", raid_level="raid1", base_bdevs=list(names), superblock=superblock, uuid=UUID)


def pattern(seed: int, length: int) -> bytes:
    return bytes((seed + number * 7 + number // 251) % 256 for number in range(length))


async def files(stack: Any, folder: Path, *numbers: int) -> None:
    for number in numbers:
        path = folder / f"leg{number}.img"
        if not path.exists():
            path.touch()
            with path.open("r+b") as file:
                file.truncate(8 << 20)
        uuid = f"00000000-0000-4000-8000-00000000000{number}"
        await stack.rpc("bdev_aio_create", name=f"a{number}", filename=str(path), block_size=BLOCK, uuid=uuid)
    await stack.rpc("bdev_wait_for_examine")


def superblock(stack: Any, folder: Path, number: int) -> dict[str, Any]:
    data = (folder / f"leg{number}.img").read_bytes()[:4096]
    return dict(stack.engine.raid_superblock_decode(data))


async def test_a_raid0_lays_strips_on_its_members_in_turn(stack: Any) -> None:
    await bases(stack, "m0", "m1", size="1MiB")
    assert await stack.rpc("bdev_raid_create", name="r0", raid_level="0", strip_size_kb=4, base_bdevs=["m0", "m1"], uuid=UUID) is True
    (shown,) = await stack.rpc("bdev_get_bdevs", name="r0")
    assert (shown["product_name"], shown["num_blocks"], shown["block_size"], shown["uuid"]) == ("Raid Volume", 4096, 512, UUID)
    data = pattern(1, 64 << 10)
    await stack.bdevs.handle("r0").write(2048, data)
    whole = bytes(2048) + data
    for number in (0, 1):
        strips = [whole[at : at + 4096] for at in range(number * 4096, len(whole), 8192)]
        found = await stack.bdevs.handle(f"m{number}").read(0, 32 << 10)
        assert found == b"".join(strips)[: 32 << 10]
    assert await stack.bdevs.handle("r0").read(2048, len(data)) == data
    async with await stack.open("r0") as disk:
        await disk.write_zeroes(4096, 16384)
        await disk.unmap(0, 4096)
        await disk.flush()
    assert (await stack.bdevs.handle("r0").read(4096, 16384)) == bytes(16384)


async def test_an_array_is_shown_as_spdk_shows_it(stack: Any) -> None:
    await bases(stack, "m0", "m1")
    await stack.rpc("bdev_raid_create", name="r0", raid_level="concat", strip_size_kb=64, base_bdevs=["m0", "m1"], uuid=UUID)
    uuids = [bdev["uuid"] for bdev in await stack.rpc("bdev_get_bdevs")][:2]
    shown = {
        "uuid": UUID,
        "strip_size_kb": 64,
        "state": "online",
        "raid_level": "concat",
        "superblock": False,
        "num_base_bdevs": 2,
        "num_base_bdevs_discovered": 2,
        "num_base_bdevs_operational": 2,
        "base_bdevs_list": [
            {"name": f"m{number}", "uuid": uuid, "is_configured": True, "data_offset": 0, "data_size": 16384}
            for number, uuid in enumerate(uuids)
        ],
    }
    assert await stack.rpc("bdev_raid_get_bdevs", category="online") == [{"name": "r0", **shown}]
    assert await stack.rpc("bdev_raid_get_bdevs", category="configuring") == []
    (bdev,) = await stack.rpc("bdev_get_bdevs", name="r0")
    assert bdev["driver_specific"] == {"raid": shown}


async def test_an_array_waits_for_members_in_any_order(stack: Any) -> None:
    await bases(stack, "m1")
    await mirror(stack, "m0", "m1", "m2")
    found = await array(stack)
    assert (found["state"], found["num_base_bdevs_discovered"], found["num_base_bdevs_operational"]) == ("configuring", 1, 3)
    assert [base["name"] for base in found["base_bdevs_list"]] == ["m0", "m1", "m2"]
    await bases(stack, "m2")
    await bases(stack, "m0")
    await stack.rpc("bdev_wait_for_examine")
    assert (await array(stack))["state"] == "online"
    assert stack.bdevs.info("r0").bases == ("m0", "m1", "m2")


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({"raid_level": "raid1", "strip_size_kb": 4}, InvalidArgument, "strip_size_kb 4: 0 for raid1"),
        ({"raid_level": "raid0", "strip_size_kb": 3}, InvalidArgument, "strip_size_kb 3: a power of two up to 1048576"),
        ({"raid_level": "raid0"}, InvalidArgument, "strip_size_kb 0: a power of two up to 1048576"),
        ({"raid_level": "raid1", "base_bdevs": ["m0"]}, InvalidArgument, "base_bdevs of 1: 2 to 255 for RAID1"),
        ({"raid_level": "5f", "strip_size_kb": 4}, InvalidArgument, "raid_level RAID5F: raid0, raid1 or concat"),
        ({"raid_level": "raid1", "name": "x" * 64}, InvalidArgument, f"name {'x' * 64}: 1 to 63 bytes"),
        ({"raid_level": "raid1", "name": "m0"}, AlreadyExists, "File exists: bdev m0"),
        ({"raid_level": "raid1", "base_bdevs": ["m0", "wide"]}, InvalidArgument, "block_size 4096 of base bdev wide: the array's 512"),
        ({"raid_level": "raid1", "base_bdevs": ["m0", "claimed"]}, Busy, "bdev claimed is claimed by passthru"),
    ],
)
async def test_what_cannot_be_an_array_is_refused_by_name_and_leaves_nothing(
    stack: Any, params: dict[str, Any], error: Any, text: str
) -> None:
    await bases(stack, "m0", "m1", "claimed")
    await stack.malloc("wide", "8MiB", block_size=4096)
    await stack.rpc("bdev_passthru_create", name="p", base_bdev_name="claimed")
    given = {"name": "r0", "base_bdevs": ["m0", "m1"], **params}
    with pytest.raises(error) as refusal:
        await stack.rpc("bdev_raid_create", **given)
    assert f"Failed to create RAID bdev {given['name']}: " in str(refusal.value)
    assert text in str(refusal.value)
    assert await stack.rpc("bdev_raid_get_bdevs", category="all") == []
    async with await stack.open("m0") as disk:
        await disk.write(0, bytes(512))


async def test_what_is_not_there_is_said_as_spdk_says_it(stack: Any) -> None:
    await bases(stack, "m0")
    with pytest.raises(NoSuchDevice, match=r"^raid bdev r0 not found$"):
        await stack.rpc("bdev_raid_delete", name="r0")
    with pytest.raises(NoSuchDevice, match=r"^raid bdev r0 is not found in config$"):
        await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="m0")
    with pytest.raises(NoSuchDevice, match=r"^Failed to remove base bdev from raid bdev: No such device"):
        await stack.rpc("bdev_raid_remove_base_bdev", name="m0")


async def test_a_mirror_does_without_a_leg_and_is_rebuilt_onto_another(stack: Any) -> None:
    await bases(stack, "m0", "m1", "m2")
    await mirror(stack, "m0", "m1")
    disk = stack.bdevs.handle("r0")
    before, after = pattern(3, 1 << 20), pattern(4, 1 << 20)
    await disk.write(0, before)
    await stack.rpc("bdev_malloc_delete", name="m0")
    found = await array(stack)
    assert (found["state"], found["num_base_bdevs_operational"]) == ("online", 1)
    assert found["base_bdevs_list"][0] == {"name": None, "uuid": NOBODY, "is_configured": False, "data_offset": 0, "data_size": 16384}
    assert await disk.read(0, len(before)) == before
    await disk.write(4 << 20, after)
    await stack.rpc("bdev_raid_set_options", process_window_size_kb=64, process_max_bandwidth_mb_sec=16)
    await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="m2")
    process = (await array(stack))["process"]
    assert (process["type"], process["target"], list(process["progress"])) == ("rebuild", "m2", ["blocks", "percent"])
    with pytest.raises(OSError, match="raid bdev r0 is being rebuilt"):
        await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="m2")
    seen = [process["progress"]["blocks"]]

    async def is_over() -> bool:
        now = (await array(stack)).get("process")
        if now is not None:
            assert now["progress"]["percent"] == now["progress"]["blocks"] * 100 // 16384
            seen.append(now["progress"]["blocks"])
        return now is None

    await until(is_over)
    assert seen == sorted(seen)
    assert len(set(seen)) > 3, "progress is told while it is made"
    await rebuilt(stack)
    await stack.rpc("bdev_raid_remove_base_bdev", name="m1")
    assert await disk.read(0, len(before)) == before
    assert await disk.read(4 << 20, len(after)) == after


async def test_the_last_leg_takes_the_array_along(stack: Any) -> None:
    await bases(stack, "m0", "m1")
    await mirror(stack, "m0", "m1")
    await stack.rpc("bdev_raid_remove_base_bdev", name="m0")
    await stack.rpc("bdev_raid_remove_base_bdev", name="m1")
    assert [bdev["name"] for bdev in await stack.rpc("bdev_get_bdevs")] == ["m0", "m1"]
    assert await stack.rpc("bdev_raid_get_bdevs", category="online") == []


async def test_a_stripe_goes_offline_with_any_member(stack: Any) -> None:
    await bases(stack, "m0", "m1")
    await stack.rpc("bdev_raid_create", name="r0", raid_level="raid0", strip_size_kb=4, base_bdevs=["m0", "m1"])
    await stack.rpc("bdev_malloc_delete", name="m0")
    found = await array(stack)
    assert (found["state"], found["num_base_bdevs_discovered"]) == ("offline", 1)
    assert await stack.rpc("bdev_raid_get_bdevs", category="offline") == [found]
    with pytest.raises(Busy, match="m1 is claimed by raid"):
        await stack.bdevs.handle("m1").write(0, bytes(512))
    await stack.rpc("bdev_raid_delete", name="r0")
    await stack.bdevs.handle("m1").write(0, bytes(512))
    assert await stack.rpc("bdev_raid_get_bdevs", category="all") == []


async def test_a_mirror_follows_the_size_of_its_legs(stack: Any) -> None:
    for name in ("n0", "n1"):
        await stack.rpc("bdev_null_create", name=name, num_blocks=16384, block_size=512)
    await mirror(stack, "n0", "n1")
    await stack.rpc("bdev_null_resize", name="n0", new_size=16)
    assert stack.bdevs.info("r0").num_blocks == 16384
    await stack.rpc("bdev_null_resize", name="n1", new_size=16)
    assert stack.bdevs.info("r0").num_blocks == 32768
    await stack.rpc("bdev_null_resize", name="n0", new_size=4)
    assert stack.bdevs.info("r0").num_blocks == 8192


async def test_superblocks_bring_an_array_back_whole(make_stack: Any, tmp_path: Path) -> None:
    data = pattern(5, 1 << 20)
    async with make_stack() as stack:
        await files(stack, tmp_path, 0, 1)
        await mirror(stack, "a0", "a1", superblock=True)
        await stack.bdevs.handle("r0").write(0, data)
        found = await array(stack)
        assert [(base["data_offset"], base["data_size"]) for base in found["base_bdevs_list"]] == [(2048, 14336)] * 2
        stack.save_config(tmp_path / "saved.json")
    assert "bdev_raid_create" not in (tmp_path / "saved.json").read_text()
    for number in (0, 1):
        assert (tmp_path / f"leg{number}.img").read_bytes()[1 << 20 : 2 << 20] == data
    async with make_stack() as stack:
        for number in (0, 1):
            on_disk = superblock(stack, tmp_path, number)
            assert [base["state"] for base in on_disk["base_bdevs"]] == ["configured"] * 2, "a clean end degrades nothing"
            assert (on_disk["name"], on_disk["uuid"], on_disk["seq_number"], on_disk["raid_size"]) == ("r0", UUID, 1, 14336)
        await files(stack, tmp_path, 1)
        assert (await array(stack))["state"] == "configuring"
        await files(stack, tmp_path, 0)
        assert (await array(stack))["state"] == "online"
        assert await stack.bdevs.handle("r0").read(0, len(data)) == data
        await stack.rpc("bdev_raid_delete", name="r0", clear_sb=True)
        assert (tmp_path / "leg0.img").read_bytes()[:512] == bytes(512)


async def test_of_two_generations_the_newer_wins_and_the_stale_leg_is_rebuilt(make_stack: Any, tmp_path: Path) -> None:
    old, new = pattern(6, 1 << 20), pattern(7, 1 << 20)
    async with make_stack() as stack:
        await files(stack, tmp_path, 0, 1)
        await mirror(stack, "a0", "a1", superblock=True)
        await stack.bdevs.handle("r0").write(0, old)
        await stack.rpc("bdev_aio_delete", name="a0")
        assert superblock(stack, tmp_path, 1)["base_bdevs"][0]["state"] == "missing"
        await stack.bdevs.handle("r0").write(0, new)
    async with make_stack() as stack:
        await files(stack, tmp_path, 0)
        assert (await array(stack))["state"] == "configuring", "the stale leg alone is never the array"
        await files(stack, tmp_path, 1)
        assert (await array(stack))["state"] == "online"
        assert await stack.bdevs.handle("r0").read(0, len(new)) == new
        await rebuilt(stack)
        newest = superblock(stack, tmp_path, 0)
        assert [base["state"] for base in newest["base_bdevs"]] == ["configured"] * 2
        assert newest == superblock(stack, tmp_path, 1)
    assert (tmp_path / "leg0.img").read_bytes()[1 << 20 : 2 << 20] == new


async def test_a_torn_superblock_is_refused_by_name_and_another_arrays_kept(make_stack: Any, tmp_path: Path, caplog: Any) -> None:
    async with make_stack() as stack:
        await files(stack, tmp_path, 0, 1)
        await mirror(stack, "a0", "a1", superblock=True)
    leg = tmp_path / "leg1.img"
    with leg.open("r+b") as file:
        file.seek(130)
        file.write(b"\xff")
    async with make_stack() as stack:
        await files(stack, tmp_path, 1)
        assert await stack.rpc("bdev_raid_get_bdevs", category="all") == []
        await files(stack, tmp_path, 0)
        assert (await array(stack))["state"] == "configuring"
        await bases(stack, "m0")
        with pytest.raises(AlreadyExists, match="File exists: bdev r0"):
            await stack.rpc("bdev_raid_create", name="r0", raid_level="raid1", base_bdevs=["m0", "a1"])
        await stack.rpc("bdev_raid_delete", name="r0")
        with pytest.raises(AlreadyExists, match="the superblock of raid bdev r0 on base bdev a0"):
            await stack.rpc("bdev_raid_create", name="r1", raid_level="raid1", base_bdevs=["m0", "a0"])
        with pytest.raises(OSError, match=r"superblock crc 0x[0-9a-f]{8}: the content's is 0x[0-9a-f]{8}"):
            superblock(stack, tmp_path, 1)
    assert "the superblock of bdev a1 is refused: crc 0x" in caplog.text


async def test_the_codec_reads_and_writes_the_vectors(stack: Any) -> None:
    engine = stack.engine
    for path in sorted(VECTORS.glob("*.bin")):
        fields = engine.raid_superblock_decode(path.read_bytes())
        fields["base_bdevs"] = list(fields["base_bdevs"])
        assert engine.raid_superblock_encode(fields) == path.read_bytes()
    fields["base_bdevs"][1]["slot"] = 0
    with pytest.raises(OSError, match="superblock slot 0: each below num_base_bdevs 5, once"):
        engine.raid_superblock_encode(fields)
    with pytest.raises(OSError, match="superblock signature: not SPDKRAID"):
        engine.raid_superblock_decode(bytes(512))


async def test_arrays_without_superblocks_are_saved_and_loaded(make_stack: Any, tmp_path: Path) -> None:
    async with make_stack() as stack:
        await bases(stack, "m0", "m1", "m2")
        await stack.rpc("bdev_raid_set_options", process_window_size_kb=512, process_max_bandwidth_mb_sec=10)
        await mirror(stack, "m0", "m1")
        await stack.rpc("bdev_raid_create", name="r1", raid_level="raid0", strip_size_kb=8, base_bdevs=["m2", "late"])
        stack.save_config(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    (entries,) = [part["config"] for part in saved["subsystems"] if part["subsystem"] == "bdev"]
    raids = [entry["params"] for entry in entries if entry["method"] == "bdev_raid_create"]
    assert raids[0] == {"name": "r0", "uuid": UUID, "raid_level": "raid1", "superblock": False, "base_bdevs": ["m0", "m1"]}
    assert {"method": "bdev_raid_set_options", "params": {"process_window_size_kb": 512, "process_max_bandwidth_mb_sec": 10}} in entries
    async with make_stack(wait_for_rpc=True) as stack:
        await stack.load_config(tmp_path / "saved.json")
        await stack.rpc("bdev_wait_for_examine")
        states = {found["name"]: found["state"] for found in await stack.rpc("bdev_raid_get_bdevs", category="all")}
        assert states == {"r0": "online", "r1": "configuring"}


async def test_options_out_of_range_are_refused(stack: Any) -> None:
    with pytest.raises(InvalidArgument, match="process_window_size_kb 0: at least 1"):
        await stack.rpc("bdev_raid_set_options", process_window_size_kb=0)


async def test_spdk_rpc_drives_an_array_through_its_life(client: Any, server: Any, socket_path: str, stack: Any) -> None:
    program = shutil.which("spdk-rpc", path=str(Path(sys.executable).parent)) or shutil.which("spdk-rpc")
    if program is None:
        missing("spdk-rpc", "pip install spdk")

    async def call(*words: str) -> Any:
        code, out, err = await client(program, "-s", socket_path, *words)
        assert code == 0, err
        return json.loads(out) if out.strip().startswith(("[", "{")) else out.strip()

    await bases(stack, "m0", "m1", "m2")
    await call("bdev_raid_set_options", "-w", "512", "-b", "0")
    await call("bdev_raid_create", "-n", "r0", "-r", "raid1", "-b", "m0 m1", "-s", "--uuid", UUID)
    (online,) = await call("bdev_raid_get_bdevs", "online")
    assert (online["name"], online["superblock"], online["num_base_bdevs_operational"]) == ("r0", True, 2)
    await call("bdev_raid_remove_base_bdev", "m0")
    assert (await array(stack))["num_base_bdevs_operational"] == 1
    await call("bdev_raid_add_base_bdev", "r0", "m2")
    await rebuilt(stack)
    code, out, err = await client(program, "-s", socket_path, "bdev_raid_add_base_bdev", "r0", "m0")
    assert (code, '"code": -22' in out + err) == (1, True)
    assert "Failed to add base bdev m0 to RAID bdev r0: Invalid argument" in out + err
    await call("bdev_raid_delete", "r0", "-c")
    assert await call("bdev_raid_get_bdevs", "all") == []
    for name in ("m1", "m2"):
        assert await stack.bdevs.handle(name).read(0, 512) == bytes(512)
