"""Shapes of payload that several vhost-user messages share.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user).

How it works: a message is a dataclass derived from `Message`; its fields, packed by ``layout``, are its payload. What has no fixed
size or a choice of descriptors overrides a method.

Errors: `ProtocolError`, with the message's name, the field, the value and the limit.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import ClassVar, Self

from qpair.vhost.framing import CONFIG_BYTES_MAX, ProtocolError, Request

__all__ = ["STATE", "U64", "U64_LIMIT", "ConfigPayload", "InflightPayload", "Message", "U64Payload", "VringFilePayload", "exactly"]

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8
U64_LIMIT = 1 << 64

U64 = struct.Struct("<Q")
STATE = struct.Struct("<II")


def exactly(where: str, data: bytes, size: int) -> None:
    """Refuse a payload of another size."""
    if len(data) != size:
        raise ProtocolError(where, "payload size", len(data), f"{size} bytes")


class Message:
    """Base of all messages: its layout and the number of descriptors that belong to it."""

    __slots__ = ()
    request: ClassVar[Request]
    layout: ClassVar[struct.Struct] = struct.Struct("")
    fds_min: ClassVar[int] = 0
    fds_max: ClassVar[int] = 0

    def encode_payload(self) -> bytes:
        """The payload without header."""
        return self.layout.pack(*astuple(self))  # type: ignore[call-overload]

    @classmethod
    def decode_payload(cls, payload: bytes) -> Self:
        """Of exactly one payload; `ProtocolError` for another size or a value out of its range."""
        exactly(cls.request.name, payload, cls.layout.size)
        message = cls(*cls.layout.unpack(payload))
        message.check()
        return message

    def check(self) -> None:
        """Refuse values that no state of the connection makes right."""

    def fd_count(self) -> tuple[int, int]:
        """The fewest and the most descriptors that come with this message."""
        return self.fds_min, self.fds_max


@dataclass(frozen=True, slots=True)
class VringFilePayload(Message):
    """A queue and at most one descriptor. ``value`` holds the queue in 7:0 and, in bit 8, that no descriptor comes along."""

    layout = U64
    fds_max = 1
    value: int

    @property
    def index(self) -> int:
        """The queue."""
        return self.value & VRING_INDEX_MASK

    @property
    def has_fd(self) -> bool:
        """A descriptor comes along."""
        return not self.value & VRING_NO_FD

    @classmethod
    def of(cls, index: int, *, has_fd: bool = True) -> Self:
        """For queue ``index``."""
        return cls(index if has_fd else index | VRING_NO_FD)

    def check(self) -> None:
        if self.value >> 9:
            raise ProtocolError(self.request.name, "payload", f"{self.value:#x}", "a queue in bits 7:0 and a flag in bit 8")

    def fd_count(self) -> tuple[int, int]:
        return (1, 1) if self.has_fd else (0, 0)


class ConfigPayload(Message):
    """A range of the configuration space and its bytes."""

    __slots__ = ()
    layout = struct.Struct("<III")
    offset: int
    size: int
    flags: int
    data: bytes

    def encode_payload(self) -> bytes:
        return self.layout.pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def decode_range(cls, payload: bytes) -> tuple[int, int, int, bytes]:
        """Offset, size, flags and the bytes that follow, which may be fewer or more than ``size``."""
        name = cls.request.name
        if len(payload) < cls.layout.size:
            raise ProtocolError(name, "payload size", len(payload), f"at least {cls.layout.size} bytes")
        offset, size, flags = cls.layout.unpack_from(payload)
        if size > CONFIG_BYTES_MAX:
            raise ProtocolError(name, "size", size, f"at most {CONFIG_BYTES_MAX} bytes")
        if offset + size > CONFIG_BYTES_MAX:
            raise ProtocolError(name, "offset", offset, f"at most {CONFIG_BYTES_MAX - size} for a size of {size}")
        return offset, size, flags, payload[cls.layout.size :]


class InflightPayload(Message):
    """The inflight region: 20 bytes as documented, 24 as every implementation sends its C structure."""

    __slots__ = ()
    layout = struct.Struct("<QQHH4x")
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    @classmethod
    def decode_payload(cls, payload: bytes) -> Self:
        if len(payload) not in (20, 24):
            raise ProtocolError(cls.request.name, "payload size", len(payload), "20 or 24 bytes")
        message = cls(*cls.layout.unpack(payload.ljust(24, b"\0")))
        message.check()
        return message

    def check(self) -> None:
        if self.mmap_offset + self.mmap_size > U64_LIMIT:
            raise ProtocolError(
                self.request.name, "mmap_offset", f"{self.mmap_offset:#x}", f"at most 2**64 - {self.mmap_size:#x}, its size"
            )


@dataclass(frozen=True, slots=True)
class U64Payload(Message):
    """One number."""

    layout = U64
    value: int
