"""Packed rings that break the rules, against ``qpair serve``: each ends its queue with one line in the log, and the disk beside it never notices.

Descriptors are bytes written by hand (Virtio 1.2, 2.8.13): address, length, buffer id, flags.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

import pytest

from hostile.conftest import World
from hostile.front_end import (
    DATA_AT,
    F_INDIRECT,
    F_PROTOCOL,
    F_VERSION_1,
    GET_VRING_BASE,
    GUEST_BASE,
    INDIRECT,
    NEXT,
    READ_IN,
    SET_INFLIGHT_FD,
    WRITE,
    FrontEnd,
    Queue,
)
from hostile.process import until

F_PACKED = 1 << 34
FEATURES = F_PROTOCOL | F_VERSION_1 | F_INDIRECT | F_PACKED
AVAIL, USED = 1 << 7, 1 << 15
DATA = GUEST_BASE + DATA_AT
TABLE = DATA + 0x4000
# Of a ring that was never used: index 0, wrap counter 1. The upper half of the message is left out.
START = 0x8000
SIZE = 60

Row = tuple[int, int, int, int]


@pytest.fixture
def packed_world(world: World) -> Iterator[World]:
    world.server.rpc("vhost_delete_controller", ctrlr="victim")
    world.server.rpc("vhost_create_blk_controller", ctrlr="victim", dev_name="m1", packed_ring=True)
    yield world
    world.fine()


def write(front_end: FrontEnd, queue: Queue, rows: Sequence[Row], at: int = 0) -> None:
    """Descriptors from ``at`` on, the first one's flags last; then a kick."""
    for index, (address, length, name, flags) in reversed(list(enumerate(rows))):
        front_end.descriptor(queue, at + index, address, length, name, 0)
        front_end.words[(queue.desc + 16 * (at + index)) // 2 + 7] = flags
    front_end.kick(queue)


def used(front_end: FrontEnd, queue: Queue, at: int) -> tuple[int, int] | None:
    """(id, bytes written) if the device wrote there in the first lap."""
    written, name, flags = struct.unpack_from("<IHH", front_end.memory, queue.desc + 16 * at + 8)
    return (name, written) if flags & (AVAIL | USED) == AVAIL | USED else None


def honest(front_end: FrontEnd, queue: Queue, at: int = 0, name: int = 7) -> None:
    """A read of the first block, three descriptors at ``at``; waits for its answer there."""
    struct.pack_into("<IIQ", front_end.memory, DATA_AT, READ_IN, 0, 0)
    front_end.memory[DATA_AT + 16] = 0xFF
    rows = [
        (DATA, 16, 0xDEAD, AVAIL | NEXT),
        (DATA + 512, 512, 0xDEAD, AVAIL | NEXT | WRITE),
        (DATA + 16, 1, name, AVAIL | WRITE),
    ]
    write(front_end, queue, rows, at)
    until(lambda: used(front_end, queue, at) == (name, 513), "the answer")
    assert front_end.memory[DATA_AT + 16] == 0


HEADER: Row = (DATA, 16, 1, AVAIL | NEXT)
STATUS: Row = (DATA + 16, 1, 1, AVAIL | WRITE)
BROKEN: dict[str, tuple[list[Row], str]] = {
    "a buffer id outside the ring": ([HEADER, (DATA + 16, 1, SIZE, AVAIL | WRITE)], "the chain at 0 has buffer id 60, the ring has 60"),
    "a chain whose rest is not available": (
        [HEADER, (DATA, 1, 1, WRITE)],
        "descriptor 1 of the chain at 0 is not available by its wrap bits",
    ),
    "a chain whose rest is used": (
        [HEADER, (DATA, 1, 1, AVAIL | USED)],
        "descriptor 1 of the chain at 0 is not available by its wrap bits",
    ),
    "a chain whose rest is of the next lap": (
        [HEADER, (DATA, 1, 1, USED)],
        "descriptor 1 of the chain at 0 is not available by its wrap bits",
    ),
    "a chain all around the ring": ([HEADER] * SIZE, "the chain at 0 has more than 60 descriptors"),
    "no status": ([(DATA, 16, 1, AVAIL)], "the writable part has 0 bytes, at least 1"),
    "an empty buffer": ([(DATA, 0, 1, AVAIL)], "descriptor 0 of the chain at 0 has length 0"),
    "to read after to write": (
        [HEADER, (DATA, 1, 1, AVAIL | WRITE | NEXT), (DATA, 1, 1, AVAIL)],
        "is for reading but follows one for writing",
    ),
    "data in no region": ([HEADER, (1 << 40, 512, 1, AVAIL | WRITE)], r"0x10000000000\+0x200 is in no memory region"),
    "data that wraps": (
        [HEADER, ((1 << 64) - 256, 512, 1, AVAIL | WRITE | NEXT), STATUS],
        r"0xffffffffffffff00\+0x200 is in no memory region",
    ),
    "an indirect descriptor with a next": ([(TABLE, 32, 1, AVAIL | INDIRECT | NEXT), STATUS], "an indirect descriptor has a next one"),
    "an indirect descriptor behind another": ([HEADER, (TABLE, 32, 1, AVAIL | INDIRECT)], "an indirect descriptor follows another"),
    "half an indirect descriptor": (
        [(TABLE, 24, 1, AVAIL | INDIRECT)],
        "an indirect table is empty, larger than 32768 entries, or cut off",
    ),
    "an empty indirect table": ([(TABLE, 0, 1, AVAIL | INDIRECT)], "an indirect table is empty, larger than 32768 entries, or cut off"),
    "an indirect table in another": ([(TABLE + 64, 32, 1, AVAIL | INDIRECT)], "an indirect table inside an indirect table"),
}


def ready(world: World, queues: int = 2) -> FrontEnd:
    front_end = world.connect().agree(FEATURES)
    assert front_end.table() == 0
    for _ in range(queues):
        queue = front_end.add_queue(SIZE)
        queue.next_avail = START
        assert front_end.start(queue) == 0
    return front_end


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_ring_ends_its_queue_by_name_and_nothing_else(packed_world: World, what: str) -> None:
    rows, reason = BROKEN[what]
    with ready(packed_world) as front_end:
        broken, other = front_end.queues
        at = TABLE - GUEST_BASE + 64
        struct.pack_into("<QIHHQIHH", front_end.memory, at, DATA, 16, 0, 0, TABLE, 16, 0, INDIRECT)
        start = packed_world.server.mark()
        write(front_end, broken, rows)
        assert front_end.failed(broken)
        until(lambda: packed_world.server.lines(reason, start), f"a line about {reason!r} in {packed_world.server.log()[start:]!r}")
        assert len(packed_world.server.lines("victim", start)) == 1, packed_world.server.lines("victim", start)
        # The queue beside it works on, and the broken one does again once it was stopped in order.
        honest(front_end, other)
        assert front_end.ask(GET_VRING_BASE, struct.pack("<II", 0, 0)) == struct.pack("<II", 0, 0x8000_8000)
        front_end.memory[broken.desc : broken.desc + 16 * SIZE] = bytes(16 * SIZE)
        assert front_end.start(broken) == 0
        honest(front_end, broken)


def test_a_ring_is_not_taken_where_its_base_says_it_cannot_be(packed_world: World) -> None:
    with packed_world.connect().agree(FEATURES) as front_end:
        assert front_end.table() == 0
        queue = front_end.add_queue(SIZE)
        queue.next_avail = START | SIZE
        assert front_end.start(queue) != 0
        assert packed_world.server.lines("vring base 0x803c803c: two positions on a ring of 60, at most a lap apart")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (8, 2, "version 2, only 1 is known"),
        (10, 61, "desc_num 61, the ring has 60"),
        (16, 99, "used index 99 with wrap counter 0 on a ring of 60"),
        (14, 61, "its free list names entry 61 of 60"),
        (14, 60, "60 of its 60 entries are neither free nor in flight"),
    ],
)
def test_an_inflight_region_that_lies_is_refused_by_name(packed_world: World, at: int, value: int, reason: str) -> None:
    size = 32 * (SIZE + 1) + 32
    fd = os.memfd_create("lies", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, struct.pack("<QHH", 0, 1, SIZE), 0)
        os.pwrite(fd, struct.pack("<H", value), at)
        with packed_world.connect().agree(FEATURES) as front_end:
            assert front_end.table() == 0
            front_end.must(SET_INFLIGHT_FD, struct.pack("<QQHHI", size, 0, 1, SIZE, 0), [fd])
            queue = front_end.add_queue(SIZE)
            queue.next_avail = START
            start = packed_world.server.mark()
            assert front_end.start(queue) != 0
            assert packed_world.server.lines(f"inflight region: {reason}", start), packed_world.server.log()[start:]
    finally:
        os.close(fd)
