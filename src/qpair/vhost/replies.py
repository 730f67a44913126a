"""What a back end answers, as frozen dataclasses; the requests are in `qpair.vhost.messages`.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user).

How it works: as in `qpair.vhost.payload`.

Errors: `ProtocolError`, with the message's name, the field, the value and the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from qpair.vhost.framing import ProtocolError, Request
from qpair.vhost.payload import STATE, ConfigPayload, InflightPayload, Message, U64Payload

__all__ = [
    "Ack",
    "ConfigReply",
    "DeviceStatus",
    "Features",
    "InflightReply",
    "MaxMemSlots",
    "ProtocolFeaturesOffer",
    "QueueNum",
    "VringBase",
]


@dataclass(frozen=True, slots=True)
class Features(U64Payload):
    """Answers `qpair.vhost.messages.GetFeatures`."""

    request = Request.GET_FEATURES


@dataclass(frozen=True, slots=True)
class ProtocolFeaturesOffer(U64Payload):
    """Answers `GetProtocolFeatures`."""

    request = Request.GET_PROTOCOL_FEATURES


@dataclass(frozen=True, slots=True)
class QueueNum(U64Payload):
    """Answers `GetQueueNum`."""

    request = Request.GET_QUEUE_NUM


@dataclass(frozen=True, slots=True)
class MaxMemSlots(U64Payload):
    """Answers `GetMaxMemSlots`."""

    request = Request.GET_MAX_MEM_SLOTS


@dataclass(frozen=True, slots=True)
class VringBase(Message):
    """Answers `GetVringBase`: where a later start goes on, as `SetVringBase` has it."""

    request = Request.GET_VRING_BASE
    layout = STATE
    index: int
    base: int


@dataclass(frozen=True, slots=True)
class ConfigReply(ConfigPayload):
    """Answers `GetConfig`. No payload at all means that the back end refused."""

    request = Request.GET_CONFIG
    offset: int
    size: int
    flags: int
    data: bytes

    @property
    def refused(self) -> bool:
        """The back end has no such range."""
        return self.size == 0

    def encode_payload(self) -> bytes:
        return b"" if self.refused else ConfigPayload.encode_payload(self)

    @classmethod
    def decode_payload(cls, payload: bytes) -> Self:
        if not payload:
            return cls(0, 0, 0, b"")
        offset, size, flags, data = cls.decode_range(payload)
        if len(data) != size:
            raise ProtocolError(cls.request.name, "payload size", len(payload), f"{cls.layout.size + size} bytes for a size of {size}")
        return cls(offset, size, flags, data)


@dataclass(frozen=True, slots=True)
class InflightReply(InflightPayload):
    """Answers `GetInflightFd`. One descriptor, unless ``mmap_size`` is 0: then the back end tracks nothing."""

    request = Request.GET_INFLIGHT_FD
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def fd_count(self) -> tuple[int, int]:
        return (1, 1) if self.mmap_size else (0, 0)


@dataclass(frozen=True, slots=True)
class DeviceStatus(U64Payload):
    """Answers `GetStatus`: what was set last."""

    request = Request.GET_STATUS


@dataclass(frozen=True, slots=True)
class Ack:
    """Answers a request that has no reply of its own and asked for one (REPLY_ACK). 0 is success."""

    request: Request
    result: int
