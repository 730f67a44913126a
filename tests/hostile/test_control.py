"""Control messages that break the protocol, descriptors that are something else, memory that goes away: against ``qpair serve``."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostile.conftest import World
from hostile.front_end import (
    DATA_AT,
    F_PROTOCOL,
    F_VERSION_1,
    GET_CONFIG,
    GET_FEATURES,
    GET_INFLIGHT_FD,
    GET_VRING_BASE,
    GUEST_BASE,
    NEXT,
    READ_IN,
    SET_FEATURES,
    SET_INFLIGHT_FD,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_PROTOCOL_FEATURES,
    SET_VRING_ADDR,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_NUM,
    USER_BASE,
    WRITE,
    FrontEnd,
    Gone,
)
from hostile.process import until


def header(request: int, size: int, flags: int = 1) -> bytes:
    return struct.pack("<III", request, flags, size)


# What is sent after the features are agreed on, and the one line that tells of the session's end.
RAW: dict[str, tuple[bytes, str]] = {
    "a size of 4 GiB": (header(SET_FEATURES, 0xFFFF_FFFF), "SET_FEATURES: payload size is 4294967295, must be at most"),
    "a size of 2 GiB": (header(GET_CONFIG, 1 << 31), "GET_CONFIG: payload size is 2147483648, must be at most"),
    "a request that is none": (header(0xDEAD, 0), "header: request is 57005, must be a known request"),
    "request 0": (header(0, 0), "header: request is 0, must be a known request"),
    "another version": (header(SET_OWNER, 0, flags=2), "SET_OWNER: version is 2, must be 1"),
    "a reply": (header(SET_OWNER, 0, flags=5), "SET_OWNER: flags is 0x5, must be those of a request, not of a reply"),
    "a message of network cards": (
        header(19, 8) + bytes(8),
        r"header: request is SEND_RARP \(19\), must be one that a block device supports",
    ),
    "half a payload's size": (header(SET_FEATURES, 4) + bytes(4), "SET_FEATURES: payload size is 4, must be 8 bytes"),
    "twice a payload's size": (header(SET_FEATURES, 16) + bytes(16), "SET_FEATURES: payload size is 16, must be 8 bytes"),
    "a table without its regions": (
        header(SET_MEM_TABLE, 8) + struct.pack("<II", 8, 0),
        "SET_MEM_TABLE: payload size is 8, must be 264 bytes for 8 regions",
    ),
    "a table of 4 G regions": (
        header(SET_MEM_TABLE, 8) + struct.pack("<II", 0xFFFF_FFFF, 0),
        "SET_MEM_TABLE: number of regions is 4294967295, must be at most 8",
    ),
    "a table without descriptors": (
        header(SET_MEM_TABLE, 40) + struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, 4096, USER_BASE, 0),
        "SET_MEM_TABLE: number of descriptors is 0, must be 1",
    ),
    "features that were not offered": (header(SET_FEATURES, 8) + bytes(7) + b"\x80", "SET_FEATURES: features is 0x8000000000000000 with"),
    "protocol features that were not offered": (
        header(SET_PROTOCOL_FEATURES, 8) + b"\xff" * 8,
        "SET_PROTOCOL_FEATURES: features is 0xffffffffffffffff with",
    ),
    "an answer to a kick that never came": (header(SET_VRING_KICK, 8) + bytes(8), "SET_VRING_KICK: number of descriptors is 0, must be 1"),
    "queue 255": (header(SET_VRING_KICK, 8) + struct.pack("<Q", 255 | 256), "SET_VRING_KICK: queue is 255, must be below 16"),
    "bits beyond a queue": (header(SET_VRING_KICK, 8) + struct.pack("<Q", 1 << 40), "SET_VRING_KICK: payload is 0x10000000000, must be"),
    "enable twice": (header(SET_VRING_ENABLE, 8) + struct.pack("<II", 0, 2), "SET_VRING_ENABLE: enable is 2, must be 0 or 1"),
    "logging": (header(SET_VRING_ADDR, 40) + struct.pack("<IIQQQQ", 0, 1, 0, 0, 0, 0), "SET_VRING_ADDR: flags is 0x1, must be 0"),
    "too much configuration": (
        header(GET_CONFIG, 12) + struct.pack("<III", 0, 257, 0),
        "GET_CONFIG: size is 257, must be at most 256 bytes",
    ),
    "configuration past its end": (
        header(GET_CONFIG, 12) + struct.pack("<III", 0xFFFF_FFFF, 8, 0),
        "GET_CONFIG: offset is 4294967295, must be at most 248",
    ),
    "an inflight region of no queues": (
        header(GET_INFLIGHT_FD, 24) + struct.pack("<QQHH4x", 0, 0, 0, 64),
        "GET_INFLIGHT_FD: num_queues is 0, must be 1 to 16",
    ),
    "an inflight region of endless queues": (
        header(GET_INFLIGHT_FD, 24) + struct.pack("<QQHH4x", 0, 0, 1, 32769),
        "GET_INFLIGHT_FD: queue_size is 32769, must be 1 to 32768",
    ),
}


@pytest.mark.parametrize("what", RAW)
def test_a_message_that_breaks_the_protocol_ends_the_session_by_one_line(world: World, what: str) -> None:
    data, reason = RAW[what]
    with world.connect().agree() as front_end:
        start = world.server.mark()
        front_end.send_raw(data)
        assert front_end.closed()
    until(lambda: world.server.lines(reason, start), f"a line about {reason!r} in {world.server.lines('victim', start)}")
    assert len(world.server.lines("victim", start)) == 1
    world.fine()


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 19])
def test_a_message_cut_short_ends_the_session_by_name(world: World, cut: int) -> None:
    with world.connect().agree() as front_end:
        start = world.server.mark()
        front_end.send_raw((header(SET_FEATURES, 8) + bytes(8))[:cut])
        front_end.sock.shutdown(socket.SHUT_WR)
        assert front_end.closed()
    assert world.server.lines("connection: message is cut short, must be followed by", start)
    world.fine()


def test_a_message_byte_by_byte_is_a_message(world: World) -> None:
    with world.connect() as front_end:
        for byte in header(GET_FEATURES, 0):
            front_end.send_raw(bytes([byte]))
            time.sleep(0.001)
        assert front_end.receive()[0] == GET_FEATURES
    world.fine()


@pytest.mark.parametrize("count", [9, 250])
def test_more_descriptors_than_a_message_may_have_end_the_session_and_are_closed(world: World, count: int) -> None:
    with world.connect().agree() as front_end:
        before, start = len(world.server.fds()), world.server.mark()
        reader, writer = os.pipe()
        front_end.send_raw(header(SET_OWNER, 0), [writer] * count)
        os.close(writer)
        assert front_end.closed()
        assert os.read(reader, 1) == b"", "somebody still holds one of the descriptors"
        os.close(reader)
    assert world.server.lines("number of descriptors", start)
    until(lambda: len(world.server.fds()) < before, "the session's descriptors are closed")
    world.fine()


def test_descriptors_of_messages_that_want_none_are_closed(world: World) -> None:
    with world.connect().agree() as front_end:
        reader, writer = os.pipe()
        front_end.send_raw(header(SET_OWNER, 0), [writer] * 8)
        os.close(writer)
        assert front_end.closed()
        assert os.read(reader, 1) == b""
        os.close(reader)
    world.fine()


def test_descriptors_between_messages_are_closed(world: World) -> None:
    """Eight bytes of a header, each with eight descriptors: never more than a message may have are held."""
    with world.connect().agree() as front_end:
        reader, writer = os.pipe()
        for byte in header(SET_OWNER, 0)[:8]:
            try:
                front_end.send_raw(bytes([byte]), [writer] * 8)
            except Gone:
                break
        os.close(writer)
        assert front_end.closed()
        assert os.read(reader, 1) == b""
        os.close(reader)
    world.fine()


def test_messages_out_of_order_are_answered_or_refused_and_never_more(world: World) -> None:
    with world.connect() as front_end:
        # Before anything was agreed on.
        front_end.send(SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        assert front_end.closed()
    with world.connect() as front_end:
        front_end.send(GET_CONFIG, struct.pack("<III", 0, 60, 0) + bytes(60))
        assert front_end.closed()
    with world.connect().agree() as front_end:
        # A queue that is kicked and enabled before it has a size, addresses or memory; then backwards.
        queue = front_end.add_queue()
        front_end.must(SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        front_end.must(SET_VRING_KICK, struct.pack("<Q", 0), [queue.kick])
        front_end.must(SET_VRING_CALL, struct.pack("<Q", 0), [queue.call])
        assert front_end.ask(GET_VRING_BASE, struct.pack("<II", 0, 0)) == struct.pack("<II", 0, 0)
        assert front_end.set_addresses(queue) == 0
        front_end.must(SET_VRING_KICK, struct.pack("<Q", 0), [queue.kick])
        front_end.must(SET_VRING_NUM, struct.pack("<II", 0, queue.size))
        assert front_end.table() == 0
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        # The features change under a running ring.
        for features in (F_PROTOCOL, F_PROTOCOL | F_VERSION_1):
            front_end.must(SET_FEATURES, struct.pack("<Q", features))
            assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
    world.fine()


def test_a_front_end_that_never_reads_its_answers_holds_up_nobody(world: World) -> None:
    with world.connect().agree() as front_end:
        front_end.sock.setblocking(False)
        sent = 0
        try:
            for _ in range(200_000):
                sent += front_end.sock.send(header(GET_FEATURES, 0) * 64)
        except BlockingIOError:
            pass
        assert sent > 0
        world.fine()
    world.fine()


# -- descriptors that are something else --------------------------------------------------------------


def _pipe(full: bool, reader: bool, folder: Path) -> int:
    ends = os.pipe()
    if full:
        os.set_blocking(ends[1], False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(ends[1], bytes(4096))
        os.set_blocking(ends[1], True)
    return ends[0] if reader else ends[1]  # the other end stays open until the module ends


STRANGE = {
    "the end of a pipe to read": lambda folder: _pipe(False, True, folder),
    "the end of a pipe to write": lambda folder: _pipe(False, False, folder),
    "a full pipe that would block": lambda folder: _pipe(True, False, folder),
    "a regular file": lambda folder: os.open(folder / "file", os.O_RDWR | os.O_CREAT),
    "a directory": lambda folder: os.open(folder, os.O_RDONLY),
    "/dev/null": lambda folder: os.open("/dev/null", os.O_RDWR),
    "/dev/zero": lambda folder: os.open("/dev/zero", os.O_RDWR),
    "a path": lambda folder: os.open(folder, os.O_PATH),
    "a memfd": lambda folder: os.memfd_create("strange"),
    "a socket": lambda folder: socket.socket(socket.AF_UNIX).detach(),
    "a process": lambda folder: os.pidfd_open(os.getpid()),
}


@pytest.mark.parametrize("message", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR])
@pytest.mark.parametrize("what", STRANGE)
def test_a_notification_by_what_is_no_eventfd_is_refused_by_name(world: World, what: str, message: int, tmp_path: Path) -> None:
    with world.connect().ready() as front_end:
        fd = STRANGE[what](tmp_path)
        start = world.server.mark()
        assert front_end.order(message, struct.pack("<Q", 0), [fd]) == 22
        os.close(fd)
        assert world.server.lines(r"SET_VRING_\w+ refused: .*fd .*: an eventfd", start), world.server.lines("", start)
        assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
    world.fine()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_full_call_eventfd_holds_up_nobody(world: World, blocking: bool) -> None:
    """It shares its flags with us: what was made non-blocking when it came may be blocking when it is written to."""
    with world.connect().ready() as front_end:
        (queue,) = front_end.queues
        for event in (queue.call, queue.err):
            os.eventfd_write(event, 1)
            os.eventfd_read(event)  # a ring that starts interrupts once
            os.eventfd_write(event, 0xFFFF_FFFF_FFFF_FFFE)
            os.set_blocking(event, blocking)
        front_end.request(queue, READ_IN, 0, 512)
        for _ in range(50):
            before = front_end.used_index(queue)
            front_end.offer(queue, 0)
            until(lambda before=before: front_end.used_index(queue) != before, "an answer", 5)
        world.fine()
        # It breaks a rule, too: the error descriptor is as full.
        start = world.server.mark()
        front_end.offer(queue, ahead=1000)
        until(lambda: world.server.lines("queue 0 failed", start), "the failure")
        world.fine()
    world.fine()


def test_a_kick_eventfd_that_is_read_and_filled_by_its_owner_holds_up_nobody(world: World) -> None:
    with world.connect().ready() as front_end:
        (queue,) = front_end.queues
        os.set_blocking(queue.kick, True)
        os.eventfd_write(queue.kick, 0xFFFF_FFFF_FFFF_FFFD)
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        assert os.eventfd_read(queue.kick)
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
    world.fine()


# -- memory -------------------------------------------------------------------------------------------

REGIONS: dict[str, tuple[tuple[tuple[int, int, int, int], ...], str]] = {
    "more than the file": (((GUEST_BASE, 1 << 40, USER_BASE, 0),), r"range 0x0\+0x10000000000 leaves its region of 0x100000 bytes"),
    "an offset past the file": (((GUEST_BASE, 4096, USER_BASE, 1 << 40),), ""),
    "overlapping guest addresses": (((GUEST_BASE, 8192, USER_BASE, 0), (GUEST_BASE + 4096, 4096, USER_BASE + 8192, 8192)), "overlaps"),
    "the same row twice": (((GUEST_BASE, 4096, USER_BASE, 0),) * 2, "overlaps"),
}


@pytest.mark.parametrize("what", REGIONS)
def test_memory_tables_that_cannot_be_are_refused(world: World, what: str) -> None:
    rows, reason = REGIONS[what]
    with world.connect().agree() as front_end:
        start = world.server.mark()
        assert front_end.table(*rows) == 22
        assert len(world.server.lines(f"SET_MEM_TABLE refused: .*{reason}", start)) == 1, world.server.lines("", start)
        assert world.server.guest_mappings() == []
        assert front_end.table() == 0
    world.fine()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((GUEST_BASE, 0, USER_BASE, 0), "size of region 0 is 0, must be more than 0 bytes"),
        (((1 << 64) - 4096, 8192, USER_BASE, 0), "guest_address of region 0 is"),
        ((GUEST_BASE, 8192, (1 << 64) - 4096, 0), "user_address of region 0 is"),
        ((GUEST_BASE, 8192, USER_BASE, (1 << 64) - 4096), "mmap_offset of region 0 is"),
    ],
)
def test_regions_that_no_table_can_have_end_the_session(world: World, row: tuple[int, int, int, int], reason: str) -> None:
    with world.connect().agree() as front_end:
        start = world.server.mark()
        with pytest.raises(Gone):
            front_end.table(row)
        assert len(world.server.lines(reason, start)) == 1
    world.fine()


def _read_only(folder: Path) -> int:
    path = folder / "read-only"
    path.write_bytes(bytes(1 << 20))
    return os.open(path, os.O_RDONLY)


MEMORY = {
    "a pipe": lambda folder: os.pipe()[0],
    "a directory": lambda folder: os.open(folder, os.O_RDONLY),
    "/dev/null": lambda folder: os.open("/dev/null", os.O_RDWR),
    "an eventfd": lambda folder: os.eventfd(0),
    "a socket": lambda folder: socket.socket(socket.AF_UNIX).detach(),
    "an empty file": lambda folder: os.open(folder / "empty", os.O_RDWR | os.O_CREAT),
    "a file to read": _read_only,
}


@pytest.mark.parametrize("what", MEMORY)
def test_memory_that_is_none_is_refused_and_the_session_goes_on(world: World, what: str, tmp_path: Path) -> None:
    with world.connect().agree() as front_end:
        fd = MEMORY[what](tmp_path)
        start = world.server.mark()
        refused = front_end.table(fds=[fd])
        os.close(fd)
        if what != "an empty file":
            assert refused != 0
            assert len(world.server.lines("SET_MEM_TABLE refused", start)) == 1
        else:  # it may grow yet; whoever touches it before that finds nothing
            with contextlib.suppress(Gone):  # before or after the answer to its last message
                front_end.start(front_end.add_queue())
            assert front_end.closed()
            return
        assert front_end.table() == 0
    world.fine()


@pytest.mark.parametrize("to", [0, 0x1000, DATA_AT])
def test_memory_truncated_under_the_server_ends_the_session_by_one_line(world: World, to: int) -> None:
    start = world.server.mark()
    with world.connect().ready(queues=2) as front_end:
        queue = front_end.queues[0]
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        front_end.request(queue, READ_IN, 0, 4096)
        if to == DATA_AT:  # the rings stay: the data is what goes
            os.ftruncate(front_end.fd, to)
            front_end.offer(queue, 0)
        else:
            os.ftruncate(front_end.fd, to)
            front_end.kick(queue)
        assert front_end.closed()
        assert len(world.server.lines("guest memory vanished: its file was truncated", start)) == 1
        assert world.server.guest_mappings() == []
    world.fine()
    with world.connect().ready() as front_end:
        assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
    world.fine()


def test_memory_that_shrinks_and_grows_all_the_time_kills_nobody(world: World) -> None:
    stop = threading.Event()

    def flap(fd: int) -> None:
        while not stop.is_set():
            os.ftruncate(fd, DATA_AT)
            os.ftruncate(fd, 1 << 20)

    with world.connect() as front_end:
        front_end.ready()
        (queue,) = front_end.queues
        thread = threading.Thread(target=flap, args=(front_end.fd,))
        thread.start()
        try:
            for _ in range(50):
                front_end.offer(queue, *[0] * 30)
                front_end.ask(GET_VRING_BASE, struct.pack("<II", 0, 0))
                front_end.table()
                queue.next_avail = 0
                front_end.start(queue)
        except (Gone, AssertionError):
            pass  # ended, or refused
        finally:
            stop.set()
            thread.join()
        world.fine()
    world.fine()


# -- the inflight region ------------------------------------------------------------------------------


def lying(version: int = 1, desc_num: int = 64, last: int = 0, used: int = 0, words: int = 0) -> bytes:
    """An inflight region of one queue of 64: its header (features, version, desc_num, last_batch_head, used_idx), then entries."""
    return struct.pack("<QHHHH", 0, version, desc_num, last, used) + struct.pack("<QQ", words, 7) * 64


INFLIGHT = {
    "another version": (lying(version=9), "inflight region: version 9"),
    "another size": (lying(desc_num=128), "inflight region: desc_num 128"),
    "a batch outside the table": (lying(last=0xFFFF, used=0xFFFF), "inflight region: "),
    "an index far from the ring's": (lying(used=0x7FFF), "inflight region: "),
}


@pytest.mark.parametrize("what", INFLIGHT)
def test_a_lying_inflight_region_keeps_its_queue_from_starting_by_name(world: World, what: str) -> None:
    content, reason = INFLIGHT[what]
    with world.connect().agree() as front_end:
        reply = front_end.ask(GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, 1, 64))
        size = struct.unpack("<QQHH4x", reply)[0]
        fd = os.memfd_create("lies")
        os.write(fd, content.ljust(size, b"\0"))
        front_end.must(SET_INFLIGHT_FD, struct.pack("<QQHH4x", size, 0, 1, 64), [fd])
        assert front_end.table() == 0
        queue = front_end.add_queue()
        start = world.server.mark()
        assert front_end.start(queue) == 22
        assert world.server.lines(reason, start), world.server.lines("", start)
        os.close(fd)
    world.fine()


def test_an_inflight_region_full_of_marks_makes_only_requests_that_are_checked(world: World) -> None:
    with world.connect().agree() as front_end:
        size = struct.unpack("<QQHH4x", front_end.ask(GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, 1, 64)))[0]
        fd = os.memfd_create("lies")
        os.write(fd, lying(words=1).ljust(size, b"\0"))
        front_end.must(SET_INFLIGHT_FD, struct.pack("<QQHH4x", size, 0, 1, 64), [fd])
        os.close(fd)
        assert front_end.table() == 0
        queue = front_end.add_queue()
        front_end.start(queue)  # 64 requests of descriptors that are all zeros
        assert front_end.failed(queue)
    world.fine()


@pytest.mark.parametrize("size", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_an_inflight_region_of_an_impossible_size_is_refused(world: World, size: int) -> None:
    with world.connect().agree() as front_end:
        fd = os.memfd_create("lies")
        os.ftruncate(fd, 4096)
        assert front_end.order(SET_INFLIGHT_FD, struct.pack("<QQHH4x", size, 0, 1, 64), [fd]) != 0
        os.close(fd)
        assert front_end.ask_u64(GET_FEATURES)
    world.fine()


def test_an_inflight_region_truncated_under_the_server_stops_the_queue_by_name(world: World) -> None:
    with world.connect().agree() as front_end:
        size = struct.unpack("<QQHH4x", front_end.ask(GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, 1, 64)))[0]
        fd = os.memfd_create("shrinks")
        os.ftruncate(fd, size)
        front_end.must(SET_INFLIGHT_FD, struct.pack("<QQHH4x", size, 0, 1, 64), [fd])
        assert front_end.table() == 0
        queue = front_end.add_queue()
        assert front_end.start(queue) == 0
        assert front_end.io(queue, READ_IN, 0, 512)[0] == 0
        start = world.server.mark()
        front_end.request(queue, READ_IN, 0, 512)
        os.ftruncate(fd, 0)
        os.close(fd)
        front_end.offer(queue, 0, 0)
        until(lambda: world.server.lines("guest memory vanished: its file was truncated", start), "the line")
    world.fine()


# -- many ---------------------------------------------------------------------------------------------


@pytest.fixture
def many(world: World) -> Iterator[list[Path]]:
    """64 disks."""
    names = [f"many{number}" for number in range(64)]
    for name in names:
        world.server.rpc("bdev_null_create", name=name, num_blocks=2048, block_size=512)
    yield [world.server.export(name, name) for name in names]
    for name in names:
        world.server.rpc("vhost_delete_controller", ctrlr=name)
        world.server.rpc("bdev_null_delete", name=name)


def test_64_sessions_break_their_rules_at_once(world: World, many: list[Path]) -> None:
    before = len(world.server.fds())
    with ExitStack() as stack:
        front_ends = [stack.enter_context(FrontEnd(path)).ready() for path in many]
        start = world.server.mark()
        for front_end in front_ends:
            front_end.descriptor(front_end.queues[0], 0, GUEST_BASE, 0, NEXT | WRITE)
            front_end.offer(front_end.queues[0], 0)
        for front_end in front_ends:
            assert front_end.failed(front_end.queues[0])
        until(
            lambda: len(world.server.lines(r"many\d+: queue 0 failed: descriptor 0 of the chain at 0 has length 0", start)) == 64,
            "64 lines",
        )
        world.fine()
    until(lambda: world.server.guest_mappings() == [], "their memory is let go of")
    until(lambda: len(world.server.fds()) <= before + 2, "their descriptors are closed")
    world.fine()
