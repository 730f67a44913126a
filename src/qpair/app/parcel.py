"""Messages between two processes, with open descriptors in them.

How it works: a message is a `msgspec.Struct` in which a descriptor is a `Descriptor`. `pack` gives its bytes (JSON) and the descriptors that it names, in order, each named
by its place; `unpack` does the reverse. On a Unix stream socket a parcel is a header (length of the bytes, number of descriptors), for each `FDS_A_PIECE`
descriptors one byte that they come with, and the bytes (`send`, `receive`).

Errors: `ParcelError` for what cannot be a parcel: lengths beyond the limits, descriptors that are missing, left over or named twice, bytes that are no such message;
for an end in the middle; ``TimeoutError``. Descriptors that came with a refused parcel are closed.

Limits: `BYTES_MAX`, `FDS_MAX` a parcel.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from qpair.errors import QpairError

__all__ = ["BYTES_MAX", "FDS_MAX", "Descriptor", "ParcelError", "pack", "receive", "send", "unpack"]

BYTES_MAX = 64 << 20
FDS_MAX = 32768
FDS_A_PIECE = 200
"""The kernel takes 253 (SCM_MAX_FD) with one piece of data."""

_HEADER = struct.Struct("<II")
_FD_BYTES = array.array("i").itemsize

Message = TypeVar("Message")


class ParcelError(QpairError, ValueError):
    """The peer sent what cannot be a parcel."""


class Descriptor:
    """An open file descriptor that belongs to whoever holds this; closed when nobody does."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def duplicate(cls, fd: int) -> Descriptor:
        """Of the same open file as ``fd``, which stays the caller's."""
        return cls(os.dup(fd))

    def fileno(self) -> int:
        """Its number; -1 once it is taken or closed."""
        return self._fd

    def take(self) -> int:
        """Its number, now the caller's to close."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Idempotent."""
        if (fd := self.take()) >= 0:
            from qpair.vhost.transport import close_all

            close_all([fd])

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def pack(message: msgspec.Struct) -> tuple[bytes, list[int]]:
    """Its bytes, and the descriptors that go with them, which stay the message's."""
    fds: list[int] = []

    def place(value: Any) -> Any:
        if not isinstance(value, Descriptor):
            raise TypeError(f"a message cannot hold a {type(value).__name__}")
        fds.append(value.fileno())
        return len(fds) - 1

    return msgspec.json.encode(message, enc_hook=place), fds


def unpack(data: bytes, fds: Sequence[int], kind: type[Message] | Any) -> Message:
    """A message of ``kind`` (a union of tagged structs, too). Owns ``fds`` from the call on."""
    owned = [Descriptor(fd) for fd in fds]
    named: set[int] = set()

    def find(wanted: type, value: Any) -> Any:
        assert wanted is Descriptor
        if type(value) is not int or not 0 <= value < len(owned) or value in named:
            raise ValueError(f"descriptor {value!r:.40} of {len(owned)} is not there, or named twice")
        named.add(value)
        return owned[value]

    try:
        message: Message = msgspec.json.decode(data, type=kind, dec_hook=find)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ParcelError(f"not a message that is known here: {error!s:.200}") from None
    if len(named) != len(owned):
        raise ParcelError(f"{len(owned)} descriptors came, {len(named)} are named")
    return message


def send(sock: socket.socket, message: msgspec.Struct) -> None:
    """All of it, or ``OSError``; blocks as the socket's timeout says."""
    data, fds = pack(message)
    if len(data) > BYTES_MAX or len(fds) > FDS_MAX:
        raise ParcelError(f"a message of {len(data)} bytes and {len(fds)} descriptors: the limits are {BYTES_MAX} and {FDS_MAX}")
    sock.sendall(_HEADER.pack(len(data), len(fds)))
    for start in range(0, len(fds), FDS_A_PIECE):
        piece = array.array("i", fds[start : start + FDS_A_PIECE])
        sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, piece)])
    sock.sendall(data)


def receive(sock: socket.socket, kind: type[Message] | Any) -> Message:
    """The next message. ``EOFError`` where the peer has left between two."""
    head = _exactly(sock, _HEADER.size, at_start=True)
    length, count = _HEADER.unpack(head)
    if length > BYTES_MAX or count > FDS_MAX:
        raise ParcelError(f"a message of {length} bytes and {count} descriptors: the limits are {BYTES_MAX} and {FDS_MAX}")
    fds: list[int] = []
    try:
        while len(fds) < count:
            fds += _piece(sock, min(FDS_A_PIECE, count - len(fds)))
        data = _exactly(sock, length)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    message: Message = unpack(data, fds, kind)
    return message


def _piece(sock: socket.socket, wanted: int) -> list[int]:
    data, control, flags, _ = sock.recvmsg(1, socket.CMSG_SPACE(wanted * _FD_BYTES), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_BYTES])
    if not data or flags & socket.MSG_CTRUNC or len(fds) != wanted:
        for fd in fds:
            os.close(fd)
        raise ParcelError(f"{len(fds)} descriptors came where {wanted} were announced")
    return fds.tolist()


def _exactly(sock: socket.socket, length: int, *, at_start: bool = False) -> bytes:
    pieces = bytearray()
    while len(pieces) < length:
        piece = sock.recv(min(length - len(pieces), 1 << 20))
        if not piece:
            if at_start and not pieces:
                raise EOFError("the peer left")
            raise ParcelError(f"the peer left in the middle of a message: {len(pieces)} of {length} bytes came")
        pieces += piece
    return bytes(pieces)
