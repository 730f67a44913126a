"""The message flow of one connection over real sockets: order, answers, descriptors, and how a session ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from doubles.engine import EngineError
from qpair.vhost import messages as m
from qpair.vhost.framing import Request
from qpair.vhost.protocol import OFFERED
from vhost.conftest import eventually
from vhost.engine_double import FEATURES, VhostEngine
from vhost.peer import ALL_PROTOCOL_FEATURES, PROTOCOL_FEATURES_BIT, Peer, with_files

pytestmark = pytest.mark.usefixtures("recording_stack")


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().partition(" ended: ")[2] for record in caplog.records if " ended: " in record.getMessage()]


async def ended(controller: Any, caplog: pytest.LogCaptureFixture) -> str:
    """Wait for the session's end; its one reason."""
    server = controller.room._servers[controller.name]
    await eventually(lambda: not server.connected, "the session ends")
    found = reasons(caplog)
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qpair.vhost")


# -- a whole handshake ----------------------------------------------------------------------------


async def test_a_front_end_like_qemus_is_served_in_order(peer: Peer, recorder: VhostEngine) -> None:
    features = (await peer.ask(m.GetFeatures())).value
    assert features == FEATURES | PROTOCOL_FEATURES_BIT
    assert (await peer.ask(m.GetProtocolFeatures())).value == int(OFFERED)
    peer.send(m.SetProtocolFeatures(int(ALL_PROTOCOL_FEATURES)))
    assert (await peer.ask(m.GetQueueNum())).value == 4
    peer.send(m.SetOwner())
    assert (await peer.ask(m.GetConfig.of(60))).data == recorder.config[:60]
    assert await peer.order(m.SetFeatures(features)) == 0
    regions = (m.MemoryRegion(0, 4096, 0x10000, 0), m.MemoryRegion(1 << 32, 8192, 0x20000, 4096))
    memory = with_files(2, lambda fds: peer.send(m.SetMemTable(regions), fds, need_reply=True))
    assert m.decode_reply(await peer.receive(), to=Request.SET_MEM_TABLE) == m.Ack(Request.SET_MEM_TABLE, 0)  # type: ignore[arg-type]
    peer.send(m.SetVringNum(0, 128))
    peer.send(m.SetVringBase(0, 7))
    peer.send(m.SetVringAddr(0, 0, 0x10000, 0x10800, 0x10C00, 0))
    kick = with_files(1, lambda fds: peer.send(m.SetVringKick.of(0), fds))
    call = with_files(1, lambda fds: peer.send(m.SetVringCall.of(0), fds))
    peer.send(m.SetVringErr.of(0, has_fd=False))
    assert await peer.order(m.SetVringEnable(0, 1)) == 0
    assert (await peer.ask(m.GetVringBase(0))).base == 0x1234
    assert await peer.order(m.ResetDevice()) == 0
    flow = [(call_.name, call_.args, call_.files) for call_ in recorder.calls if call_.session]
    assert flow == [
        ("vhost_set_protocol_features", (int(ALL_PROTOCOL_FEATURES),), ()),
        ("vhost_set_features", (features,), ()),
        ("vhost_set_mem_table", ((0, 4096, 0x10000, 0), (1 << 32, 8192, 0x20000, 4096)), tuple(memory)),
        ("vhost_set_vring_num", (0, 128), ()),
        ("vhost_set_vring_base", (0, 7), ()),
        ("vhost_set_vring_addr", (0, 0, 0x10000, 0x10800, 0x10C00, 0), ()),
        ("vhost_set_vring_kick", (0,), tuple(kick)),
        ("vhost_set_vring_call", (0,), tuple(call)),
        ("vhost_set_vring_err", (0,), ()),
        ("vhost_set_vring_enable", (0, True), ()),
        ("vhost_get_vring_base", (0,), ()),
        ("vhost_reset_device", (), ()),
    ]


@pytest.mark.parametrize("size", [1, 32, 60, 96, 256])
async def test_any_size_of_configuration_is_answered_cut_or_padded_with_zeros(peer: Peer, recorder: VhostEngine, size: int) -> None:
    await peer.agree()
    reply = await peer.ask(m.GetConfig.of(size))
    assert reply.data == recorder.config.ljust(256, b"\0")[:size]


async def test_a_configuration_range_starts_where_it_is_asked(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    reply = await peer.ask(m.GetConfig.of(2, offset=34))
    assert (reply.offset, reply.data) == (34, b"\4\0")


async def test_a_message_is_not_looked_at_before_the_one_ahead_is_done(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    recorder.held.add("vhost_get_vring_base")
    peer.send(m.GetVringBase(1))
    peer.send(m.SetVringNum(1, 64))
    await eventually(lambda: "vhost_get_vring_base" in recorder.names(), "the ring is being stopped")
    with pytest.raises(TimeoutError):
        await peer.receive(0.05)
    assert "vhost_set_vring_num" not in recorder.names()
    recorder.release("vhost_get_vring_base")
    frame = await peer.receive()
    assert frame is not None
    assert m.decode_reply(frame, to=Request.GET_VRING_BASE) == m.VringBase(1, 0x1234)
    await eventually(lambda: "vhost_set_vring_num" in recorder.names(), "the next message is done")


async def test_the_inflight_region_travels_both_ways_with_its_descriptor(
    peer: Peer, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    await peer.agree()
    before = count_fds()
    peer.send(m.GetInflightFd(0, 0, 2, 128))
    frame = await peer.receive()
    assert frame is not None
    assert m.decode_reply(frame, to=Request.GET_INFLIGHT_FD) == m.InflightReply(8192, 0, 2, 128)
    [fd] = frame.fds
    identity = os.fstat(fd)
    assert await peer.order(m.SetInflightFd(8192, 0, 2, 128), [fd]) == 0
    assert recorder.calls[-1].args == (8192, 0, 2, 128)
    assert recorder.calls[-1].files == ((identity.st_dev, identity.st_ino),)
    os.close(fd)
    [kept] = count_fds() - before
    assert "inflight" in kept, "the session keeps one, for a successor"
    assert await peer.order(m.ResetDevice()) == 0
    assert count_fds() == before


async def test_messages_in_single_bytes_are_messages(peer: Peer, recorder: VhostEngine) -> None:
    for byte in m.encode(m.SetFeatures(PROTOCOL_FEATURES_BIT)) + m.encode(m.GetFeatures()):
        peer.send_raw(bytes([byte]))
        await asyncio.sleep(0)
    frame = await peer.receive()
    assert frame is not None
    assert frame.header.request is Request.GET_FEATURES
    assert "vhost_set_features" in recorder.names()


async def test_many_messages_in_one_packet_are_done_in_order(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    peer.send_raw(b"".join(m.encode(m.SetVringNum(index % 4, 1 << index)) for index in range(10)))
    await peer.ask(m.GetFeatures())
    sizes = [call.args[1] for call in recorder.calls if call.name == "vhost_set_vring_num"]
    assert sizes == [1 << index for index in range(10)]


# -- refusals by the engine -----------------------------------------------------------------------


async def test_a_refusal_is_told_to_a_front_end_that_asks_and_the_session_goes_on(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    recorder.refusals["vhost_set_vring_num"] = EngineError(errno.EINVAL, "size is 3, must be a power of two")
    assert await peer.order(m.SetVringNum(0, 3)) == errno.EINVAL
    assert (await peer.ask(m.GetFeatures())).value


async def test_a_refusal_ends_the_session_of_a_front_end_that_does_not_ask(
    peer: Peer, recorder: VhostEngine, controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    recorder.refusals["vhost_set_vring_num"] = EngineError(errno.EINVAL, "size is 3, must be a power of two")
    peer.send(m.SetVringNum(0, 3))
    assert await peer.closed()
    assert await ended(controller, caplog) == "refused: size is 3, must be a power of two"


# -- breaking the protocol ------------------------------------------------------------------------


async def broken(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> str:
    assert await peer.closed()
    reason = await ended(controller, caplog)
    again = await Peer.connect(controller.socket)
    assert (await again.ask(m.GetFeatures())).value, "the listener goes on"
    again.close()
    return reason.removeprefix("the front end broke the protocol: ")


async def test_a_size_of_four_gibibytes_ends_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    peer.send_raw(struct.pack("<III", Request.SET_FEATURES, 1, 0xFFFFFFFF))
    assert await broken(peer, controller, caplog) == "SET_FEATURES: payload size is 4294967295, must be at most 268 bytes"


async def test_a_truncated_message_ends_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    peer.send_raw(m.encode(m.SetFeatures(0))[:15])
    peer.sock.shutdown(socket.SHUT_WR)
    assert await broken(peer, controller, caplog) == "connection: message is cut short, must be followed by 5 more bytes"


async def test_an_unknown_request_ends_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    peer.send_raw(struct.pack("<III", 77, 1, 0))
    assert await broken(peer, controller, caplog) == "header: request is 77, must be a known request, 1 to 43"


async def test_features_that_were_not_offered_end_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    peer.send(m.SetFeatures(1 << 35))
    expected = f"SET_FEATURES: features is 0x800000000 with 0x800000000 that were not offered, must be a subset of {FEATURES | PROTOCOL_FEATURES_BIT:#x}"
    assert await broken(peer, controller, caplog) == expected


async def test_a_message_of_a_protocol_feature_not_agreed_on_ends_the_session(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    peer.send(m.GetConfig.of(60))
    expected = "GET_CONFIG: protocol feature is CONFIG not agreed on, must be set by SET_PROTOCOL_FEATURES first"
    assert await broken(peer, controller, caplog) == expected


async def test_enabling_a_ring_before_features_ends_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    peer.send(m.SetVringEnable(0, 1))
    expected = "SET_VRING_ENABLE: feature is PROTOCOL_FEATURES not agreed on, must be set by SET_FEATURES first"
    assert await broken(peer, controller, caplog) == expected


@pytest.mark.parametrize("index", [4, 255, 0xFFFFFFFF])
async def test_a_queue_that_does_not_exist_ends_the_session(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture, index: int
) -> None:
    peer.send(m.SetVringNum(index, 128))
    assert await broken(peer, controller, caplog) == f"SET_VRING_NUM: queue is {index}, must be below 4, this controller's number of queues"


async def test_a_base_of_more_than_16_bits_ends_the_session_unless_rings_are_packed(
    peer: Peer, recorder: VhostEngine, controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree(PROTOCOL_FEATURES_BIT | 1 << 34)
    assert await peer.order(m.SetVringBase(0, 0x8005_0007)) == 0
    assert await peer.order(m.SetVringNum(0, 100)) == 0
    with_files(1, lambda fds: peer.send(m.SetInflightFd(4096, 0, 1, 100), fds))
    assert await peer.order(m.SetFeatures(PROTOCOL_FEATURES_BIT)) == 0
    assert "vhost_set_inflight_fd" in recorder.names()
    assert [call.args for call in recorder.calls if call.name == "vhost_set_vring_base"] == [(0, 0x8005_0007)]
    peer.send(m.SetVringBase(0, 65536))
    assert await broken(peer, controller, caplog) == "SET_VRING_BASE: base is 65536, must be at most 65535"


async def test_logging_that_was_not_agreed_on_ends_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    peer.send(m.SetVringAddr(0, 1, 0, 0, 0, 0))
    assert await broken(peer, controller, caplog) == "SET_VRING_ADDR: flags is 0x1, must be 0: logging was not agreed on"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (m.GetInflightFd(0, 0, 5, 128), "GET_INFLIGHT_FD: num_queues is 5, must be 1 to 4, this controller's"),
        (m.GetInflightFd(0, 0, 0, 128), "GET_INFLIGHT_FD: num_queues is 0, must be 1 to 4, this controller's"),
        (m.GetInflightFd(0, 0, 1, 32769), "GET_INFLIGHT_FD: queue_size is 32769, must be 1 to 32768"),
    ],
)
async def test_an_inflight_region_of_impossible_shape_ends_the_session(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture, message: m.Message, expected: str
) -> None:
    await peer.agree()
    peer.send(message)
    assert await broken(peer, controller, caplog) == expected


# -- descriptors ----------------------------------------------------------------------------------


async def test_too_many_descriptors_end_the_session_and_all_are_closed(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture, count_fds: Callable[[], set[str]]
) -> None:
    await peer.ask(m.GetFeatures())
    before = count_fds()
    with_files(9, lambda fds: peer.send(m.GetFeatures(), fds))
    assert await peer.closed()
    reason = await ended(controller, caplog)
    assert reason.startswith("the front end broke the protocol: message: number of descriptors is more than ")
    assert reason.endswith(", must be at most 8")
    assert {name for name in count_fds() if "memfd" in name} == set()
    assert len(count_fds()) == len(before) - 1, "the session's own socket is closed too"


@pytest.mark.parametrize("cut", [1, 11, 12, 20])
async def test_descriptors_of_an_incomplete_message_are_closed(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture, count_fds: Callable[[], set[str]], cut: int
) -> None:
    table = m.SetMemTable((m.MemoryRegion(0, 4096, 0, 0),))
    await peer.ask(m.GetFeatures())
    with_files(1, lambda fds: peer.send_raw(m.encode(table)[:cut], fds))
    peer.sock.shutdown(socket.SHUT_WR)
    assert await peer.closed()
    assert (await ended(controller, caplog)).startswith("the front end broke the protocol: connection: message is cut short")
    assert {name for name in count_fds() if "memfd" in name} == set()


async def test_descriptors_of_a_refused_message_are_closed(
    peer: Peer, controller: Any, recorder: VhostEngine, caplog: pytest.LogCaptureFixture, count_fds: Callable[[], set[str]]
) -> None:
    await peer.agree()
    recorder.refusals["vhost_set_mem_table"] = EngineError(errno.EINVAL, "region 0 is shorter than its file")
    table = m.SetMemTable((m.MemoryRegion(0, 4096, 0, 0),))
    with_files(1, lambda fds: peer.send(table, fds, need_reply=True))
    frame = await peer.receive()
    assert frame is not None
    assert m.decode_reply(frame, to=Request.SET_MEM_TABLE) == m.Ack(Request.SET_MEM_TABLE, errno.EINVAL)
    with_files(2, lambda fds: peer.send(m.SetVringKick.of(0), fds))
    assert await peer.closed()
    assert (await ended(controller, caplog)).endswith("SET_VRING_KICK: number of descriptors is 2, must be 1")
    assert {name for name in count_fds() if "memfd" in name} == set()


async def test_descriptors_are_closed_when_the_session_is_stopped_under_a_call(
    peer: Peer, controller: Any, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    await peer.agree()
    recorder.held |= {"vhost_set_mem_table", "vhost_get_inflight_fd"}
    with_files(1, lambda fds: peer.send(m.SetMemTable((m.MemoryRegion(0, 4096, 0, 0),)), fds))
    await eventually(lambda: "vhost_set_mem_table" in recorder.names(), "the call is under way")
    await controller.delete(force=True)
    assert await peer.closed()
    recorder.release("vhost_set_mem_table")
    assert {name for name in count_fds() if "memfd" in name} == set()


async def test_an_inflight_descriptor_that_comes_too_late_is_closed(
    peer: Peer, controller: Any, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    await peer.agree()
    recorder.held.add("vhost_get_inflight_fd")
    peer.send(m.GetInflightFd(0, 0, 1, 128))
    await eventually(lambda: "vhost_get_inflight_fd" in recorder.names(), "the call is under way")
    await controller.delete(force=True)
    recorder.release("vhost_get_inflight_fd")
    await eventually(lambda: not [name for name in count_fds() if "inflight" in name], "the descriptor is closed")


# -- memory that comes and goes in regions --------------------------------------------------------


def region(number: int) -> m.MemoryRegion:
    return m.MemoryRegion(number << 32, 0x1000 + number, number << 32, 0)


async def add(peer: Peer, number: int) -> tuple[int, int]:
    """Add region ``number``, acknowledged; its file's identity."""
    [identity] = with_files(1, lambda fds: peer.send(m.AddMemReg(region(number)), fds, need_reply=True))
    frame = await peer.receive()
    assert frame is not None
    assert m.decode_reply(frame, to=Request.ADD_MEM_REG) == m.Ack(Request.ADD_MEM_REG, 0)
    return identity


def tables(recorder: VhostEngine) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each table that the engine got: sizes of its regions past 4096, and its files."""
    found = [call for call in recorder.calls if call.name == "vhost_set_mem_table"]
    return [([entry[1] - 0x1000 for entry in call.args], list(call.files)) for call in found]


async def test_regions_that_come_and_go_give_the_engine_a_whole_table_each(
    peer: Peer, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    await peer.agree()
    assert (await peer.ask(m.GetMaxMemSlots())).value == 64
    files = [await add(peer, number) for number in (1, 2, 3)]
    assert await peer.order(m.RemMemReg(region(2))) == 0
    assert tables(recorder) == [
        ([1], files[:1]),
        ([1, 2], files[:2]),
        ([1, 2, 3], files),
        ([1, 3], [files[0], files[2]]),
    ]
    assert len([name for name in count_fds() if "memfd" in name]) == 2, "the removed region's descriptor is closed"
    whole = with_files(1, lambda fds: peer.send(m.SetMemTable((region(4),)), fds))
    await peer.ask(m.GetFeatures())
    assert tables(recorder)[-1] == ([4], whole)
    assert len([name for name in count_fds() if "memfd" in name]) == 1, "those of the replaced table too"


async def test_memory_descriptors_are_closed_with_the_session(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture, count_fds: Callable[[], set[str]]
) -> None:
    await peer.agree()
    for number in range(1, 9):
        await add(peer, number)
    peer.close()
    await ended(controller, caplog)
    assert not [name for name in count_fds() if "memfd" in name]


async def test_a_region_that_the_engine_refuses_is_not_part_of_the_next_table(
    peer: Peer, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    await peer.agree()
    await add(peer, 1)
    recorder.refusals["vhost_set_mem_table"] = EngineError(errno.EINVAL, "regions 0 and 1 overlap")
    with_files(1, lambda fds: peer.send(m.AddMemReg(region(2)), fds, need_reply=True))
    frame = await peer.receive()
    assert frame is not None
    assert m.decode_reply(frame, to=Request.ADD_MEM_REG) == m.Ack(Request.ADD_MEM_REG, errno.EINVAL)
    assert len([name for name in count_fds() if "memfd" in name]) == 1
    recorder.refusals.clear()
    await add(peer, 3)
    assert tables(recorder)[-1][0] == [1, 3]


async def test_a_sixty_fifth_region_ends_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    await peer.agree()
    for number in range(1, 65):
        await add(peer, number)
    with_files(1, lambda fds: peer.send(m.AddMemReg(region(65)), fds))
    assert await broken(peer, controller, caplog) == "ADD_MEM_REG: number of regions is 65, must be at most 64"


async def test_removing_a_region_that_is_not_there_ends_the_session(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    await peer.agree()
    await add(peer, 1)
    peer.send(m.RemMemReg(region(2)))
    assert await broken(peer, controller, caplog) == "REM_MEM_REG: region is 0x1002 bytes at 0x200000000, must be one of the table"


# -- how it ends ----------------------------------------------------------------------------------


async def test_a_front_end_that_leaves_is_no_error(peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture) -> None:
    await peer.agree()
    peer.close()
    assert await ended(controller, caplog) == "the front end left"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_the_socket_stays_open_until_the_engine_has_let_go_of_the_memory(peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    recorder.held.add("vhost_session_close")
    recorder.fail("failed", "queue 0: descriptor 5 loops")
    await eventually(lambda: "vhost_session_close" in recorder.names(), "the engine is asked to drain")
    with pytest.raises(TimeoutError):
        await peer.receive(0.05)
    recorder.release("vhost_session_close")
    assert await peer.closed()


async def test_a_session_that_the_engine_ends_says_why(
    peer: Peer, controller: Any, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    recorder.fail("failed", "queue 0: descriptor 5 loops")
    assert await peer.closed()
    assert await ended(controller, caplog) == "the engine ended it: queue 0: descriptor 5 loops"


async def test_a_failed_queue_leaves_the_session_alive(peer: Peer, recorder: VhostEngine, caplog: pytest.LogCaptureFixture) -> None:
    await peer.agree()
    recorder.fail("queue_failed", "avail index jumps by 300, the size is 128", queue=2)
    assert (await peer.ask(m.GetFeatures())).value
    await eventually(lambda: "queue 2 failed: avail index jumps by 300, the size is 128" in caplog.text, "it is logged")
