"""A session that moves to another process: what it takes along, and that nothing changes if it stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from doubles.engine import BdevEvent
from qpair.app.parcel import pack, unpack
from qpair.errors import Busy
from qpair.vhost import messages as m
from qpair.vhost.framing import BackendRequest
from qpair.vhost.record import ControllerRecord
from vhost.conftest import eventually
from vhost.engine_double import FEATURES, Call, VhostEngine
from vhost.peer import PROTOCOL_FEATURES_BIT, Peer, with_files

pytestmark = pytest.mark.usefixtures("recording_stack")

ALL = FEATURES | PROTOCOL_FEATURES_BIT


async def set_up(peer: Peer) -> None:
    """As a front end does that has one ring running, one stopped, and an inflight region."""
    await peer.agree(ALL)
    regions = (m.MemoryRegion(0, 4096, 0x10000, 0), m.MemoryRegion(1 << 32, 8192, 0x20000, 4096))
    with_files(2, lambda fds: peer.send(m.SetMemTable(regions), fds))
    with_files(1, lambda fds: peer.send(m.SetInflightFd(8192, 0, 2, 128), fds))
    with_files(1, lambda fds: peer.send(m.SetLogBase(4096, 0), fds))
    await peer.receive()
    with_files(1, lambda fds: peer.send(m.SetLogFd(), fds))
    assert await peer.order(m.SetConfig(32, 1, 0, b"\0")) == 0
    assert await peer.order(m.SetStatus(15)) == 0
    for index in (0, 1):
        peer.send(m.SetVringNum(index, 128))
        peer.send(m.SetVringBase(index, 7))
        peer.send(m.SetVringAddr(index, 0, 0x10000, 0x10800, 0x10C00, 0))
        with_files(1, lambda fds, index=index: peer.send(m.SetVringCall.of(index), fds))
        with_files(1, lambda fds, index=index: peer.send(m.SetVringKick.of(index), fds))
        assert await peer.order(m.SetVringEnable(index, 1)) == 0
    assert (await peer.ask(m.GetVringBase(1))).base == 0x1234


def sent_on(record: ControllerRecord) -> ControllerRecord:
    """As another process gets it."""
    data, fds = pack(record)
    return unpack(data, [os.dup(fd) for fd in fds], ControllerRecord)


def by_name(calls: list[Call]) -> dict[tuple[str, Any], Any]:
    """What each call said last, by name and queue."""
    queued = ("vhost_set_vring", "vhost_get_vring")
    return {(call.name, call.args[0] if call.name.startswith(queued) else None): (call.args, call.files) for call in calls if call.session}


async def test_a_released_session_goes_on_with_all_that_the_front_end_told(
    controller: Any, peer: Peer, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    await set_up(peer)
    before, told = count_fds(), by_name(recorder.calls)
    room = controller.room
    [record] = await room.release(5)
    assert recorder.names()[-2:] == ["vhost_get_vring_base", "vhost_session_close"], "rings at rest first"
    assert recorder.controllers[controller.name].session is None
    moved = sent_on(record)
    recorder.calls.clear()
    await room.resume([moved])
    assert "vhost_set_vring_kick" not in recorder.names(), "nothing runs before it is told to"
    room.start_sessions()
    await eventually(lambda: "vhost_set_vring_kick" in recorder.names(), "the ring runs")
    again = by_name(recorder.calls)
    told[("vhost_set_vring_base", 0)] = told[("vhost_set_vring_base", 1)] = None
    for key, value in told.items():
        if key in (("vhost_set_vring_kick", 1), ("vhost_get_vring_base", 1)):
            assert key not in again, "a ring that was stopped stays stopped"
        elif key[0] == "vhost_set_vring_base":
            assert again[key][0] == (key[1], 0x1234), "where the ring came to rest"
        else:
            assert again[key] == value, key
    assert recorder.names().index("vhost_set_vring_kick") == len(recorder.calls) - 1
    del record, moved
    assert (await peer.ask(m.GetStatus())).value == 15
    # The connection is answered where it was left, and memory that came before may be added to.
    new = m.MemoryRegion(1 << 33, 4096, 0x50000, 0)
    with_files(1, lambda fds: peer.send(m.AddMemReg(new), fds, need_reply=True))
    await peer.receive()
    assert len(recorder.calls[-1].files) == 3
    assert await peer.order(m.RemMemReg(new)) == 0
    assert {entry.split(" ", 1)[1].split(":")[0] for entry in count_fds() - before} <= {"socket", "/memfd"}
    assert len(count_fds()) == len(before)


async def test_the_socket_on_which_the_front_end_is_asked_is_taken_along(controller: Any, peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree(ALL)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert await peer.order(m.SetBackendReqFd(), [theirs.fileno()]) == 0
        theirs.close()
        [record] = await controller.room.release(5)
        await controller.room.resume([sent_on(record)])
        del record
        controller.room.start_sessions()
        recorder.push(BdevEvent("resized", "disk0"))
        ours.setblocking(False)
        data = b""
        while len(data) < 12:
            await asyncio.sleep(0.01)
            with contextlib.suppress(BlockingIOError):
                data += ours.recv(100)
        assert data == BackendRequest.CONFIG_CHANGE_MSG.encode()


async def test_half_a_message_is_taken_along(controller: Any, peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree(ALL)
    whole = m.encode(m.SetVringKick.of(2))
    for cut in range(1, len(whole)):
        status = with_files(1, lambda fds, cut=cut: peer.send_raw(whole[:cut], fds))
        await asyncio.sleep(0.01)
        [record] = await controller.room.release(5)
        moved = sent_on(record)
        del record
        await controller.room.resume([moved])
        controller.room.start_sessions()
        recorder.calls.clear()
        peer.send_raw(whole[cut:])
        await eventually(lambda: any(call.files == tuple(status) for call in recorder.calls), f"cut at {cut}")  # noqa: B023


async def test_a_message_under_way_is_answered_before_the_session_leaves(controller: Any, peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree(ALL)
    recorder.held.add("vhost_set_vring_enable")
    peer.send(m.SetVringEnable(0, 1), need_reply=True)
    peer.send(m.SetVringEnable(1, 1), need_reply=True)
    await eventually(lambda: "vhost_set_vring_enable" in recorder.names(), "the first is under way")
    leaving = asyncio.ensure_future(controller.room.release(5))
    await asyncio.sleep(0.05)
    assert not leaving.done()
    recorder.release("vhost_set_vring_enable")
    [record] = await leaving
    assert recorder.names().count("vhost_set_vring_enable") == 1, "the second is the successor's"
    await controller.room.resume([sent_on(record)])
    controller.room.start_sessions()
    for _ in range(2):
        frame = await peer.receive()
        assert frame is not None


async def test_rings_that_do_not_come_to_rest_keep_the_session_here(controller: Any, peer: Peer, recorder: VhostEngine) -> None:
    await set_up(peer)
    recorder.held.add("vhost_get_vring_base")
    with pytest.raises(Busy, match="requests in flight were not done"):
        await controller.room.release(0.1)
    recorder.calls.clear()
    recorder.release("vhost_get_vring_base")
    await eventually(lambda: "vhost_set_vring_kick" in recorder.names(), "the ring runs again")
    assert (await peer.ask(m.GetVringBase(0))).base == 0x1234, "and the session answers"
    [record] = await controller.room.release(5)
    assert record.session is not None, "and may be released another time"


async def test_one_controller_that_stays_keeps_all(recording_stack: Any, controller: Any, peer: Peer, recorder: VhostEngine) -> None:
    await set_up(peer)
    await recording_stack.null("disk1", "64MiB")
    other = await recording_stack.vhost.create("vhost.1", "disk1", num_queues=4)
    second = await Peer.connect(other.socket)
    await second.agree(ALL)
    third = await recording_stack.vhost.create("vhost.2", "disk1", num_queues=4)
    recorder.held.add("vhost_get_vring_base")
    with pytest.raises(Busy):
        await controller.room.release(0.1)
    recorder.release("vhost_get_vring_base")
    assert await second.order(m.SetVringEnable(0, 1)) == 0
    assert (await peer.ask(m.GetVringBase(0))).base == 0x1234
    newcomer = await Peer.connect(third.socket)
    await newcomer.agree(ALL)
    for one in (second, newcomer):
        one.close()


async def test_a_front_end_that_leaves_meanwhile_is_no_trouble(controller: Any, peer: Peer, recorder: VhostEngine) -> None:
    await set_up(peer)
    recorder.held.add("vhost_get_vring_base")
    leaving = asyncio.ensure_future(controller.room.release(5))
    await asyncio.sleep(0.02)
    peer.close()
    recorder.release("vhost_get_vring_base")
    [record] = await leaving
    await controller.room.resume([sent_on(record)])
    controller.room.start_sessions()
    await eventually(lambda: not controller.room._servers[controller.name].connected, "the session ends")
    fresh = await Peer.connect(controller.socket)
    await fresh.agree(ALL)
    fresh.close()
