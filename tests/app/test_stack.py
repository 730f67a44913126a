"""A stack's life: start and stop in order, states, forks, and the short way to a disk."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import Any

import pytest

from qpair.app.subsystems import Subsystem
from qpair.errors import (
    AlreadyExists,
    Busy,
    ForkedStack,
    InvalidArgument,
    NoSuchBdev,
    NoSuchFile,
    QpairError,
    StackStopped,
    SubsystemError,
)


def recorder(name: str, depends_on: tuple[str, ...], log: list[str], *, fails: bool = False, hangs: bool = False) -> Subsystem:
    class Recorder(Subsystem):
        async def start(self, stack: Any) -> None:
            if fails:
                raise InvalidArgument(f"{name} cannot")
            log.append(f"+{name}")

        async def stop(self, stack: Any, deadline_ms: int) -> None:
            if hangs:
                await asyncio.sleep(60)
            log.append(f"-{name}")

    Recorder.name, Recorder.depends_on = name, depends_on
    return Recorder()


async def test_subsystems_start_after_what_they_need_and_stop_before_it(make_stack: Any) -> None:
    log: list[str] = []
    stack = make_stack()
    stack.add_subsystem(recorder("top", ("middle", "bdev"), log))
    stack.add_subsystem(recorder("middle", ("base",), log))
    stack.add_subsystem(recorder("base", (), log))
    async with stack:
        assert log == ["+base", "+middle", "+top"]
        assert stack.state == "runtime"
    assert log == ["+base", "+middle", "+top", "-top", "-middle", "-base"]
    assert stack.state == "stopped"


async def test_a_subsystem_that_cannot_start_stops_those_before_it(make_stack: Any) -> None:
    log: list[str] = []
    stack = make_stack()
    stack.add_subsystem(recorder("one", ("bdev",), log))
    stack.add_subsystem(recorder("two", ("one",), log, fails=True))
    with pytest.raises(InvalidArgument, match="two cannot"):
        await stack.start()
    assert log == ["+one", "-one"]
    assert stack.state == "stopped"


async def test_subsystems_are_started_by_one_caller_and_a_failed_start_may_be_tried_again(make_stack: Any) -> None:
    log: list[str] = []
    gate = asyncio.Event()

    class Gated(Subsystem):
        name = "gated"
        depends_on = ("bdev",)
        fails = True

        async def start(self, stack: Any) -> None:
            await gate.wait()
            if Gated.fails:
                raise InvalidArgument("not yet")
            log.append("+gated")

    stack = make_stack(wait_for_rpc=True)
    stack.add_subsystem(recorder("before", (), log))
    stack.add_subsystem(Gated())
    async with stack:
        first = asyncio.ensure_future(stack.rpc("framework_start_init"))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="the subsystems are being started"):
            await stack.rpc("framework_start_init")
        gate.set()
        with pytest.raises(InvalidArgument, match="not yet"):
            await first
        assert (stack.state, log) == ("startup", ["+before", "-before"])
        Gated.fails = False
        await stack.rpc("framework_start_init")
        assert (stack.state, log) == ("runtime", ["+before", "-before", "+before", "+gated"])


async def test_a_missing_dependency_is_found_before_anything_runs(make_stack: Any) -> None:
    stack = make_stack()
    stack.add_subsystem(recorder("lonely", ("nobody",), []))
    with pytest.raises(SubsystemError, match="'lonely' depends on 'nobody', which does not exist"):
        await stack.start()
    with pytest.raises(StackStopped, match="the stack is new"):
        _ = stack.engine


async def test_a_subsystem_that_hangs_in_stop_is_abandoned_by_name(make_stack: Any, caplog: pytest.LogCaptureFixture) -> None:
    stack = make_stack(stop_deadline_ms=200)
    stack.add_subsystem(recorder("stuck", ("bdev",), [], hangs=True))
    await stack.start()
    await asyncio.wait_for(stack.stop(), 5)
    assert stack.state == "stopped"
    assert "subsystem stuck did not stop within 0.2 s and is abandoned" in caplog.text


async def test_a_waiting_stack_starts_its_subsystems_when_told(make_stack: Any) -> None:
    async with make_stack(wait_for_rpc=True) as stack:
        assert stack.state == "startup"
        with pytest.raises(QpairError, match="only be called after framework is initialized") as early:
            await stack.rpc("bdev_get_bdevs")
        assert early.value.code == -1
        waiter = asyncio.ensure_future(stack.rpc("framework_wait_init"))
        await asyncio.sleep(0)
        assert not waiter.done()
        assert "bdev_get_bdevs" not in await stack.rpc("rpc_get_methods", current=True)
        await stack.rpc("framework_start_init")
        assert await waiter is True
        assert await stack.rpc("bdev_get_bdevs") == []
        with pytest.raises(QpairError, match="only be called before framework is initialized") as late:
            await stack.rpc("framework_start_init")
        assert late.value.code == -1


async def test_a_stopped_stack_refuses_by_name_and_stops_twice(make_stack: Any) -> None:
    stack = make_stack()
    await stack.start()
    disk = await stack.malloc("m0", "1MiB")
    await stack.stop()
    await stack.stop()
    with pytest.raises(StackStopped, match="the stack is stopped"):
        await disk.read(0, 512)
    with pytest.raises(StackStopped, match="a stack starts once"):
        await stack.start()


async def test_a_core_that_this_process_may_not_use_is_refused(make_stack: Any) -> None:
    with pytest.raises(InvalidArgument, match="core 1023 is not usable by this process; usable: "):
        await make_stack(cores="1023").start()


def fork_and_ask(stack: Any) -> tuple[int, str]:
    """What a forked child finds when it uses the stack."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _ = stack.engine
            found = "alive"
        except ForkedStack as error:
            found = f"{type(error).__name__} {error}"
        os.write(writer, found.encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    answer = os.read(reader, 4096).decode()
    os.close(reader)
    return status, answer


async def test_a_forked_child_finds_its_stack_dead_by_name(stack: Any) -> None:
    status, answer = fork_and_ask(stack)
    assert status == 0
    assert answer == f"ForkedStack this stack belongs to process {os.getpid()}, of which this one is a fork; start a new stack"
    await stack.malloc("m0", "1MiB")  # the parent's goes on


async def test_a_running_stack_that_is_dropped_warns(make_stack: Any) -> None:
    stack = make_stack()
    await stack.start()
    engine = stack.engine
    asyncio.get_running_loop().remove_reader(engine.event_fd)
    del stack
    with pytest.warns(ResourceWarning, match="was dropped while running"):
        gc.collect()
    engine.stop(1000)


async def test_a_disk_is_made_written_read_and_deleted(stack: Any) -> None:
    disk = await stack.malloc("disk0", "64MiB")
    assert disk.size_bytes == 64 << 20
    async with await stack.open("disk0") as opened:
        await opened.write(4096, bytearray(b"qpair" * 1024)[:4096])
        await opened.flush()
        assert (await opened.read(4096, 4096))[:10] == b"qpairqpair"
        await opened.write_zeroes(4096, 4096)
        assert await opened.read(4096, 4096) == bytes(4096)
        await opened.unmap(0, 1 << 20)
        large = os.urandom(3 << 20)
        await opened.write(8 << 20, large)
        assert await opened.read(8 << 20, 3 << 20) == large
    await stack.delete(disk)
    with pytest.raises(NoSuchBdev, match="no bdev is named 'disk0'"):
        _ = disk.info


async def test_wrong_geometry_and_names_are_refused_by_name(stack: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="bdev 'm': size 1000 is no multiple of block_size 512"):
        await stack.malloc("m", 1000)
    with pytest.raises(InvalidArgument, match="bdev 'm': it would have 0 blocks"):
        await stack.malloc("m", 0)
    with pytest.raises(InvalidArgument, match="bdev name '': 1 to 255 printable characters"):
        await stack.null("", "1MiB")
    await stack.null("n", "1MiB")
    with pytest.raises(AlreadyExists):
        await stack.null("n", "1MiB")
    with pytest.raises(FileNotFoundError):
        await stack.file("f", tmp_path / "nothing")
    async with await stack.open("n") as opened:
        with pytest.raises(InvalidArgument, match="offset 100 is no multiple of the block size 512"):
            await opened.read(100, 512)
        with pytest.raises(InvalidArgument):
            await opened.read(1 << 20, 512)


async def test_a_bdev_goes_by_its_uuid_too(stack: Any) -> None:
    disk = await stack.malloc("m", "1MiB", uuid="6f1c0000-0000-4000-8000-0000000000aa")
    assert stack.bdevs.info("6f1c0000-0000-4000-8000-0000000000aa").name == disk.name


async def test_a_claim_is_shown_and_does_not_hold_up_a_deletion(stack: Any) -> None:
    """As with SPDK: who claimed it hears that it goes."""
    await stack.malloc("m", "1MiB")
    stack.engine.bdev_claim("m", "somebody")
    assert (await stack.rpc("bdev_get_bdevs", name="m"))[0]["claim_type"] == "exclusive_write"
    with pytest.raises(OSError, match="bdev m is claimed by somebody"):
        stack.engine.bdev_claim("m", "another")
    await stack.delete("m")
    assert stack.bdevs.infos() == []


async def test_a_file_is_made_at_a_size_and_keeps_what_was_written(stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    disk = await stack.file("f", path, size="4MiB")
    assert disk.size_bytes == 4 << 20
    assert path.stat().st_size == 4 << 20


async def test_bdev_get_bdevs_waits_for_one_that_is_yet_to_come(stack: Any) -> None:
    waiting = asyncio.ensure_future(stack.rpc("bdev_get_bdevs", name="late", timeout=5000))
    await asyncio.sleep(0.01)
    await stack.null("late", "1MiB")
    assert (await waiting)[0]["name"] == "late"
    with pytest.raises(NoSuchBdev):
        await stack.rpc("bdev_get_bdevs", name="never", timeout=20)


async def test_a_load_tells_how_far_it_is_until_it_ends(stack: Any) -> None:
    await stack.null("n", "1GiB")
    run = await stack.perf("n", seconds=0.5)
    seen = [snapshot async for snapshot in run.progress(0.05)]
    assert len(seen) >= 3
    assert all(snapshot.errors == 0 for snapshot in seen)
    assert [snapshot.ios for snapshot in seen] == sorted(snapshot.ios for snapshot in seen)
    assert (await run.result()).ios >= seen[-1].ios
    with pytest.raises(NoSuchFile):
        run.snapshot()
    run.stop()


async def test_a_load_is_measured_and_stopped_early(stack: Any) -> None:
    await stack.null("n", "1GiB")
    result = await stack.measure("n", ios=1000, depth=8)
    assert result.ios >= 1000
    assert result.iops > 0
    assert result.p50_ns <= result.p99_99_ns <= result.max_ns or result.max_ns == 0
    run = await stack.perf("n", seconds=60)
    await asyncio.sleep(0.05)
    assert run.snapshot().errors == 0
    run.stop()
    assert (await asyncio.wait_for(run.result(), 10)).errors == 0
    with pytest.raises(InvalidArgument, match="pattern 'sideways' is none of"):
        await stack.perf("n", pattern="sideways")
    with pytest.raises(InvalidArgument, match="io_size 100 is no multiple of the block size 512"):
        await stack.perf("n", io_size=100)
