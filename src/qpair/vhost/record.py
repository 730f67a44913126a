"""What a front end told its session so far: all that another process needs to go on in its place.

How it works: `SessionRecord.note` keeps what each message that was carried out has set, with a descriptor of our own where one came along. `restore_calls` are the calls of the
engine that bring a new session to where this one is, all but its rings' start, which are `start_calls`. A ring that was stopped (GET_VRING_BASE) has its base and no kick.

Guest memory is not kept here but in `qpair.vhost.protocol`, which needs it for later messages; `with_memory` adds it for the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from qpair.app.parcel import Descriptor
from qpair.app.passed import PassedRecord
from qpair.vhost.messages import (
    GetVringBase,
    MemoryRegion,
    Message,
    ResetDevice,
    SetConfig,
    SetFeatures,
    SetInflightFd,
    SetLogBase,
    SetLogFd,
    SetProtocolFeatures,
    SetStatus,
    SetVringAddr,
    SetVringBase,
    SetVringCall,
    SetVringEnable,
    SetVringErr,
    SetVringKick,
    SetVringNum,
)

__all__ = ["BackendRecord", "ControllerRecord", "InflightRecord", "LogRecord", "MemoryRecord", "Released", "RingRecord", "SessionRecord"]

Call = tuple[str, tuple[Any, ...]]
"""A method of the engine and its arguments after the session."""


class RingRecord(msgspec.Struct):
    """One ring."""

    size: int | None = None
    addresses: tuple[int, int, int, int, int] | None = None
    """flags, desc, used, avail, log."""
    base: int | None = None
    kick: Descriptor | None = None
    call: Descriptor | None = None
    err: Descriptor | None = None
    started: bool = False
    failed: bool = False
    """Its driver broke a rule: it runs again when the front end has stopped and started it."""
    enabled: bool | None = None


class InflightRecord(msgspec.Struct):
    """The inflight region."""

    memory: Descriptor
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class LogRecord(msgspec.Struct):
    """The log of dirty pages."""

    memory: Descriptor
    mmap_size: int
    mmap_offset: int


class BackendRecord(msgspec.Struct):
    """The socket on which the front end is asked; ``rest`` of a message that it has in part."""

    connection: Descriptor
    rest: bytes


class MemoryRecord(msgspec.Struct):
    """One region of guest memory."""

    memory: Descriptor
    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int


class SessionRecord(msgspec.Struct):
    """See the module's doc."""

    features: int | None = None
    protocol_features: int | None = None
    rings: dict[int, RingRecord] = {}
    inflight: InflightRecord | None = None
    log: LogRecord | None = None
    log_told: Descriptor | None = None
    writeback: bool | None = None
    status: int = 0
    backend: BackendRecord | None = None
    memory: list[MemoryRecord] | None = None
    unread: bytes = b""
    """Of a message that had come in part."""
    unread_fds: list[Descriptor] = []

    def ring(self, index: int) -> RingRecord:
        """What is known of a ring, made if it is nothing yet."""
        return self.rings.setdefault(index, RingRecord())

    def note(self, message: Message, value: Any, take: Callable[[], int]) -> None:
        """``message`` was carried out and answered with ``value``; ``take`` gives the descriptor that came with it."""
        match message:
            case SetFeatures(features=features):
                self.features = features
            case SetProtocolFeatures(features=features):
                self.protocol_features = features
            case SetVringNum(index=index, size=size):
                self.ring(index).size = size
            case SetVringAddr() as addr:
                self.ring(addr.index).addresses = (addr.flags, addr.desc, addr.used, addr.avail, addr.log)
            case SetVringBase(index=index, base=base):
                self.ring(index).base = base
            case GetVringBase(index=index):
                ring = self.ring(index)
                ring.base, ring.kick, ring.started, ring.failed = value, None, False, False
            case SetVringKick() | SetVringCall() | SetVringErr():
                self._note_descriptor(message, Descriptor(take()) if message.has_fd else None)
            case SetVringEnable(index=index, enable=enable):
                self.ring(index).enabled = bool(enable)
            case SetInflightFd() as told:
                self.inflight = InflightRecord(Descriptor(take()), told.mmap_size, told.mmap_offset, told.num_queues, told.queue_size)
            case SetLogBase() as told:
                self.log = LogRecord(Descriptor(take()), told.mmap_size, told.mmap_offset)
            case SetLogFd():
                self.log_told = Descriptor(take())
            case SetConfig() as written:
                self.writeback = bool(written.data[0])
            case SetStatus(value=status):
                self.status = status
                if status == 0:
                    self._reset()
            case ResetDevice():
                self._reset()
            case _:
                pass

    def _reset(self) -> None:
        """As the engine has it: all is forgotten but the protocol's features and memory."""
        self.features, self.inflight, self.log, self.log_told, self.writeback, self.status = 0, None, None, None, None, 0
        self.rings.clear()

    def _note_descriptor(self, message: SetVringKick | SetVringCall | SetVringErr, fd: Descriptor | None) -> None:
        ring = self.ring(message.index)
        match message:
            case SetVringKick():
                ring.kick, ring.started, ring.failed = fd, True, False
            case SetVringCall():
                ring.call = fd
            case _:
                ring.err = fd

    def running(self) -> list[int]:
        """Rings that were started and not stopped."""
        return [index for index, ring in self.rings.items() if ring.started]

    def restore_calls(self) -> Iterator[Call]:
        """All but the rings' start."""
        if self.features is not None:
            yield "vhost_set_features", (self.features,)
        if self.protocol_features is not None:
            yield "vhost_set_protocol_features", (self.protocol_features,)
        if self.memory is not None:
            rows = [(m.guest_address, m.size_bytes, m.user_address, m.mmap_offset, m.memory.fileno()) for m in self.memory]
            yield "vhost_set_mem_table", (rows,)
        if self.log is not None:
            yield "vhost_set_log_base", (self.log.memory.fileno(), self.log.mmap_size, self.log.mmap_offset)
        if self.log_told is not None:
            yield "vhost_set_log_fd", (self.log_told.fileno(),)
        if self.writeback is not None:
            yield "vhost_set_writeback", (self.writeback,)
        for index, ring in self.rings.items():
            yield from _restore_ring(index, ring)
        if (known := self.inflight) is not None:
            shape = (known.mmap_size, known.mmap_offset, known.num_queues, known.queue_size)
            yield "vhost_set_inflight_fd", (known.memory.fileno(), *shape)

    def start_calls(self) -> Iterator[Call]:
        """The start of the rings that ran."""
        for index in self.running():
            if not (ring := self.rings[index]).failed:
                yield "vhost_set_vring_kick", (index, _number(ring.kick))

    def regions(self) -> tuple[tuple[MemoryRegion, int], ...]:
        """Guest memory as `qpair.vhost.protocol` keeps it; the descriptors are the caller's from now on."""
        rows = self.memory or []
        return tuple((MemoryRegion(m.guest_address, m.size_bytes, m.user_address, m.mmap_offset), m.memory.take()) for m in rows)


class Released(msgspec.Struct):
    """A session on its way to another process."""

    connection: Descriptor
    record: SessionRecord


class ControllerRecord(msgspec.Struct):
    """A controller's socket and its session on their way to another process."""

    controller: str
    listener: PassedRecord | None
    session: Released | None


def _restore_ring(index: int, ring: RingRecord) -> Iterator[Call]:
    if ring.size is not None:
        yield "vhost_set_vring_num", (index, ring.size)
    if ring.addresses is not None:
        yield "vhost_set_vring_addr", (index, *ring.addresses)
    if ring.base is not None:
        yield "vhost_set_vring_base", (index, ring.base)
    if ring.call is not None:
        yield "vhost_set_vring_call", (index, ring.call.fileno())
    if ring.err is not None:
        yield "vhost_set_vring_err", (index, ring.err.fileno())
    if ring.enabled is not None:
        yield "vhost_set_vring_enable", (index, ring.enabled)


def _number(descriptor: Descriptor | None) -> int | None:
    return descriptor.fileno() if descriptor is not None else None
