"""Descriptors of a file system that never answers: nobody waits for it, neither in a page fault nor in a close.

The file system is FUSE with this process for a server. It answers what opening a file takes, and then nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from hostile.conftest import World
from hostile.front_end import GET_FEATURES, SET_INFLIGHT_FD, SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK
from hostile.process import until
from missing import missing

BYTES = 1 << 20
MODE = 0o100600
GETATTR, OPEN, FLUSH, INIT = 3, 14, 25, 26
MNT_DETACH = 2


class SilentFile:
    """A file that can be opened and looked at, and then no more."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._asked: list[int] = []
        try:
            self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            missing("FUSE", error)
        options = f"fd={self._device},rootmode={MODE:o},user_id=0,group_id=0,allow_other"
        if self._libc.mount(b"silent", os.fsencode(path), b"fuse.silent", 6, options.encode()):
            os.close(self._device)
            missing("FUSE", f"mount: {os.strerror(ctypes.get_errno())}")
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._server = threading.Thread(target=self._serve)
        self._server.start()
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        assert os.fstat(self.fd).st_size == BYTES

    def _serve(self) -> None:
        while self._end not in select.select([self._device, self._end], [], [])[0]:
            request = os.read(self._device, 1 << 18)
            _, kind, unique = struct.unpack_from("<IIQ", request)
            self._asked.append(kind)
            if answer := self._answer(kind):
                os.write(self._device, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)

    def _answer(self, kind: int) -> bytes | None:
        if kind == INIT:
            return struct.pack("<IIIIHHIIHHII", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, 0, 0).ljust(64, b"\0")
        if kind == OPEN:
            return struct.pack("<QIi", 1, 0, 0)
        if kind == GETATTR and self._asked.count(GETATTR) == 1:
            return struct.pack("<QII", 0, 0, 0) + struct.pack("<QQQ24x12xIIIII8x", 1, BYTES, 8, MODE, 1, 0, 0, 0)
        return None

    def asked(self, kind: int) -> int:
        """How often the kernel asked for that so far."""
        return self._asked.count(kind)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self._end, 1)
        self._server.join()
        # This ends the file system: whoever waits for it is told so.
        os.close(self._device)
        os.close(self._end)
        with contextlib.suppress(OSError):  # closed, although the file system is not there to be told
            os.close(self.fd)
        assert self._libc.umount2(os.fsencode(self._path), MNT_DETACH) == 0


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[SilentFile]:
    with SilentFile(tmp_path / "silent") as there:
        yield there


def test_memory_that_may_never_come_is_refused_by_name_and_the_session_goes_on(world: World, silent: SilentFile) -> None:
    with world.connect().agree() as front_end:
        start = world.server.mark()
        assert front_end.table(fds=[silent.fd]) != 0
        reason = r"SET_MEM_TABLE refused: .*memory on a file system of type fuse\.silent may never answer: it must be a memfd"
        assert len(world.server.lines(reason, start)) == 1, world.server.lines("", start)
        assert world.server.guest_mappings() == []
        assert front_end.table() == 0
        world.fine()
    assert silent.asked(GETATTR) == 1, "nobody asked it anything"
    # Both closes, the control plane's and the engine's, are waiting still; nobody else is.
    until(lambda: silent.asked(FLUSH) == 2, "two closes")


def test_an_inflight_region_that_may_never_come_is_refused_by_name(world: World, silent: SilentFile) -> None:
    with world.connect().agree() as front_end:
        start = world.server.mark()
        assert front_end.order(SET_INFLIGHT_FD, struct.pack("<QQHH4x", BYTES, 0, 1, 64), [silent.fd]) != 0
        assert len(world.server.lines(r"SET_INFLIGHT_FD refused: .*type fuse\.silent may never answer", start)) == 1
        world.fine()
    assert silent.asked(GETATTR) == 1


@pytest.mark.parametrize("request_number", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR])
def test_a_notification_that_may_never_return_is_refused(world: World, silent: SilentFile, request_number: int) -> None:
    with world.connect().agree() as front_end:
        start = world.server.mark()
        assert front_end.order(request_number, struct.pack("<Q", 0), [silent.fd]) != 0
        assert len(world.server.lines("an eventfd", start)) == 1, world.server.lines("", start)
        world.fine()


def test_a_descriptor_that_nobody_wanted_is_closed_where_nobody_waits(world: World, silent: SilentFile) -> None:
    with world.connect() as front_end:
        front_end.send(GET_FEATURES, fds=[silent.fd])
        until(lambda: silent.asked(FLUSH) >= 1, "a close")
        world.fine()
