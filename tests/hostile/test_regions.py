"""Guest memory that comes and goes region by region while requests are under way, and logs of dirty pages that are not what they say."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.conftest import World
from hostile.front_end import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_PROTOCOL,
    F_VERSION_1,
    GUEST_BASE,
    NEXT,
    PROTOCOL,
    READ_IN,
    SET_FEATURES,
    SET_VRING_ADDR,
    USER_BASE,
    WRITE,
    FrontEnd,
    Gone,
    Queue,
)
from hostile.process import until

SET_LOG_BASE, SET_LOG_FD, SET_BACKEND_REQ_FD, GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 6, 7, 21, 36, 37, 38
P_LOG, P_BACKEND_REQ, P_MEM_SLOTS = 1 << 1, 1 << 5, 1 << 15
F_LOG_ALL = 1 << 26
REGIONS = 64
REGION_BYTES = 0x10_000
FEATURES = F_PROTOCOL | F_VERSION_1 | F_INDIRECT | F_EVENT_IDX
HEADERS = 0x8000  # of the first region, behind the ring


class Regions(FrontEnd):
    """A front end whose memory is 64 regions, each with a descriptor of its own; the first has the ring."""

    def row(self, number: int) -> bytes:
        at = number * REGION_BYTES
        return struct.pack("<8xQQQQ", GUEST_BASE + at, REGION_BYTES, USER_BASE + at, at)

    def add(self, number: int) -> int:
        return self.order(ADD_MEM_REG, self.row(number), [self.fd])

    def remove(self, number: int) -> int:
        return self.order(REM_MEM_REG, self.row(number))

    def read_into(self, queue: Queue, number: int) -> None:
        """Asks for a block into region ``number``, by descriptors of its own."""
        head, at = 3 * (number % 20), HEADERS + 64 * number
        struct.pack_into("<IIQ", self.memory, at, READ_IN, 0, 8 * (number % 64))
        self.memory[at + 16] = 0xFF
        self.descriptor(queue, head, GUEST_BASE + at, 16, NEXT, head + 1)
        self.descriptor(queue, head + 1, GUEST_BASE + number * REGION_BYTES + 0x4000, 4096, NEXT | WRITE, head + 2)
        self.descriptor(queue, head + 2, GUEST_BASE + at + 16, 1, WRITE)
        self.offer(queue, head)

    def is_read(self, number: int) -> bool:
        at = number * REGION_BYTES + 0x4000
        return self.memory[HEADERS + 64 * number + 16] == 0 and self.memory[at : at + 4096] == bytes([number % 64 + 1]) * 4096


@pytest.fixture
def slow(world: World) -> Iterator[Path]:
    """A disk whose every block of 4 KiB has a value of its own, and whose reads take 20 ms."""
    server = world.server
    with FrontEnd(world.victim) as front_end:
        front_end.ready()
        for number in range(REGIONS):
            status, _ = front_end.io(front_end.queues[0], 1, 8 * number, bytes([number + 1]) * 4096)
            assert status == 0
    server.rpc("vhost_delete_controller", ctrlr="victim")
    latency = {"avg_read_latency": 20_000, "p99_read_latency": 20_000, "avg_write_latency": 0, "p99_write_latency": 0}
    server.rpc("bdev_delay_create", name="slow", base_bdev_name="m1", **latency)
    yield server.export("slow-victim", "slow")
    until(lambda: not server.rpc("vhost_get_controllers", name="slow-victim")[0]["sessions"], "the session is closed")
    server.rpc("vhost_delete_controller", ctrlr="slow-victim")
    server.rpc("bdev_delay_delete", name="slow")
    server.export("victim", "m1")


def test_64_regions_come_and_go_one_by_one_under_a_ring_at_work(world: World, slow: Path) -> None:
    with Regions(slow, memory_bytes=REGIONS * REGION_BYTES) as front_end:
        front_end.agree(FEATURES, PROTOCOL | P_MEM_SLOTS)
        assert front_end.ask_u64(GET_MAX_MEM_SLOTS) == REGIONS
        assert front_end.add(0) == 0
        queue = front_end.add_queue(64)
        assert front_end.start(queue) == 0
        for number in range(1, REGIONS):
            assert front_end.add(number) == 0
            # What is in flight is answered before a table changes.
            assert front_end.is_read(number - 1) or number == 1
            front_end.read_into(queue, number)
    world.fine()


def test_what_is_in_flight_into_a_region_is_answered_before_it_goes(world: World, slow: Path) -> None:
    before = world.server.mark()
    with Regions(slow, memory_bytes=REGIONS * REGION_BYTES) as front_end:
        front_end.agree(FEATURES, PROTOCOL | P_MEM_SLOTS)
        for number in range(REGIONS):
            assert front_end.add(number) == 0
        queue = front_end.add_queue(64)
        assert front_end.start(queue) == 0
        assert len(world.server.guest_mappings()) >= REGIONS
        for number in range(REGIONS - 1, 1, -1):
            front_end.read_into(queue, number)
            assert front_end.remove(number) == 0
            assert front_end.is_read(number), f"region {number} went before what was read into it"
        until(lambda: len(world.server.guest_mappings()) == 2, "what was removed is unmapped")
        for _ in range(REGIONS - 2):
            front_end.take_used(queue)
        front_end.read_into(queue, 40)
        assert front_end.failed(queue)
        address = GUEST_BASE + 40 * REGION_BYTES + 0x4000
        [line] = until(lambda: world.server.lines("queue 0 failed", before), "the log tells of it")
        assert f"descriptor 1 of the chain at 0: {address:#x}+0x1000 is in no memory region" in line
    world.fine()


def test_one_region_too_many_ends_the_session_by_name(world: World) -> None:
    before = world.server.mark()
    with Regions(world.victim, memory_bytes=(REGIONS + 1) * REGION_BYTES) as front_end:
        front_end.agree(FEATURES, PROTOCOL | P_MEM_SLOTS)
        for number in range(REGIONS):
            assert front_end.add(number) == 0
        front_end.send(ADD_MEM_REG, front_end.row(REGIONS), [front_end.fd])
        assert front_end.closed()
    [line] = until(lambda: world.server.lines("broke the protocol", before), "the log tells of it")
    assert "ADD_MEM_REG: number of regions is 65, must be at most 64" in line
    until(lambda: not world.server.guest_mappings(), "all is unmapped")
    world.fine()


def test_a_ring_whose_own_region_goes_is_refused_and_the_session_goes_on(world: World) -> None:
    with Regions(world.victim, memory_bytes=4 * REGION_BYTES) as front_end:
        front_end.agree(FEATURES, PROTOCOL | P_MEM_SLOTS)
        for number in range(4):
            assert front_end.add(number) == 0
        queue = front_end.add_queue(64)
        assert front_end.start(queue) == 0
        assert front_end.remove(0) == errno.EINVAL
        assert front_end.order(SET_FEATURES, struct.pack("<Q", FEATURES)) in (0, errno.EINVAL)
    world.fine()


# -- logs -------------------------------------------------------------------------------------------


def log_file(size: int) -> int:
    fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def set_log(front_end: FrontEnd, fd: int, size: int, offset: int = 0) -> int:
    return front_end.order(SET_LOG_BASE, struct.pack("<QQ", size, offset), [fd])


def logging(front_end: FrontEnd, fd: int, size: int) -> Queue:
    """All that a front end says to have its first queue's writes logged."""
    front_end.agree(FEATURES, PROTOCOL | P_LOG)
    assert front_end.table() == 0
    assert set_log(front_end, fd, size) == 0
    front_end.must(SET_FEATURES, struct.pack("<Q", FEATURES | F_LOG_ALL))
    queue = front_end.add_queue()
    assert front_end.start(queue) == 0
    at = [USER_BASE + queue.desc, USER_BASE + queue.used, USER_BASE + queue.avail]
    front_end.must(SET_VRING_ADDR, struct.pack("<IIQQQQ", queue.index, 1, *at, GUEST_BASE + queue.used))
    return queue


ENOUGH = (GUEST_BASE + (1 << 20)) // 4096 // 8


def test_pages_that_the_device_writes_are_marked_and_no_others(world: World) -> None:
    fd = log_file(ENOUGH)
    with FrontEnd(world.victim) as front_end:
        queue = logging(front_end, fd, ENOUGH)
        os.pwrite(fd, bytes(ENOUGH), 0)
        status, _ = front_end.io(queue, READ_IN, 0, 8192)
        assert status == 0
        pages = [8 * at + bit for at, byte in enumerate(os.pread(fd, ENOUGH, 0)) for bit in range(8) if byte >> bit & 1]
    os.close(fd)
    first = GUEST_BASE // 4096
    # The used ring is the third page of memory; header, status and 8 KiB from 512 bytes on are three pages from 128 KiB on.
    assert pages == [first + 2, first + 32, first + 33, first + 34]
    world.fine()


@pytest.mark.parametrize(
    ("size", "length", "offset", "expected"),
    [
        (4096, 8192, 0, "range 0x0+0x2000 leaves its region of 0x1000 bytes"),
        (4096, 4096, 4096, "range 0x0+0x2000 leaves its region of 0x1000 bytes"),
        (4096, 1 << 63, 0, "range 0x0+0x8000000000000000 leaves its region"),
    ],
)
def test_a_log_that_is_smaller_than_it_says_ends_the_session(world: World, size: int, length: int, offset: int, expected: str) -> None:
    before, fd = world.server.mark(), log_file(size)
    with FrontEnd(world.victim) as front_end:
        front_end.agree(FEATURES, PROTOCOL | P_LOG)
        with pytest.raises(Gone):
            set_log(front_end, fd, length, offset)
    os.close(fd)
    [line] = until(lambda: world.server.lines("victim: session", before), "the log tells of it")
    assert expected in line
    world.fine()


def test_what_is_no_memory_is_no_log(world: World) -> None:
    event = os.eventfd(0)
    reader, writer = os.pipe()
    folder = os.open("/", os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDWR)
    left, right = socket.socketpair()
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(sealed, 4096)
    read_only = os.open(f"/proc/self/fd/{sealed}", os.O_RDONLY)
    given = [event, reader, writer, folder, null, left.fileno(), read_only]
    for fd in given:
        before = world.server.mark()
        with FrontEnd(world.victim) as front_end:
            front_end.agree(FEATURES, PROTOCOL | P_LOG)
            with pytest.raises(Gone):
                set_log(front_end, fd, 4096)
        [line] = until(lambda before=before: world.server.lines("victim: session", before), "the log tells of it")  # type: ignore[misc]
        assert "ended: refused: " in line
    for fd in (event, reader, writer, folder, null, sealed, read_only):
        os.close(fd)
    left.close()
    right.close()
    world.fine()


def test_a_log_that_is_truncated_under_way_ends_the_session(world: World) -> None:
    before, fd = world.server.mark(), log_file(ENOUGH)
    with FrontEnd(world.victim) as front_end:
        queue = logging(front_end, fd, ENOUGH)
        assert front_end.io(queue, READ_IN, 0, 4096)[0] == 0
        os.ftruncate(fd, 0)
        front_end.io(queue, READ_IN, 0, 4096)
        assert front_end.closed()
    os.close(fd)
    [line] = until(lambda: world.server.lines("the engine ended it", before), "the log tells of it")
    assert line.endswith("the engine ended it: the dirty log vanished: its file was truncated")
    world.fine()


def test_a_page_beyond_the_log_ends_the_queue(world: World) -> None:
    before, size = world.server.mark(), (GUEST_BASE + 0x20_000) // 4096 // 8
    fd = log_file(size)
    with FrontEnd(world.victim) as front_end:
        queue = logging(front_end, fd, size)
        with pytest.raises(TimeoutError):
            front_end.io(queue, READ_IN, 0, 4096, timeout_s=0.5)
        assert front_end.failed(queue)
        assert front_end.memory[0x20_000 + 512 : 0x20_000 + 4608] == bytes(4096), "nothing was written"
    os.close(fd)
    [line] = until(lambda: world.server.lines("queue 0 failed", before), "the log tells of it")
    assert "is outside the dirty log, which ends at 0x10020000" in line
    world.fine()


def test_logs_that_come_and_go_leave_nothing_behind(world: World) -> None:
    with FrontEnd(world.victim) as front_end:
        fd = log_file(ENOUGH)
        queue = logging(front_end, fd, ENOUGH)
        descriptors = len(world.server.fds())
        for round_ in range(100):
            assert set_log(front_end, fd, ENOUGH) == 0
            front_end.must(SET_FEATURES, struct.pack("<Q", FEATURES | (F_LOG_ALL if round_ % 2 else 0)))
            assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        until(lambda: len(world.server.fds()) <= descriptors, "descriptors are closed")
        maps = Path(f"/proc/{world.server.pid}/maps").read_text()
        assert maps.count("dirty-log") == 1
        os.close(fd)
    world.fine()


def test_a_front_end_that_lets_its_back_end_channel_rot_is_served_on(world: World) -> None:
    """It never reads what it is asked, then closes its end, while its disk changes its size without end."""
    server = world.server
    server.rpc("bdev_null_create", name="n0", num_blocks=2048, block_size=512)
    path = server.export("rot", "n0")
    left, right = socket.socketpair()
    with FrontEnd(path) as front_end:
        front_end.agree(FEATURES, PROTOCOL | P_BACKEND_REQ)
        assert front_end.table() == 0
        queue = front_end.add_queue()
        assert front_end.start(queue) == 0
        right.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        front_end.must(SET_BACKEND_REQ_FD, b"", [right.fileno()])
        begun = time.monotonic()
        for size in range(60):
            server.rpc("bdev_null_resize", name="n0", new_size=2 + size % 2)
            assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        left.close()
        right.close()
        server.rpc("bdev_null_resize", name="n0", new_size=5)
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        assert time.monotonic() - begun < 30
    until(lambda: not server.rpc("vhost_get_controllers", name="rot")[0]["sessions"], "the session is closed")
    server.rpc("vhost_delete_controller", ctrlr="rot")
    server.rpc("bdev_null_delete", name="n0")
    world.fine()
