"""A vhost-user-blk front end made by hand, which obeys only as far as its test wants: raw messages over a unix socket, rings written byte by byte.

Nothing of qpair's codecs is used, so a mistake of theirs does not hide here. Numbers are those of the vhost-user protocol and of Virtio 1.2, 2.7 and 5.2.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
GET_CONFIG, SET_CONFIG, GET_INFLIGHT_FD, SET_INFLIGHT_FD, RESET_DEVICE = 24, 25, 31, 32, 34

NEED_REPLY = 1 << 3
F_INDIRECT, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 30, 1 << 32
P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT, P_RESET = 1 << 0, 1 << 3, 1 << 9, 1 << 12, 1 << 13
PROTOCOL = P_MQ | P_REPLY_ACK | P_CONFIG | P_INFLIGHT | P_RESET

NEXT, WRITE, INDIRECT = 1, 2, 4
READ_IN, WRITE_OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13

GUEST_BASE = 0x1000_0000
USER_BASE = 0x7F00_0000_0000
RING_BYTES = 0x4000  # of memory for the rings of one queue of up to 256 entries
DATA_AT = 0x20_000


class Gone(Exception):
    """The back end closed the connection."""


@dataclass(slots=True)
class Queue:
    """Where a queue lies in the front end's memory, and its descriptors."""

    index: int
    size: int
    desc: int
    avail: int
    used: int
    kick: int
    call: int
    err: int
    next_avail: int = 0
    next_used: int = 0


class FrontEnd:
    """Connects; `agree` and `start` do what an honest one does, the rest is the test's."""

    def __init__(self, path: str | Path, *, memory_bytes: int = 1 << 20, timeout_s: float = 10, name: str = "hostile-guest") -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_s)
        self.sock.connect(str(path))
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, memory_bytes)
        self.memory_bytes = memory_bytes
        self.memory = mmap.mmap(self.fd, memory_bytes)
        # Indices are written whole by this: struct.pack_into clears before it writes, which a device that polls can see.
        self.words = memoryview(self.memory).cast("H")
        self.queues: list[Queue] = []
        self._fds = [self.fd]

    # -- messages ---------------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.sock.sendmsg([data], control)
            if sent < len(data):
                self.sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone from error

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 1) -> None:
        self.send_raw(struct.pack("<III", request, flags, len(payload)) + payload, fds)

    def receive(self) -> tuple[int, bytes, list[int]]:
        """Request, payload and descriptors of the next reply; `Gone` at the end of the connection."""
        head, fds = self._exactly(12)
        request, flags, size = struct.unpack("<III", head)
        assert flags & 4, f"no reply: flags {flags:#x}"
        payload, more = self._exactly(size)
        return request, payload, fds + more

    def _exactly(self, size: int) -> tuple[bytes, list[int]]:
        data, fds = b"", array.array("i")
        while len(data) < size:
            try:
                piece, control, _, _ = self.sock.recvmsg(size - len(data), 256)
            except ConnectionResetError as error:
                raise Gone from error
            if not piece:
                raise Gone
            data += piece
            for _, _, part in control:
                fds.frombytes(part)
        return data, fds.tolist()

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request with a reply of its own."""
        self.send(request, payload, fds)
        answered, reply, extra = self.receive()
        assert answered == request
        self._fds += extra
        return reply

    def ask_u64(self, request: int) -> int:
        return int.from_bytes(self.ask(request), "little")

    def order(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A request with REPLY_ACK; 0, or the errno that the back end answers."""
        self.send(request, payload, fds, flags=1 | NEED_REPLY)
        answered, reply, _ = self.receive()
        assert answered == request
        return int.from_bytes(reply, "little")

    def must(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        assert self.order(request, payload, fds) == 0, f"request {request} was refused"

    def closed(self) -> bool:
        """The back end ends the connection, whatever it says before that."""
        try:
            while True:
                self.receive()
        except Gone:
            return True

    # -- what an honest front end does --------------------------------------------------------------

    def agree(self, features: int = F_PROTOCOL | F_VERSION_1 | F_INDIRECT, protocol: int = PROTOCOL) -> Self:
        self.send(SET_OWNER)
        offered = self.ask_u64(GET_FEATURES)
        assert features & ~offered == 0
        self.ask_u64(GET_PROTOCOL_FEATURES)
        self.send(SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        self.must(SET_FEATURES, struct.pack("<Q", features))
        return self

    def table(self, *rows: tuple[int, int, int, int], fds: Sequence[int] | None = None) -> int:
        """SET_MEM_TABLE with (guest address, bytes, user address, offset); without rows: all memory as one region."""
        rows = rows or ((GUEST_BASE, self.memory_bytes, USER_BASE, 0),)
        payload = struct.pack("<II", len(rows), 0) + b"".join(struct.pack("<QQQQ", *row) for row in rows)
        return self.order(SET_MEM_TABLE, payload, [self.fd] * len(rows) if fds is None else fds)

    def add_queue(self, size: int = 64) -> Queue:
        """Lays a queue out, without telling the back end."""
        index = len(self.queues)
        at = RING_BYTES * index
        kick, call, err = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3))
        self._fds += [kick, call, err]
        self.queues.append(Queue(index, size, at, at + 0x1000, at + 0x2000, kick, call, err))
        return self.queues[-1]

    def set_addresses(self, queue: Queue, desc: int | None = None, used: int | None = None, avail: int | None = None) -> int:
        """SET_VRING_ADDR; each may be given as a user address."""
        at = [USER_BASE + own if given is None else given for own, given in ((queue.desc, desc), (queue.used, used), (queue.avail, avail))]
        return self.order(SET_VRING_ADDR, struct.pack("<IIQQQQ", queue.index, 0, *at, 0))

    def start(self, queue: Queue) -> int:
        """Everything that a queue needs, to the answer of its last message."""
        self.must(SET_VRING_NUM, struct.pack("<II", queue.index, queue.size))
        self.must(SET_VRING_BASE, struct.pack("<II", queue.index, queue.next_avail))
        if refused := self.set_addresses(queue):
            return refused
        self.must(SET_VRING_CALL, struct.pack("<Q", queue.index), [queue.call])
        self.must(SET_VRING_ERR, struct.pack("<Q", queue.index), [queue.err])
        self.must(SET_VRING_KICK, struct.pack("<Q", queue.index), [queue.kick])
        return self.order(SET_VRING_ENABLE, struct.pack("<II", queue.index, 1))

    def ready(self, *, queues: int = 1, size: int = 64, features: int = F_PROTOCOL | F_VERSION_1 | F_INDIRECT) -> Self:
        """Agreed, with memory and running queues."""
        self.agree(features)
        assert self.table() == 0
        for _ in range(queues):
            assert self.start(self.add_queue(size)) == 0
        return self

    # -- rings ------------------------------------------------------------------------------------

    def descriptor(self, queue: Queue, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.memory, queue.desc + 16 * index, address & (1 << 64) - 1, length, flags, following)

    def offer(self, queue: Queue, *heads: int, ahead: int | None = None) -> None:
        """Makes chains available and kicks. ``ahead``: moves the index by that instead."""
        for position, head in enumerate(heads):
            slot = (queue.next_avail + position) % queue.size
            struct.pack_into("<H", self.memory, queue.avail + 4 + 2 * slot, head)
        queue.next_avail = (queue.next_avail + (len(heads) if ahead is None else ahead)) & 0xFFFF
        self.words[queue.avail // 2 + 1] = queue.next_avail
        self.kick(queue)

    def kick(self, queue: Queue) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(queue.kick, 1)

    def used_index(self, queue: Queue) -> int:
        return self.words[queue.used // 2 + 1]

    def take_used(self, queue: Queue, timeout_s: float = 10) -> tuple[int, int]:
        """(head, bytes written) of the next used entry."""
        end = time.monotonic() + timeout_s
        while self.used_index(queue) == queue.next_used:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"queue {queue.index}: nothing was answered within {timeout_s} s")
            if select.select([queue.call], [], [], min(left, 0.05))[0]:
                os.eventfd_read(queue.call)
        head, written = struct.unpack_from("<II", self.memory, queue.used + 4 + 8 * (queue.next_used % queue.size))
        queue.next_used = (queue.next_used + 1) & 0xFFFF
        return head, written

    def request(self, queue: Queue, kind: int, sector: int, length: int, *, head: int = 0, at: int = DATA_AT) -> None:
        """Writes an honest chain of three at ``head``: header and status at ``at`` of the memory, data from ``at`` + 512."""
        struct.pack_into("<IIQ", self.memory, at, kind, 0, sector)
        self.memory[at + 16] = 0xFF
        base = GUEST_BASE + at
        writes = WRITE if kind in (READ_IN, GET_ID) else 0
        self.descriptor(queue, head, base, 16, NEXT, head + 1)
        self.descriptor(queue, head + 1, base + 512, length, NEXT | writes, head + 2)
        self.descriptor(queue, head + 2, base + 16, 1, WRITE)

    def io(self, queue: Queue, kind: int, sector: int, data: bytes | int, *, timeout_s: float = 10) -> tuple[int, bytes]:
        """One honest request: its status and the data. ``data``: bytes to write, or how many to read."""
        length = data if isinstance(data, int) else len(data)
        at = DATA_AT + 512
        if not isinstance(data, int):
            self.memory[at : at + length] = data
        self.request(queue, kind, sector, length)
        self.offer(queue, 0)
        head, _ = self.take_used(queue, timeout_s)
        assert head == 0
        return self.memory[DATA_AT + 16], bytes(self.memory[at : at + length])

    def failed(self, queue: Queue, timeout_s: float = 10) -> bool:
        """The back end has signalled the queue's error descriptor."""
        return bool(select.select([queue.err], [], [], timeout_s)[0])

    def close(self) -> None:
        self.sock.close()
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
        if fds:
            self.words.release()
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
