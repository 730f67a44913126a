"""Messages of vhost-user, both directions, as frozen dataclasses: encode and decode, no I/O.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user); configuration space of Virtio 1.2, 5.2.4.

How it works: `decode_request` and `decode_reply` turn a `Frame` into one of the dataclasses here, `encode` is the way back. Every class
states its layout, its number of descriptors and what no state of a connection makes right.

Errors: `ProtocolError`, with the message's name, the field, the value and the limit.

Not implemented: the payloads of crypto, network, GPU, shared-object and device-state messages, which are refused by name.

Limits: those of `qpair.vhost.framing`.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Self

from qpair.vhost.framing import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    REGIONS_MAX,
    VERSION,
    Frame,
    Header,
    ProtocolError,
    Request,
)
from qpair.vhost.payload import STATE, U64, U64_LIMIT, ConfigPayload, InflightPayload, Message, U64Payload, VringFilePayload, exactly
from qpair.vhost.replies import (
    Ack,
    ConfigReply,
    DeviceStatus,
    Features,
    InflightReply,
    MaxMemSlots,
    ProtocolFeaturesOffer,
    QueueNum,
    VringBase,
)

__all__ = [
    "Ack",
    "AddMemReg",
    "ConfigReply",
    "DeviceStatus",
    "Features",
    "GetConfig",
    "GetFeatures",
    "GetInflightFd",
    "GetMaxMemSlots",
    "GetProtocolFeatures",
    "GetQueueNum",
    "GetStatus",
    "GetVringBase",
    "InflightReply",
    "MaxMemSlots",
    "MemoryRegion",
    "Message",
    "ProtocolFeaturesOffer",
    "QueueNum",
    "RemMemReg",
    "ResetDevice",
    "ResetOwner",
    "SetBackendReqFd",
    "SetConfig",
    "SetFeatures",
    "SetInflightFd",
    "SetLogBase",
    "SetLogFd",
    "SetMemTable",
    "SetOwner",
    "SetProtocolFeatures",
    "SetStatus",
    "SetVringAddr",
    "SetVringBase",
    "SetVringCall",
    "SetVringEnable",
    "SetVringErr",
    "SetVringKick",
    "SetVringNum",
    "VringBase",
    "decode_reply",
    "decode_request",
    "encode",
]

STATUS_MAX = 0xFF


@dataclass(frozen=True, slots=True)
class GetFeatures(Message):
    """Ask for the feature bits; answered by `Features`."""

    request = Request.GET_FEATURES


@dataclass(frozen=True, slots=True)
class SetFeatures(Message):
    """The agreed feature bits."""

    request = Request.SET_FEATURES
    layout = U64
    features: int


@dataclass(frozen=True, slots=True)
class SetOwner(Message):
    """This connection owns the device now."""

    request = Request.SET_OWNER


@dataclass(frozen=True, slots=True)
class ResetOwner(Message):
    """Obsolete."""

    request = Request.RESET_OWNER


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One piece of guest memory; its descriptor comes beside the message, in the same order."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int

    layout: ClassVar[struct.Struct] = struct.Struct("<QQQQ")


@dataclass(frozen=True, slots=True)
class SetMemTable(Message):
    """All guest memory, replacing what was before. One descriptor a region."""

    request = Request.SET_MEM_TABLE
    layout = STATE
    regions: tuple[MemoryRegion, ...]

    def encode_payload(self) -> bytes:
        return self.layout.pack(len(self.regions), 0) + b"".join(MemoryRegion.layout.pack(*astuple(region)) for region in self.regions)

    @classmethod
    def decode_payload(cls, payload: bytes) -> Self:
        name = cls.request.name
        if len(payload) < cls.layout.size:
            raise ProtocolError(name, "payload size", len(payload), f"at least {cls.layout.size} bytes")
        count, _ = cls.layout.unpack_from(payload)
        if count > REGIONS_MAX:
            raise ProtocolError(name, "number of regions", count, f"at most {REGIONS_MAX}")
        # Some front ends send the whole array of 8 whatever the number in use.
        least, most = cls.layout.size + count * MemoryRegion.layout.size, cls.layout.size + REGIONS_MAX * MemoryRegion.layout.size
        if not least <= len(payload) <= most:
            raise ProtocolError(name, "payload size", len(payload), f"{least} bytes for {count} regions")
        pieces = MemoryRegion.layout.iter_unpack(payload[cls.layout.size : least])
        message = cls(tuple(MemoryRegion(*piece) for piece in pieces))
        message.check()
        return message

    def check(self) -> None:
        for number, region in enumerate(self.regions):
            _check_region(self.request, region, f"region {number}")

    def fd_count(self) -> tuple[int, int]:
        return len(self.regions), len(self.regions)


class _RegionPayload(Message):
    """One region after eight bytes of padding."""

    __slots__ = ()
    layout = struct.Struct("<8xQQQQ")
    region: MemoryRegion

    def encode_payload(self) -> bytes:
        return self.layout.pack(*astuple(self.region))

    @classmethod
    def decode_payload(cls, payload: bytes) -> Self:
        exactly(cls.request.name, payload, cls.layout.size)
        message = cls(MemoryRegion(*cls.layout.unpack(payload)))  # type: ignore[call-arg]
        message.check()
        return message

    def check(self) -> None:
        _check_region(self.request, self.region, "the region")


@dataclass(frozen=True, slots=True)
class AddMemReg(_RegionPayload):
    """One more region of guest memory. One descriptor."""

    request = Request.ADD_MEM_REG
    fds_min = 1
    fds_max = 1
    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class RemMemReg(_RegionPayload):
    """A region goes. Some front ends send its descriptor again, without a meaning."""

    request = Request.REM_MEM_REG
    fds_max = 1
    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class GetMaxMemSlots(Message):
    """Ask for the most regions; answered by `MaxMemSlots`."""

    request = Request.GET_MAX_MEM_SLOTS


@dataclass(frozen=True, slots=True)
class SetVringNum(Message):
    """Entries of a queue."""

    request = Request.SET_VRING_NUM
    layout = STATE
    index: int
    size: int


@dataclass(frozen=True, slots=True)
class SetVringAddr(Message):
    """Where a queue lies, in the front end's address space. ``flags`` bit 0: log writes to the used ring at ``log``."""

    request = Request.SET_VRING_ADDR
    layout = struct.Struct("<IIQQQQ")
    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True, slots=True)
class SetVringBase(Message):
    """Where the back end starts: the avail index; of a packed ring two positions, the one to take next and above it the one to use next."""

    request = Request.SET_VRING_BASE
    layout = STATE
    index: int
    base: int


@dataclass(frozen=True, slots=True)
class GetVringBase(Message):
    """Stop a queue; answered by `VringBase` once nothing is in flight. ``unused`` has no meaning."""

    request = Request.GET_VRING_BASE
    layout = STATE
    index: int
    unused: int = 0


@dataclass(frozen=True, slots=True)
class SetVringKick(VringFilePayload):
    """The descriptor by which the front end kicks; starts the queue."""

    request = Request.SET_VRING_KICK


@dataclass(frozen=True, slots=True)
class SetVringCall(VringFilePayload):
    """The descriptor by which the back end interrupts."""

    request = Request.SET_VRING_CALL


@dataclass(frozen=True, slots=True)
class SetVringErr(VringFilePayload):
    """The descriptor by which the back end tells of a failed queue."""

    request = Request.SET_VRING_ERR


@dataclass(frozen=True, slots=True)
class GetProtocolFeatures(Message):
    """Ask for the protocol features; answered by `Features`."""

    request = Request.GET_PROTOCOL_FEATURES


@dataclass(frozen=True, slots=True)
class SetProtocolFeatures(Message):
    """The agreed protocol features."""

    request = Request.SET_PROTOCOL_FEATURES
    layout = U64
    features: int


@dataclass(frozen=True, slots=True)
class GetQueueNum(Message):
    """Ask for the most queues; answered by `QueueNum`."""

    request = Request.GET_QUEUE_NUM


@dataclass(frozen=True, slots=True)
class SetVringEnable(Message):
    """Let a queue pass requests (1) or not (0)."""

    request = Request.SET_VRING_ENABLE
    layout = STATE
    index: int
    enable: int

    def check(self) -> None:
        if self.enable > 1:
            raise ProtocolError(self.request.name, "enable", self.enable, "0 or 1")


@dataclass(frozen=True, slots=True)
class GetConfig(ConfigPayload):
    """Ask for ``size`` bytes of the configuration space; answered by `ConfigReply`. ``data`` has no meaning."""

    request = Request.GET_CONFIG
    offset: int
    size: int
    flags: int
    data: bytes

    @classmethod
    def of(cls, size: int, *, offset: int = 0) -> Self:
        """With as many zero bytes as are asked for, which back ends expect."""
        return cls(offset, size, 0, bytes(size))

    @classmethod
    def decode_payload(cls, payload: bytes) -> Self:
        offset, size, flags, data = cls.decode_range(payload)
        if len(data) not in (0, size):
            raise ProtocolError(cls.request.name, "payload size", len(payload), f"{cls.layout.size + size} bytes for a size of {size}")
        return cls(offset, size, flags, data)


@dataclass(frozen=True, slots=True)
class SetConfig(ConfigPayload):
    """Write to the configuration space. ``flags``: 0 the driver writes, 1 a migration restores."""

    request = Request.SET_CONFIG
    offset: int
    size: int
    flags: int
    data: bytes

    @classmethod
    def decode_payload(cls, payload: bytes) -> Self:
        offset, size, flags, data = cls.decode_range(payload)
        if len(data) != size:
            raise ProtocolError(cls.request.name, "payload size", len(payload), f"{cls.layout.size + size} bytes for a size of {size}")
        return cls(offset, size, flags, data)


@dataclass(frozen=True, slots=True)
class GetInflightFd(InflightPayload):
    """Ask for an inflight region for that many queues of that size; answered by `InflightReply`."""

    request = Request.GET_INFLIGHT_FD
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class SetInflightFd(InflightPayload):
    """Use this inflight region. One descriptor."""

    request = Request.SET_INFLIGHT_FD
    fds_min = 1
    fds_max = 1
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class ResetDevice(Message):
    """Back to the state after connecting, the connection excepted."""

    request = Request.RESET_DEVICE


@dataclass(frozen=True, slots=True)
class SetLogBase(Message):
    """Where writes to guest memory are marked, a bit a page. One descriptor; answered by an `Ack`."""

    request = Request.SET_LOG_BASE
    layout = struct.Struct("<QQ")
    fds_min = 1
    fds_max = 1
    mmap_size: int
    mmap_offset: int

    def check(self) -> None:
        if self.mmap_size == 0:
            raise ProtocolError(self.request.name, "mmap_size", 0, "more than 0 bytes")
        if self.mmap_offset + self.mmap_size > U64_LIMIT:
            limit = f"at most 2**64 - {self.mmap_size:#x}, its size"
            raise ProtocolError(self.request.name, "mmap_offset", f"{self.mmap_offset:#x}", limit)


@dataclass(frozen=True, slots=True)
class SetLogFd(Message):
    """The descriptor by which the back end tells that it has marked something. One descriptor."""

    request = Request.SET_LOG_FD
    fds_min = 1
    fds_max = 1


@dataclass(frozen=True, slots=True)
class SetBackendReqFd(Message):
    """The socket on which the back end may ask something of its own. One descriptor."""

    request = Request.SET_BACKEND_REQ_FD
    fds_min = 1
    fds_max = 1


@dataclass(frozen=True, slots=True)
class SetStatus(U64Payload):
    """The device status of Virtio 1.2, 2.1, as the driver has it; 0 resets the device."""

    request = Request.SET_STATUS

    def check(self) -> None:
        if self.value > STATUS_MAX:
            raise ProtocolError(self.request.name, "status", f"{self.value:#x}", f"at most {STATUS_MAX:#x}")


@dataclass(frozen=True, slots=True)
class GetStatus(Message):
    """Ask for the device status; answered by `DeviceStatus`."""

    request = Request.GET_STATUS


_REQUESTS: dict[Request, type[Message]] = {
    kind.request: kind
    for kind in (
        GetFeatures,
        SetFeatures,
        SetOwner,
        ResetOwner,
        SetMemTable,
        SetVringNum,
        SetVringAddr,
        SetVringBase,
        GetVringBase,
        SetVringKick,
        SetVringCall,
        SetVringErr,
        GetProtocolFeatures,
        SetProtocolFeatures,
        GetQueueNum,
        SetVringEnable,
        GetConfig,
        SetConfig,
        GetInflightFd,
        SetInflightFd,
        ResetDevice,
        AddMemReg,
        RemMemReg,
        GetMaxMemSlots,
        SetLogBase,
        SetLogFd,
        SetBackendReqFd,
        SetStatus,
        GetStatus,
    )
}
_REPLIES: dict[Request, type[Message]] = {
    kind.request: kind
    for kind in (Features, ProtocolFeaturesOffer, QueueNum, VringBase, ConfigReply, InflightReply, MaxMemSlots, DeviceStatus)
}


def decode_request(frame: Frame) -> Message:
    """What a front end asks. `ProtocolError` for a reply, a message that a block device does not know, and wrong descriptors."""
    header = frame.header
    if header.is_reply:
        raise ProtocolError(header.request.name, "flags", f"{header.flags:#x}", "those of a request, not of a reply")
    kind = _REQUESTS.get(header.request)
    if kind is None:
        raise ProtocolError("header", "request", f"{header.request.name} ({header.request:d})", "one that a block device supports")
    message = kind.decode_payload(frame.payload)
    _check_fds(message, frame)
    return message


def decode_reply(frame: Frame, *, to: Request) -> Message | Ack:
    """What a back end answers to ``to``: the reply of that request, or an `Ack` if it has none."""
    header = frame.header
    if not header.is_reply:
        raise ProtocolError(header.request.name, "flags", f"{header.flags:#x}", "those of a reply")
    if header.request is not to:
        raise ProtocolError("reply", "request", header.request.name, f"{to.name}, which was asked")
    kind = _REPLIES.get(to)
    if kind is None:
        exactly(to.name, frame.payload, U64.size)
        if frame.fds:
            raise ProtocolError(to.name, "number of descriptors", len(frame.fds), "0")
        return Ack(to, U64.unpack(frame.payload)[0])
    message = kind.decode_payload(frame.payload)
    _check_fds(message, frame)
    return message


def encode(message: Message | Ack, *, reply: bool = False, need_reply: bool = False) -> bytes:
    """Header and payload. An `Ack` is always a reply."""
    payload = U64.pack(message.result) if isinstance(message, Ack) else message.encode_payload()
    flags = VERSION | (FLAG_REPLY if reply or isinstance(message, Ack) else 0) | (FLAG_NEED_REPLY if need_reply else 0)
    return Header(message.request, flags, len(payload)).encode() + payload


def _check_region(request: Request, region: MemoryRegion, which: str) -> None:
    if region.size_bytes == 0:
        raise ProtocolError(request.name, f"size of {which}", 0, "more than 0 bytes")
    for field in ("guest_address", "user_address", "mmap_offset"):
        start: int = getattr(region, field)
        if start + region.size_bytes > U64_LIMIT:
            raise ProtocolError(request.name, f"{field} of {which}", f"{start:#x}", f"at most 2**64 - {region.size_bytes:#x}, its size")


def _check_fds(message: Message, frame: Frame) -> None:
    least, most = message.fd_count()
    if not least <= len(frame.fds) <= most:
        expected: Any = least if least == most else f"{least} to {most}"
        raise ProtocolError(message.request.name, "number of descriptors", len(frame.fds), str(expected))
