"""Partitions as bdevs: tables really made by sgdisk and sfdisk, and hostile ones."""

from __future__ import annotations

import logging
import subprocess
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any
from uuid import UUID

import pytest

from missing import missing
from qpair.bdev.gpt import OLD_SPDK_TYPE, SPDK_TYPE, Entry, Header, encode_entries, protective_mbr
from vbdevs import Spdk, bdev_calls, reloaded

MIB = 1 << 20
SPDK_GUID = str(SPDK_TYPE)
LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"
DISK = UUID("11111111-2222-4333-8444-555555555555")


def tool(name: str) -> str:
    found = which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    return found or missing(name, "tools/setup-apt.sh installs it")


def sgdisk(image: Path, *words: str) -> None:
    subprocess.run([tool("sgdisk"), *words, str(image)], check=True, capture_output=True)


def sfdisk(image: Path, script: str) -> None:
    subprocess.run([tool("sfdisk"), "-q", str(image)], input=script.encode(), check=True, capture_output=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


async def attach(spdk: Spdk, image: Path, block_size: int = 512) -> list[str]:
    """The names of all bdevs once the image's is there and was looked at."""
    await spdk("bdev_aio_create", str(image), "disk", str(block_size))
    await spdk("bdev_wait_for_examine")
    return [disk["name"] for disk in await spdk("bdev_get_bdevs")]


def disk_bytes(
    block_size: int, num_blocks: int, entries: list[Entry], *, primary: Header | None = None, backup: Header | None = None
) -> bytes:
    """A disk with both tables; ``primary`` and ``backup`` in the place of what would be right."""
    array_blocks = -(-128 * 128 // block_size)
    first, last = 2 + array_blocks, num_blocks - 2 - array_blocks
    right = Header(1, num_blocks - 1, first, last, DISK, 2, 128, 128, 0)
    front = Header.over(right, entries) if primary is None else primary
    back = Header.over(replace(right, my_lba=num_blocks - 1, alternate_lba=1, entries_lba=last + 1), entries) if backup is None else backup
    array = encode_entries(right, entries)
    disk = bytearray(block_size * num_blocks)
    for lba, data in ((0, protective_mbr(num_blocks)), (1, front.encode()), (2, array), (last + 1, array), (num_blocks - 1, back.encode())):
        disk[lba * block_size : lba * block_size + len(data)] = data
    return bytes(disk)


def spdk_entry(number: int, first: int, last: int, kind: UUID = SPDK_TYPE) -> Entry:
    return Entry(kind, UUID(int=number + 1), first, last, 0, f"part {number}")


async def test_a_table_of_sgdisk_becomes_bdevs(spdk: Spdk, stack: Any, image: Path) -> None:
    unique = "8a4b7d10-0000-4000-8000-00000000abcd"
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{SPDK_GUID}", "-c", "1:first", "-u", f"1:{unique}")
    sgdisk(image, "-n", "2:0:+8M", "-t", f"2:{LINUX}", "-n", "3:0:+4M", "-t", f"3:{SPDK_GUID}", "-c", "3:Größe", "-U", str(DISK))
    assert await attach(spdk, image) == ["disk", "diskp1", "diskp3"]
    (part,) = await spdk("bdev_get_bdevs", "-b", "diskp1")
    assert (part["product_name"], part["num_blocks"], part["uuid"]) == ("GPT Disk", 8 * MIB // 512, unique)
    assert list(part["driver_specific"]["gpt"].items()) == [
        ("base_bdev", "disk"),
        ("offset_blocks", 2048),
        ("partition_table_guid", str(DISK)),
        ("partition_type_guid", SPDK_GUID),
        ("unique_partition_guid", unique),
        ("partition_name", "first"),
    ]
    (third,) = await spdk("bdev_get_bdevs", "-b", "diskp3")
    assert third["driver_specific"]["gpt"]["partition_name"] == "Größe"
    (base,) = await spdk("bdev_get_bdevs", "-b", "disk")
    assert base["claimed"] is True
    await stack.bdevs.handle("diskp1").write(0, b"here" * 128)
    with image.open("rb") as file:
        file.seek(2048 * 512)
        assert file.read(4) == b"here"


async def test_a_table_of_sfdisk_becomes_bdevs(spdk: Spdk, image: Path) -> None:
    script = f"label: gpt\nstart=2048, size=4096, type={SPDK_GUID}\nstart=8192, size=2048, type={SPDK_GUID}\n"
    sfdisk(image, script)
    assert await attach(spdk, image) == ["disk", "diskp1", "diskp2"]


async def test_partitions_of_other_types_are_shown_only_on_request(spdk: Spdk, stack: Any, image: Path) -> None:
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{LINUX}", "-n", "2:0:+8M", "-t", f"2:{LINUX}")
    assert await attach(spdk, image) == ["disk"]
    assert stack.bdevs.info("disk").claimed_by is None
    assert await stack.rpc("qpair_gpt_set_options", all_partitions=True) is True
    assert [info.name for info in stack.bdevs.infos()] == ["disk", "diskp1", "diskp2"]


async def test_the_old_type_is_one_block_smaller(spdk: Spdk, stack: Any, image: Path) -> None:
    sgdisk(image, "-n", "1:2048:4095", "-t", f"1:{OLD_SPDK_TYPE}")
    assert await attach(spdk, image) == ["disk", "diskp1"]
    assert stack.bdevs.info("diskp1").num_blocks == 2047


async def test_a_broken_primary_falls_back_to_the_backup(spdk: Spdk, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{SPDK_GUID}")
    with image.open("r+b") as file:
        file.seek(512 + 40)
        file.write(b"\xff")
    assert await attach(spdk, image) == ["disk", "diskp1"]
    assert "disk: its primary partition table is refused: header CRC" in caplog.text
    assert "disk: its backup partition table is used" in caplog.text


async def test_two_broken_tables_are_none(spdk: Spdk, stack: Any, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{SPDK_GUID}")
    with image.open("r+b") as file:
        for place in (1024, 64 * MIB - 512):
            file.seek(place)
            file.write(b"\xff")
    assert await attach(spdk, image) == ["disk"]
    assert "its primary partition table is refused: entries' CRC" in caplog.text
    assert "its backup partition table is refused too: signature" in caplog.text
    assert stack.bdevs.info("disk").claimed_by is None


async def test_a_disk_without_protective_mbr_is_left_alone(spdk: Spdk, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{SPDK_GUID}")
    with image.open("r+b") as file:
        file.write(bytes(512))
    with caplog.at_level(logging.WARNING):
        assert await attach(spdk, image) == ["disk"]
    assert "partition" not in caplog.text


async def test_an_empty_table_claims_nothing(spdk: Spdk, stack: Any, image: Path) -> None:
    sgdisk(image, "-o")
    assert await attach(spdk, image) == ["disk"]
    assert stack.bdevs.info("disk").claimed_by is None


@pytest.mark.parametrize("block_size", [512, 1024, 4096, 65536])
async def test_tables_on_blocks_of_every_size(spdk: Spdk, stack: Any, tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(disk_bytes(block_size, 128, [spdk_entry(0, 40, 59), spdk_entry(1, 60, 60)]))
    assert await attach(spdk, path, block_size) == ["disk", "diskp1", "diskp2"]
    await stack.bdevs.handle("diskp2").write(0, b"x" * block_size)
    assert path.read_bytes()[60 * block_size : 61 * block_size] == b"x" * block_size


async def test_a_hostile_entry_is_refused_by_name_and_the_rest_goes_on(
    spdk: Spdk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.img"
    entries = [spdk_entry(0, 100, 200), spdk_entry(1, 150, 160), spdk_entry(2, 300, 2**63), spdk_entry(3, 400, 500)]
    path.write_bytes(disk_bytes(512, 2048, entries))
    assert await attach(spdk, path) == ["disk", "diskp4"]
    assert "disk: partition 1 is refused: LBAs 100 to 200 overlap entry 2" in caplog.text
    assert f"disk: partition 3 is refused: LBAs 300 to {2**63}: within 34 to 2014" in caplog.text


async def test_a_primary_that_lies_with_a_right_crc_falls_back_to_the_backup(
    spdk: Spdk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.img"
    lying = Header(1, 2047, 34, 2014, DISK, 2, 2**32 - 1, 128, 0)
    path.write_bytes(disk_bytes(512, 2048, [spdk_entry(0, 100, 200)], primary=lying))
    assert await attach(spdk, path) == ["disk", "diskp1"]
    assert f"number of entries {2**32 - 1}: 1 to 4096" in caplog.text


async def test_a_copied_disk_whose_guids_are_taken_is_left_alone(
    spdk: Spdk, stack: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "disk.img", tmp_path / "copy.img"
    for path in (first, second):
        path.write_bytes(disk_bytes(512, 2048, [spdk_entry(0, 100, 200), spdk_entry(1, 300, 400)]))
    assert await attach(spdk, first) == ["disk", "diskp1", "diskp2"]
    await spdk("bdev_aio_create", str(second), "copy", "512")
    await spdk("bdev_wait_for_examine")
    assert [info.name for info in stack.bdevs.infos()] == ["disk", "diskp1", "diskp2", "copy"]
    assert stack.bdevs.info("copy").claimed_by is None
    assert "bdev copy could not be examined" in caplog.text


async def test_partitions_go_with_their_disk_and_come_back_with_it(spdk: Spdk, stack: Any, image: Path) -> None:
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{SPDK_GUID}")
    for _ in range(2):
        assert await attach(spdk, image) == ["disk", "diskp1"]
        await spdk("bdev_aio_delete", "disk")
        assert stack.bdevs.infos() == []


async def test_a_disk_that_fails_its_reads_is_left_alone(spdk: Spdk, stack: Any, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{SPDK_GUID}")
    stack.bdevs.examiner.auto = False
    assert await attach(spdk, image) == ["disk"]
    await spdk("bdev_error_create", "disk")
    await spdk("bdev_error_inject_error", "EE_disk", "read", "failure", "-n", "1000")
    await spdk("bdev_examine", "-b", "EE_disk")
    assert "EE_disk: its partition table cannot be read" in caplog.text
    assert stack.bdevs.info("EE_disk").claimed_by is None
    await spdk("bdev_error_inject_error", "EE_disk", "clear", "failure")
    await spdk("bdev_examine", "-b", "EE_disk")
    assert "EE_diskp1" in [info.name for info in stack.bdevs.infos()]


async def test_the_option_is_saved_and_tables_are_found_again(spdk: Spdk, stack: Any, make_stack: Any, image: Path, tmp_path: Path) -> None:
    sgdisk(image, "-n", "1:2048:+8M", "-t", f"1:{LINUX}")
    await stack.rpc("qpair_gpt_set_options", all_partitions=True)
    assert await attach(spdk, image) == ["disk", "diskp1"]
    before = await spdk("bdev_get_bdevs")
    async with reloaded(spdk, make_stack, str(tmp_path / "second.sock")) as (config, _, other):
        methods = [call["method"] for call in bdev_calls(config)]
        assert "qpair_gpt_set_options" in methods
        assert not any("parts" in method or "gpt_create" in method for method in methods)
        assert await other("bdev_get_bdevs") == before
