"""Rings that break the rules, against ``qpair serve``: each ends its queue with one line in the log, and the disk beside it never notices."""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Callable

import pytest

from hostile.conftest import World
from hostile.front_end import (
    DATA_AT,
    DISCARD,
    F_PROTOCOL,
    F_VERSION_1,
    GET_VRING_BASE,
    GUEST_BASE,
    INDIRECT,
    NEXT,
    READ_IN,
    SET_VRING_BASE,
    SET_VRING_KICK,
    SET_VRING_NUM,
    USER_BASE,
    WRITE,
    WRITE_OUT,
    WRITE_ZEROES,
    FrontEnd,
    Queue,
)
from hostile.process import until

TABLE = GUEST_BASE + DATA_AT + 0x4000  # of indirect descriptors
DATA = GUEST_BASE + DATA_AT

Breaker = Callable[[FrontEnd, Queue], None]


def chain(*parts: tuple[int, int, int]) -> Breaker:
    """A chain of (address, length, flags) at descriptor 0; NEXT is set on all but the last."""

    def write(front_end: FrontEnd, queue: Queue) -> None:
        for index, (address, length, flags) in enumerate(parts):
            more = NEXT if index + 1 < len(parts) else 0
            front_end.descriptor(queue, index, address, length, flags | more, index + 1)
        front_end.offer(queue, 0)

    return write


def indirect(length: int, *parts: tuple[int, int, int, int], address: int = TABLE, flags: int = 0) -> Breaker:
    """One indirect descriptor; its table holds (address, length, flags, next)."""

    def write(front_end: FrontEnd, queue: Queue) -> None:
        for index, part in enumerate(parts):
            struct.pack_into("<QIHH", front_end.memory, TABLE - GUEST_BASE + 16 * index, *part)
        front_end.descriptor(queue, 0, address, length, INDIRECT | flags, 1)
        front_end.offer(queue, 0)

    return write


def loop(*order: int) -> Breaker:
    def write(front_end: FrontEnd, queue: Queue) -> None:
        for index, following in zip(order, (*order[1:], order[0]), strict=True):
            front_end.descriptor(queue, index, DATA, 16, NEXT, following)
        front_end.offer(queue, order[0])

    return write


def jump(by: int) -> Breaker:
    return lambda front_end, queue: front_end.offer(queue, ahead=by)


HEADER = (DATA, 16, 0)
STATUS = (DATA + 16, 1, WRITE)
END = 1 << 64

BROKEN: dict[str, tuple[Breaker, str]] = {
    "a descriptor that names itself": (loop(0), "the chain at 0 has more than 64 descriptors"),
    "a circle of three": (loop(3, 9, 5), "the chain at 3 has more than 64 descriptors"),
    "a next outside the table": (
        lambda f, q: (f.descriptor(q, 0, DATA, 16, NEXT, 64), f.offer(q, 0))[1],
        "descriptor 64 is outside the table of 64",
    ),
    "a head outside the table": (lambda f, q: f.offer(q, 0xFFFF), "descriptor 65535 is outside the table of 64"),
    "a header in no region": (chain((0x10, 16, 0), STATUS), "descriptor 0 of the chain at 0: 0x10\\+0x10 is in no memory region"),
    "data in no region": (chain(HEADER, (1 << 40, 512, WRITE), STATUS), "descriptor 1 of the chain at 0: 0x10000000000\\+0x200 is in no"),
    "data over the end of the region": (
        chain(HEADER, (GUEST_BASE + (1 << 20) - 512, 1024, WRITE), STATUS),
        "descriptor 1 of the chain at 0: 0x100ffe00\\+0x400 is in no memory region",
    ),
    "data of 4 GiB": (chain(HEADER, (DATA, 0xFFFF_FFFF, WRITE), STATUS), r"descriptor 1 of the chain at 0: .*\+0xffffffff is in no"),
    "data that wraps": (chain(HEADER, (END - 256, 512, WRITE), STATUS), r"0xffffffffffffff00\+0x200 is in no memory region"),
    "readable data that wraps": (chain(HEADER, (END - 256, 512, 0), STATUS), r"0xffffffffffffff00\+0x200 is in no memory region"),
    "a header that wraps": (chain((END - 8, 16, 0), STATUS), r"0xfffffffffffffff8\+0x10 is in no memory region"),
    "a status that wraps": (chain(HEADER, (END - 1, 2, WRITE)), r"0xffffffffffffffff\+0x2 is in no memory region"),
    "a status in no region": (chain(HEADER, (0x20, 1, WRITE)), r"0x20\+0x1 is in no memory region"),
    "an empty header": (chain((DATA, 0, 0), STATUS), "descriptor 0 of the chain at 0 has length 0"),
    "empty data": (chain(HEADER, (DATA, 0, WRITE), STATUS), "descriptor 1 of the chain at 0 has length 0"),
    "an empty status": (chain(HEADER, (DATA, 0, WRITE)), "descriptor 1 of the chain at 0 has length 0"),
    "to read after to write": (chain(HEADER, STATUS, (DATA, 512, 0)), "descriptor 2 of the chain at 0 is for reading but follows"),
    "a short header": (chain((DATA, 15, 0), STATUS), "the header has 15 bytes, at least 16 are needed"),
    "no status": (chain(HEADER), "the writable part has 0 bytes, at least 1"),
    "an indirect table in another": (
        indirect(32, (DATA, 16, NEXT, 1), (TABLE, 16, INDIRECT, 0)),
        "the chain at 0: an indirect table inside an indirect table",
    ),
    "an indirect table with a next": (indirect(32, flags=NEXT), "the chain at 0: an indirect descriptor has a next one"),
    "an empty indirect table": (indirect(0), "an indirect table is empty, larger than 32768 entries, or cut off within one"),
    "half an indirect descriptor": (indirect(24), "an indirect table is empty, larger than 32768 entries, or cut off within one"),
    "an endless indirect table": (indirect(0xFFFF_FFF0), "an indirect table is empty, larger than 32768 entries, or cut off within one"),
    "an indirect table in no region": (indirect(32, address=0x40), r"0x40\+0x20 is in no memory region"),
    "an indirect table that wraps": (indirect(32, address=END - 16), r"0xfffffffffffffff0\+0x20 is in no memory region"),
    "an indirect next outside its table": (indirect(32, (DATA, 16, NEXT, 2)), "descriptor 2 is outside the table of 2"),
    "an indirect circle": (indirect(32, (DATA, 16, NEXT, 1), (DATA, 16, NEXT, 0)), "the chain at 0 has more than 2 descriptors"),
    "an avail index one too far": (jump(65), "avail index 65 is 65 entries ahead of 0, the ring has 64"),
    "an avail index that went back": (jump(-1), "avail index 65535 is 65535 entries ahead of 0, the ring has 64"),
    "an avail index half around": (jump(0x8000), "avail index 32768 is 32768 entries ahead of 0, the ring has 64"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_ring_ends_its_queue_by_name_and_nothing_else(world: World, what: str) -> None:
    breaks, reason = BROKEN[what]
    with world.connect().ready(queues=2) as front_end:
        broken, other = front_end.queues
        start = world.server.mark()
        breaks(front_end, broken)
        assert front_end.failed(broken)
        until(lambda: world.server.lines(reason, start), f"a line about {reason!r} in {world.server.log()[start:]!r}")
        assert len(world.server.lines("victim", start)) == 1, world.server.lines("victim", start)
        # The queue beside it works on, and the broken one does again once it was stopped in order.
        assert front_end.io(other, READ_IN, 0, 512)[0] == 0
        assert front_end.used_index(broken) == 0
        front_end.ask(GET_VRING_BASE, struct.pack("<II", 0, 0))
        broken.next_avail = 0
        struct.pack_into("<H", front_end.memory, broken.avail + 2, 0)
        assert front_end.start(broken) == 0
        assert front_end.io(broken, READ_IN, 0, 512)[0] == 0
    world.fine()


def test_indirect_descriptors_are_refused_where_they_were_not_agreed_on(world: World) -> None:
    with world.connect().ready(features=F_PROTOCOL | F_VERSION_1) as front_end:
        start = world.server.mark()
        indirect(32)(front_end, front_end.queues[0])
        assert front_end.failed(front_end.queues[0])
        until(lambda: world.server.lines("but INDIRECT_DESC was not negotiated", start), "the line")
    world.fine()


def request(kind: int, sector: int, *parts: tuple[int, int, int]) -> Breaker:
    def write(front_end: FrontEnd, queue: Queue) -> None:
        struct.pack_into("<IIQ", front_end.memory, DATA_AT, kind, 0, sector)
        chain(HEADER, *parts, STATUS)(front_end, queue)

    return write


IOERR, UNSUPP = 1, 2
ANSWERED: dict[str, tuple[Breaker, int]] = {
    "an unknown type": (request(0xFFFF_FFFF, 0, (DATA + 512, 512, WRITE)), UNSUPP),
    "half a block": (request(READ_IN, 0, (DATA + 512, 256, WRITE)), IOERR),
    "no data": (request(READ_IN, 0), IOERR),
    "past the end": (request(READ_IN, 8192, (DATA + 512, 512, WRITE)), IOERR),
    "over the end": (request(READ_IN, 8191, (DATA + 512, 1024, WRITE)), IOERR),
    "the last sector there can be": (request(READ_IN, END - 1, (DATA + 512, 512, WRITE)), IOERR),
    "a sector whose byte wraps": (request(WRITE_OUT, 1 << 55, (DATA + 512, 512, 0)), IOERR),
    "a read into readable memory": (request(READ_IN, 0, (DATA + 512, 512, 0)), IOERR),
    "a write from writable memory": (request(WRITE_OUT, 0, (DATA + 512, 512, WRITE)), IOERR),
    "17 ranges to discard": (request(DISCARD, 0, (DATA + 512, 17 * 16, 0)), IOERR),
    "half a range to discard": (request(DISCARD, 0, (DATA + 512, 8, 0)), IOERR),
    "no range to zero": (request(WRITE_ZEROES, 0), IOERR),
}


@pytest.mark.parametrize("what", ANSWERED)
def test_a_request_without_sense_is_answered_and_the_queue_goes_on(world: World, what: str) -> None:
    asks, status = ANSWERED[what]
    with world.connect().ready() as front_end:
        (queue,) = front_end.queues
        asks(front_end, queue)
        assert front_end.take_used(queue) == (0, 1)
        assert front_end.memory[DATA_AT + 16] == status
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
    world.fine()


@pytest.mark.parametrize("segment", [(END - 1, 1, 0), (0, 0xFFFF_FFFF, 0), (8192, 1, 0), (0, 1, 0xFFFF_FFFE)])
@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_ranges_outside_the_disk_are_answered_with_an_error(world: World, kind: int, segment: tuple[int, int, int]) -> None:
    with world.connect().ready() as front_end:
        (queue,) = front_end.queues
        struct.pack_into("<QII", front_end.memory, DATA_AT + 512, *segment)
        request(kind, 0, (DATA + 512, 16, 0))(front_end, queue)
        front_end.take_used(queue)
        assert front_end.memory[DATA_AT + 16] in (IOERR, UNSUPP)
    world.fine()


@pytest.mark.parametrize("size", [0, 3, 65536, 1 << 31, 0xFFFF_FFFF])
def test_a_ring_size_that_is_none_is_refused(world: World, size: int) -> None:
    with world.connect().agree() as front_end:
        assert front_end.table() == 0
        start = world.server.mark()
        assert front_end.order(SET_VRING_NUM, struct.pack("<II", 0, size)) == 22
        assert world.server.lines(f"SET_VRING_NUM refused: .*vring num {size}: a power of two from 1 to 32768", start)
        assert front_end.start(front_end.add_queue()) == 0
        assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
    world.fine()


def test_the_smallest_and_the_largest_ring_work(world: World) -> None:
    for size, memory in ((1, 1 << 20), (32768, 1 << 22)):
        with world.connect(memory_bytes=memory).agree() as front_end:
            assert front_end.table() == 0
            queue = front_end.add_queue(size)
            queue.desc, queue.avail, queue.used = 0x100_000 % memory, 0x200_000 % memory + 0x8000, 0x300_000 % memory + 0x10_000
            assert front_end.start(queue) == 0
            if size == 1:  # no chain of three fits: one indirect descriptor
                for index, part in enumerate(((DATA, 16, NEXT, 1), (DATA + 512, 512, NEXT | WRITE, 2), (DATA + 16, 1, WRITE, 0))):
                    struct.pack_into("<QIHH", front_end.memory, TABLE - GUEST_BASE + 16 * index, *part)
                indirect(48)(front_end, queue)
                assert front_end.take_used(queue) == (0, 513)
            else:
                assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
    world.fine()


ADDRESSES = {
    "a misaligned table": ({"desc": USER_BASE + 8}, "0x7f0000000008 is not a multiple of 16"),
    "a misaligned avail ring": ({"avail": USER_BASE + 0x1001}, "0x7f0000001001 is not a multiple of 2"),
    "a misaligned used ring": ({"used": USER_BASE + 0x2002}, "0x7f0000002002 is not a multiple of 4"),
    "a table in no region": ({"desc": 0x1000}, r"0x1000\+0x400"),
    "a table over the end": ({"desc": USER_BASE + (1 << 20) - 16}, r"0x7f00000ffff0\+0x400"),
    "a used ring that wraps": ({"used": END - 4}, r"0xfffffffffffffffc\+0x204"),
    "avail in the table": ({"avail": USER_BASE + 0x10}, "areas of the ring overlap"),
    "used in the avail ring": ({"used": USER_BASE + 0x1000}, "areas of the ring overlap"),
    "all in one place": ({"used": USER_BASE, "avail": USER_BASE}, "areas of the ring overlap"),
}


@pytest.mark.parametrize("what", ADDRESSES)
def test_ring_addresses_that_cannot_be_are_refused_by_name(world: World, what: str) -> None:
    wrong, reason = ADDRESSES[what]
    with world.connect().ready() as front_end:
        (queue,) = front_end.queues
        start = world.server.mark()
        assert front_end.set_addresses(queue, **wrong) == 22
        assert len(world.server.lines(reason, start)) == 1, world.server.log()[-500:]
        assert front_end.start(queue) == 0
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
    world.fine()


@pytest.mark.parametrize("queue", [16, 255, 256, 1 << 31])
def test_a_queue_that_is_not_there_ends_the_session_by_name(world: World, queue: int) -> None:
    with world.connect().agree() as front_end:
        start = world.server.mark()
        front_end.send(SET_VRING_NUM, struct.pack("<II", queue, 64))
        assert front_end.closed()
        ended = world.server.lines("victim", start)
        assert len(ended) == 1
        assert f"SET_VRING_NUM: queue is {queue}, must be below 16" in ended[0]
    world.fine()


def test_a_base_past_16_bits_ends_the_session_by_name(world: World) -> None:
    with world.connect().agree() as front_end:
        start = world.server.mark()
        front_end.send(SET_VRING_BASE, struct.pack("<II", 0, 65536))
        assert front_end.closed()
        assert world.server.lines("SET_VRING_BASE: base is 65536, must be at most 65535", start)
    world.fine()


def test_a_ring_that_breaks_over_and_over_does_not_flood_the_log(world: World) -> None:
    with world.connect().ready() as front_end:
        (queue,) = front_end.queues
        start, rounds = world.server.mark(), 300
        for _ in range(rounds):
            loop(0)(front_end, queue)
            assert front_end.failed(queue)
            os.eventfd_read(queue.err)
            front_end.ask(GET_VRING_BASE, struct.pack("<II", 0, 0))
            queue.next_avail = 0
            struct.pack_into("<H", front_end.memory, queue.avail + 2, 0)
            front_end.must(SET_VRING_BASE, struct.pack("<II", 0, 0))
            front_end.must(SET_VRING_KICK, struct.pack("<Q", 0), [queue.kick])
        time.sleep(0.1)
        assert 1 <= len(world.server.lines("victim", start)) < rounds, "each of them is a line"
    world.fine()


def test_the_driver_that_rewrites_its_descriptors_meanwhile_gets_no_further(world: World) -> None:
    """Read twice, a length could be small when it is checked and large when it is used."""
    with world.connect().ready() as front_end:
        (queue,) = front_end.queues
        end = time.monotonic() + 1
        lengths = (512, 0xFFFF_FE00, 0, 1 << 19)
        for _ in range(100_000):
            front_end.request(queue, READ_IN, 0, 512)
            front_end.offer(queue, 0)
            for length in lengths:
                front_end.descriptor(queue, 1, DATA + 512, length, NEXT | WRITE, 2)
                front_end.descriptor(queue, 0, DATA, length, NEXT | INDIRECT, 1)
            if time.monotonic() > end or re.search(r"queue", "".join(world.server.lines("victim queue 0", world.server.mark()))):
                break
    world.fine()
