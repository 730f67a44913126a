"""Error injection, by spdk-rpc and single I/Os."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from qpair.errors import QpairError
from vbdevs import Spdk, bdev_calls, reloaded


async def made(spdk: Spdk) -> None:
    await spdk("bdev_malloc_create", "-b", "disk", "4", "512")
    await spdk("bdev_error_create", "disk")


async def outcomes(disk: Any, count: int) -> list[int]:
    """Errnos of reads one after the other; 0 for success."""
    found = []
    for _ in range(count):
        try:
            await disk.read(0, 512)
            found.append(0)
        except QpairError as error:
            found.append(error.errno)
    return found


async def test_it_shows_itself_as_spdks(spdk: Spdk) -> None:
    await made(spdk)
    (shown,) = await spdk("bdev_get_bdevs", "-b", "EE_disk")
    assert shown["product_name"] == "Error Injection Disk"
    assert shown["driver_specific"] == {"error_disk": {"base_bdev": "disk"}}


async def test_so_many_ios_fail_and_then_none(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    async with await stack.bdevs.handle("EE_disk").open() as disk:
        await spdk("bdev_error_inject_error", "EE_disk", "read", "failure", "-n", "3")
        await disk.write(0, bytes(512))
        assert await outcomes(disk, 5) == [errno.EIO] * 3 + [0, 0]
        await spdk("bdev_error_inject_error", "EE_disk", "all", "failure", "-n", "1000")
        assert await outcomes(disk, 1) == [errno.EIO]
        for failing in (disk.flush(), disk.unmap(0, 512), disk.write(0, bytes(512))):
            with pytest.raises(QpairError):
                await failing
        await spdk("bdev_error_inject_error", "EE_disk", "clear", "failure")
        assert await outcomes(disk, 1) == [0]


async def test_an_nvme_status_comes_back_as_its_errno(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    # Space allocation is exhausted: generic, 0x81.
    await stack.rpc("bdev_error_inject_error", name="EE_disk", io_type="read", error_type="nvme_failure", nvme_sct=0, nvme_sc=0x81)
    async with await stack.bdevs.handle("EE_disk").open() as disk:
        assert await outcomes(disk, 2) == [errno.ENOSPC, 0]


async def test_a_spoilt_read_and_a_spoilt_write_differ_in_one_byte(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    async with await stack.bdevs.handle("EE_disk").open() as disk:
        await disk.write(0, b"a" * 1024)
        await spdk("bdev_error_inject_error", "EE_disk", "read", "corrupt_data", "-n", "1", "-o", "513", "-v", "3")
        assert await disk.read(0, 1024) == b"a" * 513 + b"b" + b"a" * 510
        assert await disk.read(0, 1024) == b"a" * 1024
        await spdk("bdev_error_inject_error", "EE_disk", "write", "corrupt_data", "-n", "1", "-o", "0", "-v", "3")
        await disk.write(2048, b"a" * 512)
        assert await disk.read(2048, 512) == b"b" + b"a" * 511


async def test_what_is_kept_goes_on_when_it_is_resumed(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    await spdk("bdev_error_inject_error", "EE_disk", "write", "pending", "-n", "4")
    async with await stack.bdevs.handle("EE_disk").open() as disk:
        kept = [asyncio.ensure_future(disk.write(at * 512, bytes([at + 1]) * 512)) for at in range(4)]
        await asyncio.sleep(0.1)
        assert not any(one.done() for one in kept)
        assert await stack.rpc("bdev_error_resume_pending", name="EE_disk") is True
        await asyncio.wait_for(asyncio.gather(*kept), 5)
        assert await disk.read(0, 2048) == b"".join(bytes([at + 1]) * 512 for at in range(4))


async def test_what_is_kept_ends_by_a_reset(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    await spdk("bdev_error_inject_error", "EE_disk", "read", "pending")
    async with await stack.bdevs.handle("EE_disk").open() as disk:
        kept = asyncio.ensure_future(disk.read(0, 512))
        await asyncio.sleep(0.05)
        await disk.reset()
        with pytest.raises(QpairError):
            await asyncio.wait_for(kept, 5)
        assert await outcomes(disk, 1) == [0]


async def test_one_that_finds_no_memory_is_tried_again(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    await spdk("bdev_error_inject_error", "EE_disk", "read", "nomem", "-n", "2")
    async with await stack.bdevs.handle("EE_disk").open() as disk:
        assert await asyncio.wait_for(outcomes(disk, 2), 5) == [0, 0]


async def test_refusals_name_what_is_wrong(spdk: Spdk, stack: Any) -> None:
    await made(spdk)
    assert await spdk.refusal("bdev_error_create", "disk") == (-17, "File exists")
    assert await spdk.refusal("bdev_error_delete", "disk") == (-19, "No such device")
    assert await spdk.refusal("bdev_error_delete", "EE_other") == (-19, "No such device")
    assert await spdk.refusal("bdev_error_inject_error", "disk", "read", "failure") == (-19, "No such device")
    assert await spdk.refusal("bdev_error_inject_error", "EE_disk", "read", "corrupt_data") == (-22, "Invalid argument")
    with pytest.raises(QpairError, match="nvme_sct or nvme_sc should be specified for NVMe error injection"):
        await stack.rpc("bdev_error_inject_error", name="EE_disk", io_type="read", error_type="nvme_failure")
    with pytest.raises(QpairError, match="nvme_sct 8: 0 to 7"):
        await stack.rpc("bdev_error_inject_error", name="EE_disk", io_type="read", error_type="nvme_failure", nvme_sct=8)
    with pytest.raises(QpairError, match="corrupt_value 0: 1 to 255"):
        await stack.rpc("bdev_error_inject_error", name="EE_disk", io_type="read", error_type="corrupt_data")
    with pytest.raises(QpairError, match="is no error bdev"):
        await stack.rpc("bdev_error_resume_pending", name="disk")


async def test_delete_frees_the_base(spdk: Spdk) -> None:
    await made(spdk)
    await spdk("bdev_error_delete", "EE_disk")
    (base,) = await spdk("bdev_get_bdevs")
    assert (base["name"], base["claimed"]) == ("disk", False)
    await spdk("bdev_error_create", "disk")


async def test_a_base_may_come_later_and_takes_it_along(spdk: Spdk, stack: Any) -> None:
    await spdk("bdev_error_create", "late")
    await spdk("bdev_malloc_create", "-b", "late", "4", "512")
    await spdk("bdev_wait_for_examine")
    await stack.rpc("bdev_error_inject_error", name="EE_late", io_type="read", error_type="failure")
    await spdk("bdev_malloc_delete", "late")
    assert await spdk("bdev_get_bdevs") == []
    # As in SPDK: with its base it is forgotten.
    await spdk("bdev_malloc_create", "-b", "late", "4", "512")
    await spdk("bdev_wait_for_examine")
    assert [info.name for info in stack.bdevs.infos()] == ["late"]


async def test_it_is_saved_and_loaded_without_what_is_injected(spdk: Spdk, make_stack: Any, tmp_path: Path) -> None:
    await made(spdk)
    await spdk("bdev_error_create", "later")
    await spdk("bdev_error_inject_error", "EE_disk", "read", "failure", "-n", "100")
    before = await spdk("bdev_get_bdevs")
    async with reloaded(spdk, make_stack, str(tmp_path / "second.sock")) as (config, second, other):
        calls = [call["params"] for call in bdev_calls(config) if call["method"] == "bdev_error_create"]
        assert calls == [{"base_name": "disk"}, {"base_name": "later"}]
        assert await other("bdev_get_bdevs") == before
        async with await second.bdevs.handle("EE_disk").open() as disk:
            assert await outcomes(disk, 1) == [0]
