"""What exists under a protocol feature alone: the back end's own requests, the dirty log, the device status, the write-cache mode."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from doubles.engine import BdevEvent, EngineError
from qpair.vhost import messages as m
from qpair.vhost.framing import BackendRequest, Header, ProtocolFeatures, Request
from vhost.conftest import eventually
from vhost.engine_double import VhostEngine
from vhost.peer import ALL_PROTOCOL_FEATURES, Peer, with_files
from vhost.test_session import ended

pytestmark = pytest.mark.usefixtures("recording_stack")

CONFIG_CHANGED = struct.pack("<III", 2, 1, 0)


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qpair.vhost")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def read_now(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except BlockingIOError:
        return b""


def resize(recorder: VhostEngine, name: str = "disk0") -> None:
    recorder.push(BdevEvent("resized", name))


# -- the back end's own requests ------------------------------------------------------------------


async def test_a_resized_bdev_has_the_front_end_read_the_configuration(
    peer: Peer, recorder: VhostEngine, pair: tuple[socket.socket, socket.socket]
) -> None:
    await peer.agree()
    ours, theirs = pair
    assert await peer.order(m.SetBackendReqFd(), [theirs.fileno()]) == 0
    resize(recorder, "another")
    resize(recorder)
    read = bytearray()
    await eventually(lambda: read.extend(read_now(ours)) or len(read) >= 12, "it is asked")
    assert bytes(read) == CONFIG_CHANGED
    assert BackendRequest.CONFIG_CHANGE_MSG.encode() == CONFIG_CHANGED
    resize(recorder)
    await eventually(lambda: read.extend(read_now(ours)) or len(read) >= 24, "it is asked again")


async def test_without_a_channel_a_resize_asks_nothing(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    resize(recorder)
    assert (await peer.ask(m.GetFeatures())).value


async def test_a_front_end_that_never_reads_costs_one_line_and_no_time(
    peer: Peer, recorder: VhostEngine, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while theirs.send(bytes(64)):
            pass
    theirs.setblocking(True)  # the descriptor's flags are the peer's, too
    assert await peer.order(m.SetBackendReqFd(), [theirs.fileno()]) == 0
    for _ in range(1000):
        resize(recorder)
    assert (await peer.ask(m.GetFeatures())).value, "the session goes on"
    await eventually(lambda: "does not read" in caplog.text, "it is told")
    assert caplog.text.count("the front end cannot be told of a change: it does not read") == 1
    read = bytearray()
    await eventually(lambda: read.extend(read_now(ours)) or bytes(read).endswith(CONFIG_CHANGED), "what waited is sent when there is room")
    assert bytes(read).rstrip(b"\0").count(b"\2\0\0\0\1") == 1, "of a thousand changes one is told"


async def test_a_front_end_that_closed_its_end_is_asked_no_more(
    peer: Peer, recorder: VhostEngine, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    ours, theirs = pair
    assert await peer.order(m.SetBackendReqFd(), [theirs.fileno()]) == 0
    ours.close()
    theirs.close()
    for _ in range(20):
        resize(recorder)
        assert (await peer.ask(m.GetFeatures())).value
    assert caplog.text.count("the front end cannot be told of a change: it is not asked any more: Broken pipe") == 1


async def test_a_channel_is_replaced_and_closed_with_the_session(
    peer: Peer, controller: Any, recorder: VhostEngine, count_fds: Callable[[], set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    before = count_fds()
    for _ in range(5):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert await peer.order(m.SetBackendReqFd(), [theirs.fileno()]) == 0
    assert len(count_fds() - before) == 1
    peer.close()
    await ended(controller, caplog)
    assert len(count_fds()) < len(before)


async def test_a_channel_that_is_no_unix_stream_ends_the_session_by_name(
    controller: Any, caplog: pytest.LogCaptureFixture, count_fds: Callable[[], set[str]]
) -> None:
    def offered() -> Iterator[tuple[int, str]]:
        memory = os.memfd_create("none")
        yield memory, "no socket"
        os.close(memory)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            yield datagrams.fileno(), "a socket of family 1, type 2"
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as network:
            yield network.fileno(), "a socket of family 2, type 1"

    before = count_fds()
    for fd, found in offered():
        caplog.clear()
        visitor = await Peer.connect(controller.socket)
        await visitor.agree()
        visitor.send(m.SetBackendReqFd(), [fd])
        reason = await ended(controller, caplog)
        assert reason == f"the front end broke the protocol: SET_BACKEND_REQ_FD: descriptor is {found}, must be a unix stream socket"
        visitor.close()
    await eventually(lambda: count_fds() == before, "all descriptors are closed")


# -- the dirty log --------------------------------------------------------------------------------


async def test_a_log_is_handed_over_and_answered_although_nobody_asked_for_an_answer(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    files = with_files(1, lambda fds: peer.send(m.SetLogBase(4096, 8), fds))
    frame = await peer.receive()
    assert frame is not None
    assert m.decode_reply(frame, to=Request.SET_LOG_BASE) == m.Ack(Request.SET_LOG_BASE, 0)
    told = with_files(1, lambda fds: peer.send(m.SetLogFd(), fds))
    peer.send(m.SetVringAddr(1, 1, 2, 3, 4, 5))
    assert (await peer.ask(m.GetFeatures())).value
    flow = [(call.name, call.args, call.files) for call in recorder.calls[-3:]]
    assert flow == [
        ("vhost_set_log_base", (4096, 8), tuple(files)),
        ("vhost_set_log_fd", (), tuple(told)),
        ("vhost_set_vring_addr", (1, 1, 2, 3, 4, 5), ()),
    ]


async def test_a_log_that_the_engine_refuses_ends_the_session_for_nobody_would_look_at_an_answer(
    peer: Peer, controller: Any, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    recorder.refusals["vhost_set_log_base"] = EngineError(errno.EINVAL, "range 0x0+0x2000 leaves its region of 0x1000 bytes")
    with_files(1, lambda fds: peer.send(m.SetLogBase(8192, 0), fds, need_reply=True))
    assert await ended(controller, caplog) == "refused: range 0x0+0x2000 leaves its region of 0x1000 bytes"
    assert await peer.closed()


async def test_flags_of_a_ring_that_mean_nothing_end_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    await peer.agree()
    peer.send(m.SetVringAddr(0, 3, 0, 0, 0, 0))
    assert await ended(controller, caplog) == "the front end broke the protocol: SET_VRING_ADDR: flags is 0x3, must be 0 or 0x1"


@pytest.mark.parametrize(
    ("message", "fds", "feature"),
    [
        (m.SetLogBase(4096, 0), 1, "LOG_SHMFD"),
        (m.SetLogFd(), 1, "LOG_SHMFD"),
        (m.SetBackendReqFd(), 1, "BACKEND_REQ"),
        (m.SetStatus(0), 0, "STATUS"),
        (m.GetStatus(), 0, "STATUS"),
    ],
)
async def test_a_message_whose_feature_was_not_agreed_on_ends_the_session(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture, message: m.Message, fds: int, feature: str
) -> None:
    await peer.agree(protocol=int(ALL_PROTOCOL_FEATURES & ~ProtocolFeatures[feature]))
    with_files(fds, lambda files: peer.send(message, files))
    reason = await ended(controller, caplog)
    assert f"{message.request.name}: protocol feature is {feature} not agreed on" in reason


# -- the device status ----------------------------------------------------------------------------


async def test_a_status_is_kept_and_zero_resets_the_device(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    assert await peer.ask(m.GetStatus()) == m.DeviceStatus(0)
    assert await peer.order(m.SetStatus(0xB)) == 0
    assert await peer.ask(m.GetStatus()) == m.DeviceStatus(0xB)
    assert "vhost_reset_device" not in recorder.names()
    assert await peer.order(m.SetStatus(0)) == 0
    assert await peer.ask(m.GetStatus()) == m.DeviceStatus(0)
    assert recorder.names().count("vhost_reset_device") == 1
    peer.send(m.SetStatus(7))
    assert await peer.order(m.ResetDevice()) == 0
    assert await peer.ask(m.GetStatus()) == m.DeviceStatus(0)


# -- the write-cache mode -------------------------------------------------------------------------


async def test_the_write_cache_mode_is_the_engines_and_the_rest_is_read_only(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    for value in (0, 1):
        assert await peer.order(m.SetConfig(32, 1, 0, bytes([value]))) == 0
        assert (recorder.calls[-1].name, recorder.calls[-1].args) == ("vhost_set_writeback", (bool(value),))
    assert await peer.order(m.SetConfig(32, 1, 0, b"\2")) == errno.EINVAL
    assert await peer.order(m.SetConfig(0, 8, 0, bytes(8))) == errno.EPERM
    assert (await peer.ask(m.GetFeatures())).value, "the session goes on"


async def test_a_configuration_that_may_not_be_written_ends_a_session_that_wants_no_answer(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    peer.send(m.SetConfig(0, 8, 0, bytes(8)))
    assert await ended(controller, caplog) == "refused: SET_CONFIG: bytes 0 to 8 are read-only; only byte 32 is not"


# -- inflight regions -----------------------------------------------------------------------------


async def test_an_inflight_region_may_be_asked_for_rings_of_any_size(peer: Peer, recorder: VhostEngine) -> None:
    """A machine asks with its own queue size before firmware, whose rings are split, makes smaller ones."""
    await peer.agree()
    peer.send(m.GetInflightFd(0, 0, 2, 100))
    frame = await peer.receive()
    assert frame is not None
    assert Header.decode(frame.header.encode()).request is Request.GET_INFLIGHT_FD
    assert array.array("i", frame.fds)
    assert await peer.order(m.SetInflightFd(8192, 0, 2, 100), frame.fds) == 0
    for fd in frame.fds:
        os.close(fd)
