"""Parcels: what is sent arrives, with the same open files; what cannot be one is refused, and leaves no descriptor open."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpair.app import parcel
from qpair.app.parcel import Descriptor, ParcelError
from qpair.app.takeover.messages import Failed, FromGiver, FromTaker, Go, Handover
from vhost.conftest import count_fds, open_fds

__all__ = ["count_fds"]


class Letter(msgspec.Struct, tag=True):
    text: str
    files: list[Descriptor] = []
    more: dict[str, Descriptor] = {}


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    for end in (near, far):
        end.settimeout(5)
    with near, far:
        yield near, far


def memfd(content: bytes) -> Descriptor:
    fd = os.memfd_create("letter")
    os.write(fd, content)
    return Descriptor(fd)


@pytest.mark.parametrize("count", [0, 1, 3, parcel.FDS_A_PIECE, parcel.FDS_A_PIECE + 1, 2 * parcel.FDS_A_PIECE + 7])
def test_what_is_sent_arrives_with_the_same_files(ends: tuple[socket.socket, socket.socket], count: int) -> None:
    near, far = ends
    letter = Letter("x" * 100_000, [memfd(str(number).encode()) for number in range(count)], {"a": memfd(b"a"), "b": memfd(b"b")})
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    parcel.send(near, letter)
    found = parcel.receive(far, Letter)
    assert isinstance(found, Letter)
    assert found.text == letter.text
    assert [os.pread(file.fileno(), 9, 0) for file in found.files] == [str(number).encode() for number in range(count)]
    assert {name: os.pread(file.fileno(), 9, 0) for name, file in found.more.items()} == {"a": b"a", "b": b"b"}


def test_a_descriptor_is_closed_when_nobody_holds_it() -> None:
    before = open_fds()
    held = memfd(b"")
    number = held.fileno()
    del held
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)
    taken = memfd(b"").take()
    os.close(taken)
    closed = memfd(b"")
    closed.close()
    closed.close()
    assert open_fds() == before


@pytest.mark.parametrize(
    ("data", "fds", "reason"),
    [
        (b"", 0, "truncated"),
        (b'{"type": "Letter", "text": 7}', 0, "Expected `str`"),
        (b'{"type": "Note", "text": ""}', 0, "Note"),
        (b'{"type": "Letter", "text": "", "files": [0]}', 0, "descriptor 0 of 0 is not there"),
        (b'{"type": "Letter", "text": "", "files": [-1]}', 1, "descriptor -1 of 1"),
        (b'{"type": "Letter", "text": "", "files": [true]}', 1, "descriptor True of 1"),
        (b'{"type": "Letter", "text": "", "files": [0.0]}', 1, "descriptor 0.0 of 1"),
        (b'{"type": "Letter", "text": "", "files": [0, 0]}', 2, "named twice"),
        (b'{"type": "Letter", "text": ""}', 1, "1 descriptors came, 0 are named"),
    ],
)
def test_what_is_no_message_is_refused_by_name_and_its_files_are_closed(data: bytes, fds: int, reason: str) -> None:
    before = open_fds()
    with pytest.raises(ParcelError, match=reason):
        parcel.unpack(data, [os.memfd_create("x") for _ in range(fds)], Letter)
    assert open_fds() == before


def descriptors(fds: list[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def refuse_without_a_leak(sent: Callable[[socket.socket], None], reason: str) -> None:
    before = open_fds()
    near, far = socket.socketpair()
    far.settimeout(5)
    with near, far:
        sent(near)
        near.close()
        with pytest.raises(ParcelError, match=reason):
            parcel.receive(far, Letter)
    assert open_fds() == before


def test_a_stream_that_lies_is_refused_by_name() -> None:
    file = memfd(b"")
    some = [file.fileno()] * 3
    refuse_without_a_leak(lambda sock: sock.sendall(struct.pack("<II", parcel.BYTES_MAX + 1, 0)), "the limits are")
    refuse_without_a_leak(lambda sock: sock.sendall(struct.pack("<II", 0, parcel.FDS_MAX + 1)), "the limits are")
    refuse_without_a_leak(lambda sock: sock.sendall(b"\0\0\0"), "3 of 8 bytes came")
    refuse_without_a_leak(lambda sock: sock.sendall(struct.pack("<II", 9, 0) + b"1234"), "4 of 9 bytes came")
    refuse_without_a_leak(lambda sock: sock.sendall(struct.pack("<II", 9, 2) + b"\0"), "0 descriptors came where 2 were announced")

    def too_many(sock: socket.socket) -> None:
        sock.sendall(struct.pack("<II", 2, 2))
        sock.sendmsg([b"\0"], descriptors(some))

    def cut_after_files(sock: socket.socket) -> None:
        sock.sendall(struct.pack("<II", 2, 3))
        sock.sendmsg([b"\0"], descriptors(some))

    refuse_without_a_leak(too_many, "descriptors came where 2 were announced")
    refuse_without_a_leak(cut_after_files, "0 of 2 bytes came")


def test_an_end_between_two_messages_is_an_end(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    parcel.send(near, Go())
    near.close()
    assert isinstance(parcel.receive(far, FromGiver), Go)
    with pytest.raises(EOFError):
        parcel.receive(far, FromGiver)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_bytes_are_a_message_or_refused(data: bytes, count: int) -> None:
    for kind in (FromGiver, FromTaker, Handover):
        files = [os.memfd_create("x") for _ in range(count)]
        with contextlib.suppress(ParcelError):
            parcel.unpack(data, files, kind)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_whole_or_byte_by_byte_it_is_the_same(text: str) -> None:
    data, _ = parcel.pack(Failed(text))
    stream = struct.pack("<II", len(data), 0) + data
    near, far = socket.socketpair()
    far.settimeout(5)
    with near, far:
        near.sendall(stream)
        assert parcel.receive(far, FromTaker) == Failed(text)
        for byte in stream:
            near.sendall(bytes([byte]))
        assert parcel.receive(far, FromTaker) == Failed(text)
