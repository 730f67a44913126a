"""Our initiator on targets that are killed: its I/O waits for the next one, and nothing that was acknowledged is lost.

The load is a plain model: each of many writers has blocks of its own, one I/O a block at a time, and knows what the last acknowledged write to it was. An I/O that is not answered when
the target is killed must be answered by its successor, with success.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from interop.peers import QpairServer, StorageDaemon
from qpair import Stack
from qpair.bdev.client import OpenBdev
from qpair.bdev.events import Event, EventReader
from qpair.errors import QpairError

BLOCK = 4096
BLOCKS = 512
WRITERS = 32


class Writer:
    """Random writes and reads, verified, on every `WRITERS`-th block."""

    def __init__(self, disk: OpenBdev, number: int) -> None:
        self.disk = disk
        self.blocks = {block: bytes(BLOCK) for block in range(number, BLOCKS, WRITERS)}
        self.random = random.Random(number)
        self.done = 0

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            block = self.random.choice(sorted(self.blocks))
            if self.random.random() < 0.3:
                assert await self.disk.read(block * BLOCK, BLOCK) == self.blocks[block], f"block {block} before"
            else:
                data = self.random.randbytes(64) * (BLOCK // 64)
                await self.disk.write(block * BLOCK, data)
                self.blocks[block] = data
            self.done += 1

    def check(self, stored: bytes) -> None:
        for block, data in self.blocks.items():
            assert stored[block * BLOCK : (block + 1) * BLOCK] == data, f"block {block} in the file"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(BLOCK * BLOCKS))
    return path


@pytest_asyncio.fixture
async def initiator() -> AsyncIterator[Stack]:
    async with Stack(cores=sorted(os.sched_getaffinity(0))[:2]) as stack:
        yield stack


class OurTarget:
    """``qpair serve`` with one disk on an image, to be killed and started again."""

    def __init__(self, folder: Path, image: Path, *, packed: bool) -> None:
        self.folder, self.image, self.packed = folder, image, packed
        self.socket = folder / "disk.sock"
        self._running = contextlib.ExitStack()
        self.server: QpairServer

    def start(self) -> None:
        self.server = self._running.enter_context(QpairServer(self.folder))
        self.server.rpc("bdev_aio_create", name="disk0", filename=str(self.image), block_size=512)
        self.server.export_disk("disk.sock", "disk0", packed_ring=self.packed)

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()

    def close(self) -> None:
        self._running.close()


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def our_target(request: Any, tmp_path: Path, image: Path) -> Iterator[OurTarget]:
    target = OurTarget(tmp_path, image, packed=request.param)
    with contextlib.closing(target):
        target.start()
        yield target


async def survive(stack: Stack, disk: OpenBdev, kill: Callable[[], None], start: Callable[[], None], image: Path, times: int) -> int:
    """A load through so many kills; how many I/Os that were."""
    stop, writers = asyncio.Event(), [Writer(disk, number) for number in range(WRITERS)]
    tasks = [asyncio.create_task(writer.run(stop)) for writer in writers]
    for time in range(times):
        await asyncio.sleep(0.1 + 0.05 * time)
        await asyncio.to_thread(kill)
        await asyncio.sleep(0.05 * time)
        before = sum(writer.done for writer in writers)
        await asyncio.to_thread(start)
        async with asyncio.timeout(30):
            while sum(writer.done for writer in writers) < before + 10 * WRITERS:
                assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]
                await asyncio.sleep(0.01)
    stop.set()
    async with asyncio.timeout(30):
        await asyncio.gather(*tasks)
    await disk.flush()
    stored = image.read_bytes()
    for writer in writers:
        writer.check(stored)
    return sum(writer.done for writer in writers)


async def until(reader: EventReader, kind: str) -> AsyncIterator[Event]:
    """Events of the disk, up to the first of that kind."""
    async for event in reader:
        yield event
        if event.kind == kind:
            return


async def test_our_target_killed_again_and_again_under_a_load_loses_nothing(initiator: Stack, our_target: OurTarget, image: Path) -> None:
    controller = await initiator.virtio.attach("remote0", our_target.socket)
    assert controller.num_queues == 2, "one a reactor"
    async with await initiator.open("remote0") as disk:
        assert await survive(initiator, disk, our_target.kill, our_target.start, image, 5) > 50 * WRITERS


async def test_qemus_storage_daemon_killed_under_a_load_loses_nothing(
    initiator: Stack, storage_daemon: Callable[..., StorageDaemon], image: Path
) -> None:
    running = [storage_daemon(image)]

    def kill() -> None:
        running[-1].process.kill()
        running[-1].process.wait()
        running[-1].socket.unlink()

    await initiator.virtio.attach("remote0", running[0].socket)
    async with await initiator.open("remote0") as disk:
        assert await survive(initiator, disk, kill, lambda: running.append(storage_daemon(image)), image, 3) > 30 * WRITERS


async def test_io_that_waits_for_a_target_ends_when_the_bdev_is_detached(initiator: Stack, our_target: OurTarget) -> None:
    await initiator.virtio.attach("remote0", our_target.socket)
    async with await initiator.open("remote0") as disk:
        await disk.write(0, bytes(BLOCK))
        our_target.kill()
        waiting = [asyncio.create_task(disk.write(block * BLOCK, bytes(BLOCK))) for block in range(100)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in waiting)
        async with asyncio.timeout(2):
            await initiator.virtio.detach("remote0")
            ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, QpairError) for error in ended)


async def test_io_that_waits_for_a_target_ends_when_its_limit_passes(initiator: Stack, our_target: OurTarget) -> None:
    initiator.virtio.set_options(loss_timeout_s=0.5)
    await initiator.virtio.attach("remote0", our_target.socket)
    async with await initiator.open("remote0") as disk:
        our_target.kill()
        async with asyncio.timeout(5):
            with pytest.raises(QpairError):
                await disk.write(0, bytes(BLOCK))


async def test_a_reset_while_the_target_is_away_ends_what_waits(initiator: Stack, our_target: OurTarget) -> None:
    await initiator.virtio.attach("remote0", our_target.socket)
    async with await initiator.open("remote0") as disk:
        our_target.kill()
        await asyncio.sleep(0.2)
        waiting = asyncio.create_task(disk.write(0, bytes(BLOCK)))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            await disk.reset()
            with pytest.raises(QpairError, match="aborted on request"):
                await waiting
        our_target.start()
        async with asyncio.timeout(10):
            await disk.write(0, b"\x42" * BLOCK)
            assert await disk.read(0, BLOCK) == b"\x42" * BLOCK


async def test_a_disk_that_grew_while_its_target_was_away_is_as_large_as_it_is(
    initiator: Stack, our_target: OurTarget, image: Path
) -> None:
    await initiator.virtio.attach("remote0", our_target.socket)
    reader = initiator.events()
    our_target.kill()
    with image.open("r+b") as file:
        file.truncate(2 * BLOCK * BLOCKS)
    our_target.start()
    async with asyncio.timeout(10):
        kinds = [event.kind async for event in until(reader, "resized")]
    assert kinds[-2:] == ["failed", "resized"]
    assert initiator.bdevs.handle("remote0").size_bytes == 2 * BLOCK * BLOCKS


async def test_two_reactors_use_two_queues_and_both_find_the_next_target(initiator: Stack, our_target: OurTarget) -> None:
    await initiator.virtio.attach("remote0", our_target.socket)
    run = await initiator.perf("remote0", pattern="randrw", depth=16, verify=True, seconds=3, cores=initiator.cores)
    await asyncio.sleep(0.5)
    our_target.kill()
    await asyncio.to_thread(our_target.start)
    async with asyncio.timeout(20):
        result = await run.result()
    assert result.errors == 0
    [controller] = our_target.server.rpc("vhost_get_controllers")
    [session] = controller["sessions"]
    assert [queue["requests"] > 100 for queue in session["queues"]][:3] == [True, True, False]
