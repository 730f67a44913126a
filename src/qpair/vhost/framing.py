"""Framing of vhost-user: headers, and whole messages out of bytes and descriptors in pieces.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user).

How it works: a message is a 12-byte `Header` and ``size`` bytes of payload, with file descriptors beside it. `Assembler` takes bytes
and descriptors in pieces of any size and gives `Frame`; what a payload means is the business of `qpair.vhost.messages`.

Errors: `ProtocolError`, with the message's name, the field, the value and the limit. A header is refused before its payload is read.

Limits: 268 bytes of payload (the largest message known here: 256 bytes of configuration), 8 descriptors (a memory table of 8 regions).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

__all__ = [
    "CONFIG_BYTES_MAX",
    "FDS_MAX",
    "FLAG_NEED_REPLY",
    "FLAG_REPLY",
    "HEADER_BYTES",
    "PAYLOAD_BYTES_MAX",
    "REGIONS_MAX",
    "VERSION",
    "Assembler",
    "BackendRequest",
    "Frame",
    "Header",
    "ProtocolError",
    "ProtocolFeatures",
    "Request",
]

VERSION = 1
HEADER_BYTES = 12
REGIONS_MAX = 8
FDS_MAX = REGIONS_MAX
CONFIG_BYTES_MAX = 256
PAYLOAD_BYTES_MAX = 12 + CONFIG_BYTES_MAX

FLAG_VERSION_MASK = 0x3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3


class Request(IntEnum):
    """What a front end asks; a reply carries the number of its request."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """What a back end asks, on the socket of SET_BACKEND_REQ_FD; a number space of its own."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3

    def encode(self) -> bytes:
        """The whole message, which wants no reply. Only those without a payload."""
        return Header.layout.pack(self, VERSION, 0)


class ProtocolFeatures(IntFlag):
    """Protocol feature bits."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class ProtocolError(ValueError):
    """The peer broke the protocol: ``where`` (a message's name), ``field``, ``value``, and ``limit``, what it must be."""

    def __init__(self, where: str, field: str, value: object, limit: str) -> None:
        super().__init__(where, field, value, limit)
        self.where = where
        self.field = field
        self.value = value
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.where}: {self.field} is {self.value}, must be {self.limit}"


@dataclass(frozen=True, slots=True)
class Header:
    """Head of every message."""

    request: Request
    flags: int
    size: int

    layout: ClassVar[struct.Struct] = struct.Struct("<III")

    @property
    def is_reply(self) -> bool:
        """This message answers one."""
        return bool(self.flags & FLAG_REPLY)

    @property
    def needs_reply(self) -> bool:
        """The sender wants an `Ack`, if REPLY_ACK was agreed on."""
        return bool(self.flags & FLAG_NEED_REPLY)

    def encode(self) -> bytes:
        """Its 12 bytes."""
        return self.layout.pack(self.request, self.flags, self.size)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Of exactly 12 bytes. Unknown flag bits are kept and mean nothing."""
        if len(data) != cls.layout.size:
            raise ProtocolError("header", "size", len(data), f"{cls.layout.size} bytes")
        number, flags, size = cls.layout.unpack(data)
        if number not in _NUMBERS:
            raise ProtocolError("header", "request", number, f"a known request, {min(Request):d} to {max(Request):d}")
        request = Request(number)
        if (version := flags & FLAG_VERSION_MASK) != VERSION:
            raise ProtocolError(request.name, "version", version, str(VERSION))
        if size > PAYLOAD_BYTES_MAX:
            raise ProtocolError(request.name, "payload size", size, f"at most {PAYLOAD_BYTES_MAX} bytes")
        return cls(request, flags, size)


_NUMBERS = frozenset(int(request) for request in Request)


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole message: header, payload and the descriptors that came with it (the holder closes them)."""

    header: Header
    payload: bytes
    fds: tuple[int, ...]


class Assembler:
    """Bytes and descriptors in, frames out: at most one frame at a time, so that no byte of the next is taken.

    ``wanted`` says how many bytes to read next; `feed` takes at most so many. Descriptors are only counted and passed on: after an
    error they are in ``fds``, for whoever closes them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header: Header | None = None
        self.fds: list[int] = []

    @property
    def wanted(self) -> int:
        """How many bytes complete the header or the payload; at least 1 unless a frame is ready."""
        total = HEADER_BYTES if self._header is None else self._header.size
        return total - len(self._buffer)

    @property
    def at_boundary(self) -> bool:
        """Nothing of a message has arrived: the peer may leave now without breaking the protocol."""
        return self._header is None and not self._buffer and not self.fds

    @property
    def partial(self) -> bytes:
        """What came of an incomplete message."""
        return (b"" if self._header is None else self._header.encode()) + bytes(self._buffer)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> Frame | None:
        """The next piece; a `Frame` if it completes one. ``ValueError`` for more than ``wanted`` bytes (the caller's mistake)."""
        self.fds.extend(fds)
        if len(data) > self.wanted:
            raise ValueError(f"fed {len(data)} bytes where {self.wanted} are wanted")
        self._buffer += data
        if len(self.fds) > FDS_MAX:
            raise ProtocolError("message", "number of descriptors", len(self.fds), f"at most {FDS_MAX}")
        if self._header is None and len(self._buffer) == HEADER_BYTES:
            self._header = Header.decode(bytes(self._buffer))
            self._buffer.clear()
        if self._header is None or len(self._buffer) < self._header.size:
            return None
        frame = Frame(self._header, bytes(self._buffer), tuple(self.fds))
        self._header = None
        self._buffer.clear()
        self.fds.clear()
        return frame
