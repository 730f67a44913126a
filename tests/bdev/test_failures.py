"""Failures are events: whatever cannot do what it should says so once, with its reason; and says nothing as long as it can."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qpair.bdev.events import EventReader, Failed
from qpair.errors import NoSuchBdev, QpairError

DISK = """
import os, time
import qpair

class Moody(qpair.Bdev):
    def __init__(self, name, flag=""):
        if flag and os.path.exists(flag):
            raise RuntimeError("not twice")
        if flag:
            open(flag, "w").close()
        super().__init__(name, "1MiB")

    def read(self, requests):
        for request in requests:
            request.data[:] = bytes(request.length)

    def write(self, requests):
        order = bytes(requests[0].data[:4])
        if order == b"exit":
            os._exit(3)
        if order == b"hang":
            time.sleep(3600)
"""


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "moody_disks.py").write_text(DISK)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return "moody_disks:Moody"


async def told(reader: EventReader, count: int) -> list[tuple[str, str]]:
    """The next ``count`` failures, and that no other follows soon."""
    found: list[tuple[str, str]] = []
    async with asyncio.timeout(20):
        while len(found) < count:
            event = await anext(reader)
            if isinstance(event, Failed):
                found.append((event.bdev, event.reason))
    await asyncio.sleep(0.3)
    reader.close()
    assert [event async for event in reader if isinstance(event, Failed)] == []
    return found


async def fails(work: Any) -> None:
    with pytest.raises(QpairError):
        await work


# -- files ----------------------------------------------------------------------------------------


async def test_a_file_that_was_cut_is_told_once_however_much_is_read_there(stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    disk = await stack.file("f0", path, block_size=4096)
    reader = stack.events()
    assert await disk.read(1 << 19, 4096) == bytes(4096)
    os.truncate(path, 1 << 19)
    for _ in range(20):
        await fails(disk.read(1 << 19, 4096))
        assert await disk.read(0, 4096) == bytes(4096)
    assert await told(reader, 1) == [("f0", f"{path} ends before byte 524288: it is shorter than the bdev's 1048576 bytes")]


async def test_a_medium_that_refuses_writes_is_told_with_its_errno_and_not_what_the_asker_did_wrong(stack: Any) -> None:
    memory = os.memfd_create("medium", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, 1 << 20)
        path = f"/proc/self/fd/{memory}"
        disk = await stack.file("f0", path, block_size=512)
        reader = stack.events()
        await disk.write(0, bytes(512))
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        await fails(disk.read(1 << 20, 512))  # beyond its end
        for _ in range(20):
            await fails(disk.write(512, bytes(1024)))
        assert await told(reader, 1) == [("f0", f"a write of 2 blocks failed at byte 512 of {path}: Operation not permitted (os error 1)")]
        found = [entry for entry in await stack.rpc("notify_get_notifications") if entry["type"] == "qpair_bdev_failed"]
        assert [entry["ctx"] for entry in found] == ["f0"]
        assert found[0]["qpair"] == {"reason": f"a write of 2 blocks failed at byte 512 of {path}: Operation not permitted (os error 1)"}
    finally:
        os.close(memory)


# -- targets --------------------------------------------------------------------------------------


async def test_a_target_that_went_away_fails_its_bdev_before_it_vanishes(stack: Any, tmp_path: Path) -> None:
    await stack.malloc("m0", "1MiB")
    exported = await stack.export("m0", tmp_path / "target.sock")
    reader = stack.events()
    stack.virtio.set_options(loss_timeout_s=0)
    await stack.virtio.attach("v0", exported.socket)
    await stack.vhost.delete(exported.name, force=True)
    seen = []
    async with asyncio.timeout(20):
        async for event in reader:
            seen.append((event.kind, event.bdev))
            if isinstance(event, Failed):
                assert event.reason.endswith("; the bdev is removed"), event.reason
                assert str(exported.socket) in event.reason
            if event.kind == "vanished":
                break
    assert seen == [("appeared", "v0"), ("failed", "v0"), ("vanished", "v0")]


async def test_a_target_that_is_left_is_no_failure(stack: Any, tmp_path: Path) -> None:
    await stack.malloc("m0", "1MiB")
    exported = await stack.export("m0", tmp_path / "target.sock")
    reader = stack.events()
    await stack.virtio.attach("v0", exported.socket)
    await stack.virtio.detach("v0")
    assert await told(reader, 0) == []


# -- arrays ---------------------------------------------------------------------------------------


async def mirror(stack: Any, *, superblock: bool = False) -> None:
    """r0 of m0 and EE_m1, which fails when it is told to."""
    for name in ("m0", "m1"):
        await stack.malloc(name, "4MiB")
    await stack.rpc("bdev_error_create", base_name="m1")
    await stack.rpc("bdev_raid_create", name="r0", raid_level="raid1", base_bdevs=["m0", "EE_m1"], superblock=superblock)
    await stack.rpc("bdev_wait_for_examine")


async def inject(stack: Any, io_type: str, number: int = 1000, bdev: str = "EE_m1") -> None:
    await stack.rpc("bdev_error_inject_error", name=bdev, io_type=io_type, error_type="failure", num=number)


async def process_is_over(stack: Any) -> None:
    async with asyncio.timeout(20):
        while "process" in (await stack.rpc("bdev_raid_get_bdevs", category="all"))[0]:  # noqa: ASYNC110 (it has no event)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("superblock", [False, True])
async def test_a_member_that_was_dropped_is_named_with_what_it_failed_at(stack: Any, superblock: bool) -> None:
    await mirror(stack, superblock=superblock)
    reader = stack.events()
    await inject(stack, "write")
    async with await stack.open("r0") as disk:
        await asyncio.gather(*(disk.write(at * 512, bytes(512)) for at in range(30)))
    [(name, reason)] = await told(reader, 1)
    assert name == "r0"
    assert reason.startswith("base bdev EE_m1 in slot 1 was dropped: a write failed there: "), reason
    assert reason.endswith("; 1 of 2 members serve")


async def test_a_member_that_is_gone_is_told_and_one_that_was_removed_on_request_is_not(stack: Any) -> None:
    await mirror(stack)
    reader = stack.events()
    await stack.rpc("bdev_raid_remove_base_bdev", name="EE_m1")
    assert await told(reader, 0) == []
    await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="EE_m1")
    await process_is_over(stack)
    reader = stack.events()
    await stack.delete("m1")
    assert await told(reader, 1) == [("r0", "base bdev EE_m1 in slot 1 is gone; 1 of 2 members serve")]


async def test_a_rebuild_that_failed_says_onto_what(stack: Any) -> None:
    await mirror(stack)
    await stack.rpc("bdev_raid_remove_base_bdev", name="EE_m1")
    await inject(stack, "write")
    reader = stack.events()
    await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="EE_m1")
    [(name, reason)] = await told(reader, 1)
    assert (name, reason) == (
        "r0",
        "base bdev EE_m1 in slot 1 was dropped: the rebuild onto it failed, for it could not be written; 1 of 2 members serve",
    )


async def test_a_rebuild_that_has_nothing_to_read_from_says_so(stack: Any) -> None:
    for name in ("m0", "m1"):
        await stack.malloc(name, "4MiB")
    await stack.rpc("bdev_error_create", base_name="m0")
    await stack.rpc("bdev_raid_create", name="r0", raid_level="raid1", base_bdevs=["EE_m0", "m1"])
    await stack.rpc("bdev_wait_for_examine")
    await stack.rpc("bdev_raid_remove_base_bdev", name="m1")
    await inject(stack, "read", bdev="EE_m0")
    reader = stack.events()
    await stack.rpc("bdev_raid_add_base_bdev", raid_bdev="r0", base_bdev="m1")
    assert await told(reader, 1) == [("r0", "the rebuild onto base bdev m1 in slot 1 was given up, for no member could be read")]


async def test_an_array_without_a_member_that_works_says_so_once(stack: Any) -> None:
    await mirror(stack)
    await stack.rpc("bdev_raid_remove_base_bdev", name="m0")
    await inject(stack, "all")
    reader = stack.events()
    async with await stack.open("r0") as disk:
        for _ in range(10):
            await fails(disk.read(512, 512))
            await fails(disk.write(1024, bytes(512)))
    found = dict.fromkeys(reason.partition(": ")[0] for name, reason in await told(reader, 2) if name == "r0")
    assert list(found) == ["no member could do a read of 1 blocks at block 1", "no member could do a write of 1 blocks at block 2"]


@pytest.mark.parametrize("how", ["gone", "removed"])
async def test_an_array_that_goes_offline_names_the_member(stack: Any, how: str) -> None:
    for name in ("m0", "m1"):
        await stack.malloc(name, "4MiB")
    await stack.rpc("bdev_raid_create", name="r0", raid_level="raid0", strip_size_kb=4, base_bdevs=["m0", "m1"])
    reader = stack.events()
    if how == "gone":
        await stack.delete("m1")
    else:
        await stack.rpc("bdev_raid_remove_base_bdev", name="m1")
    reason = f"base bdev m1 in slot 1 {'is' if how == 'gone' else 'was'} {how}, and the array goes offline without it"
    assert await told(reader, 1) == [("r0", reason)]


async def test_arrays_and_python_bdevs_that_end_with_the_stack_have_not_failed(make_stack: Any, moody: str) -> None:
    async with make_stack() as stack:
        await mirror(stack)
        await stack.rpc("qpair_python_create", name="w0", **{"class": moody})
        reader = stack.events()
    assert [event async for event in reader if isinstance(event, Failed)] == []


# -- Python bdevs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "why"), [(b"exit", "the worker exited with 3"), (b"hang", "the worker has not answered for 200 ms")], ids=["exit", "hang"]
)
async def test_a_worker_that_died_or_hung_is_told_once(stack: Any, moody: str, order: bytes, why: str) -> None:
    await stack.rpc("qpair_python_create", name="w0", timeout_ms=200, backoff_ms=10, **{"class": moody})
    reader = stack.events()
    async with await stack.open("w0") as disk:
        outcomes = await asyncio.gather(*(disk.write(at * 512, order.ljust(512)) for at in range(8)), return_exceptions=True)
        assert any(isinstance(outcome, QpairError) for outcome in outcomes)
        assert await asyncio.wait_for(disk.read(0, 512), 20) == bytes(512)
    assert await told(reader, 1) == [("w0", f"{why}; the next one is started")]


async def test_a_worker_that_is_not_started_again_is_told_with_the_policy(stack: Any, moody: str) -> None:
    await stack.rpc("qpair_python_create", name="w0", restart="never", **{"class": moody})
    reader = stack.events()
    async with await stack.open("w0") as disk:
        await fails(disk.write(0, b"exit".ljust(512)))
    assert await told(reader, 1) == [("w0", "the worker exited with 3; it is not started again (restart 'never', restart_max 5)")]


async def test_attempts_to_start_a_worker_are_not_told_but_the_end_of_them(stack: Any, moody: str, tmp_path: Path) -> None:
    options = {"flag": str(tmp_path / "flag")}
    await stack.rpc("qpair_python_create", name="w0", restart_max=2, backoff_ms=1, options=options, **{"class": moody})
    reader = stack.events()
    async with await stack.open("w0") as disk:
        await fails(disk.write(0, b"exit".ljust(512)))
    first, last = await told(reader, 2)
    assert first == ("w0", "the worker exited with 3; the next one is started")
    assert last[1].startswith("the worker could not be started again: "), last
    assert last[1].endswith("; it is not started again (restart 'on-failure', restart_max 2)"), last


async def test_a_bdev_that_is_deleted_has_not_failed(stack: Any, moody: str) -> None:
    await stack.rpc("qpair_python_create", name="w0", **{"class": moody})
    reader = stack.events()
    async with await stack.open("w0") as disk:
        assert await disk.read(0, 512) == bytes(512)
    await stack.rpc("qpair_python_delete", name="w0")
    assert await told(reader, 0) == []


# -- time-outs ------------------------------------------------------------------------------------


async def test_io_that_takes_too_long_is_told_for_the_bdev_that_is_watched(stack: Any) -> None:
    await stack.malloc("m1", "1MiB")
    await stack.rpc("bdev_error_create", base_name="m1")
    reader = stack.events()
    assert await stack.rpc("qpair_bdev_set_timeout", name="EE_m1", timeout_in_sec=1)
    await stack.rpc("bdev_error_inject_error", name="EE_m1", io_type="write", error_type="pending", num=1)
    async with await stack.open("EE_m1") as disk:
        kept = asyncio.ensure_future(disk.write(4096, bytes(1024)))
        [(name, reason)] = await told(reader, 1)
        assert not kept.done(), "it is left alone"
        await stack.rpc("bdev_error_resume_pending", name="EE_m1")
        await asyncio.wait_for(kept, 5)
    assert name == "EE_m1"
    assert reason.startswith("an I/O (Write of 2 blocks at block 8) has been under way for 1."), reason
    assert reason.endswith(" s, the time-out is 1 s"), reason


async def test_time_outs_are_refused_by_name_and_saved(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    for seconds in (-1, 7 * 86_400 + 1, 2**64 - 1, 2**64):
        with pytest.raises(QpairError, match="timeout_in_sec"):
            await stack.rpc("qpair_bdev_set_timeout", name="m0", timeout_in_sec=seconds)
    with pytest.raises(NoSuchBdev):
        await stack.rpc("qpair_bdev_set_timeout", name="m1", timeout_in_sec=1)

    async def saved() -> list[dict[str, Any]]:
        entries = await stack.rpc("framework_get_config", name="bdev")
        return [entry["params"] for entry in entries if entry["method"] == "qpair_bdev_set_timeout"]

    for seconds in (7 * 86_400, 30):
        await stack.rpc("qpair_bdev_set_timeout", name="m0", timeout_in_sec=seconds)
        assert await saved() == [{"name": "m0", "timeout_in_sec": seconds}]
    await stack.rpc("qpair_bdev_set_timeout", name="m0", timeout_in_sec=0)
    assert await saved() == []
    await stack.rpc("qpair_bdev_set_timeout", name="m0", timeout_in_sec=5)
    await stack.delete("m0")
    await stack.malloc("m0", "1MiB")
    assert await saved() == [], "another bdev of that name"
