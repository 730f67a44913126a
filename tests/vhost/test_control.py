"""Controllers and their sockets: one front end at a time, reconnecting, stale files, stopping, and SPDK's RPC."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qpair.errors import AlreadyExists, Busy, InvalidArgument, InvalidParameters, NoSuchBdev, NoSuchController, NoSuchDevice, NoSuchFile
from qpair.vhost import messages as m
from qpair.vhost.listener import PATH_BYTES_MAX
from vhost.conftest import eventually
from vhost.engine_double import VhostEngine
from vhost.peer import Peer


async def refused(path: str) -> bool:
    """Connected, and disconnected at once without an answer."""
    second = await Peer.connect(path)
    try:
        return await second.closed()
    finally:
        second.close()


# -- one front end at a time ----------------------------------------------------------------------


async def test_a_second_front_end_is_disconnected_and_the_first_goes_on(
    peer: Peer, controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await peer.agree()
    assert await refused(controller.socket)
    assert "a second front end was disconnected: the limit is one at a time" in caplog.text
    assert (await peer.ask(m.GetFeatures())).value


async def test_a_front_end_that_reconnects_is_served_again(peer: Peer, controller: Any, recorder: VhostEngine) -> None:
    await peer.agree()
    peer.close()
    for _ in range(5):
        again = await Peer.connect(controller.socket)
        await again.agree()
        again.close()
    assert recorder.names().count("vhost_session_open") == 6


async def test_a_successor_waits_until_the_old_session_has_drained(peer: Peer, controller: Any, recorder: VhostEngine) -> None:
    await peer.agree()
    recorder.held.add("vhost_session_close")
    peer.close()
    successor = await Peer.connect(controller.socket)
    successor.send(m.GetFeatures())
    with pytest.raises(TimeoutError):
        await successor.receive(0.05)
    assert recorder.names().count("vhost_session_open") == 1
    recorder.release("vhost_session_close")
    assert await successor.receive() is not None
    successor.close()


async def test_a_hundred_connections_leave_no_descriptor_behind(
    controller: Any, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    server = controller.room._servers[controller.name]
    before = count_fds()
    for number in range(100):
        visitor = await Peer.connect(controller.socket)
        if number % 2:
            await visitor.ask(m.GetFeatures())
        else:
            visitor.send_raw(b"\xff" * (number % 13))
        visitor.close()
    await eventually(lambda: recorder.names().count("vhost_session_open") >= 50 and not server.connected, "all are gone")
    await eventually(lambda: count_fds() == before, "all descriptors are closed")


# -- socket files ---------------------------------------------------------------------------------


async def test_a_stale_socket_file_is_replaced(recording_stack: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "vhost.0"))
    controller = await recording_stack.vhost.create("vhost.0", "disk0")
    visitor = await Peer.connect(controller.socket)
    assert (await visitor.ask(m.GetFeatures())).value
    visitor.close()


async def test_a_socket_on_which_somebody_listens_is_refused(recording_stack: Any, recorder: VhostEngine, tmp_path: Path) -> None:
    path = tmp_path / "vhost.0"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(Busy, match=rf"^socket path {path}: somebody listens on it$"):
            await recording_stack.vhost.create("vhost.0", "disk0")
    assert recorder.controllers == {}, "the engine's device is taken back"
    assert path.exists(), "the other's file stays"


async def test_a_file_that_is_no_socket_is_refused_and_kept(recording_stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "vhost.0"
    path.write_text("precious")
    with pytest.raises(AlreadyExists, match=rf"^socket path {path}: a file that is no socket is in the way$"):
        await recording_stack.vhost.create("vhost.0", "disk0")
    assert path.read_text() == "precious"


async def test_a_path_too_long_for_a_socket_is_refused(recording_stack: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"bytes long, the limit is {PATH_BYTES_MAX}$"):
        await recording_stack.vhost.create("v" * 120, "disk0")


async def test_a_directory_that_is_not_there_is_named(recording_stack: Any, tmp_path: Path) -> None:
    with pytest.raises(NoSuchFile, match=rf"^socket path {tmp_path}/no/vhost: No such file or directory$"):
        await recording_stack.vhost.create("no/vhost", "disk0")


async def test_the_socket_file_goes_with_its_controller(controller: Any) -> None:
    assert os.path.exists(controller.socket)
    await controller.delete()
    assert not os.path.exists(controller.socket)


async def test_a_file_that_took_the_sockets_place_is_not_removed(controller: Any) -> None:
    os.unlink(controller.socket)
    Path(controller.socket).write_text("somebody else's")
    await controller.delete()
    assert Path(controller.socket).read_text() == "somebody else's"


# -- controllers ----------------------------------------------------------------------------------


async def test_a_name_in_use_an_unknown_bdev_and_a_foreign_core_are_refused(recording_stack: Any, controller: Any) -> None:
    room = recording_stack.vhost
    with pytest.raises(AlreadyExists, match=r"^a vhost controller is already named 'vhost\.0'$"):
        await room.create("vhost.0", "disk0")
    with pytest.raises(NoSuchBdev, match=r"^no bdev is named 'disk9'$"):
        await room.create("vhost.9", "disk9")
    with pytest.raises(InvalidArgument, match=r"^cpumask names core 700, the stack's reactors run on "):
        await room.create("vhost.9", "disk0", cpumask="[700]")
    with pytest.raises(InvalidArgument, match=r"^transport 'vfio_user_blk' is unknown"):
        await room.create("vhost.9", "disk0", transport="vfio_user_blk")
    with pytest.raises(InvalidArgument, match=r"^controller name '' is empty or holds what cannot be printed$"):
        await room.create("", "disk0")
    assert [made.name for made in room.controllers()] == ["vhost.0"]


async def test_a_controller_in_use_is_not_deleted_unless_forced(peer: Peer, controller: Any, recorder: VhostEngine) -> None:
    await peer.agree()
    with pytest.raises(Busy, match=r"^vhost controller 'vhost\.0': a front end is connected$"):
        await controller.delete(force=False)
    assert (await peer.ask(m.GetFeatures())).value
    await controller.delete(force=True)
    assert await peer.closed()
    assert recorder.names()[-2:] == ["vhost_session_close", "vhost_blk_delete"]


async def test_deleting_waits_for_a_front_end_that_has_left(peer: Peer, controller: Any, recorder: VhostEngine) -> None:
    await peer.agree()
    recorder.held.add("vhost_session_close")
    peer.close()
    deleting = asyncio.create_task(controller.delete(force=False))
    await eventually(lambda: "vhost_session_close" in recorder.names(), "the session drains")
    assert not deleting.done()
    recorder.release("vhost_session_close")
    await deleting
    assert recorder.names()[-2:] == ["vhost_session_close", "vhost_blk_delete"]


async def test_a_controller_is_found_by_its_path_too(recording_stack: Any, controller: Any) -> None:
    assert recording_stack.vhost.controller(controller.socket) is controller
    with pytest.raises(NoSuchController, match=r"^no vhost controller is named 'vhost\.1'$"):
        recording_stack.vhost.controller("vhost.1")


async def test_a_stack_that_stops_drains_every_session_and_removes_every_file(
    recording_stack: Any, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    paths = [(await recording_stack.vhost.create(f"vhost.{number}", "disk0")).socket for number in range(3)]
    visitors = [await Peer.connect(path) for path in paths]
    for visitor in visitors:
        await visitor.agree()
    await recording_stack.stop()
    assert recorder.names().count("vhost_session_close") == 3
    assert recorder.controllers == {}
    assert not any(map(os.path.exists, paths))
    for visitor in visitors:
        assert await visitor.closed()
        visitor.close()


async def test_an_export_is_a_context_manager(recording_stack: Any, recorder: VhostEngine, tmp_path: Path) -> None:
    async with await recording_stack.export("disk0", tmp_path / "disk0.sock", readonly=True) as exported:
        assert exported.socket == str(tmp_path / "disk0.sock")
        assert recorder.controllers["disk0.sock"].readonly
    assert recorder.controllers == {}
    assert not os.path.exists(exported.socket)


# -- RPC ------------------------------------------------------------------------------------------


async def test_rpc_creates_lists_and_deletes_as_spdk_does(recording_stack: Any, tmp_path: Path) -> None:
    [core] = recording_stack.cores
    assert await recording_stack.rpc("vhost_create_blk_controller", ctrlr="naa.0", dev_name="disk0", readonly=True) is True
    [shown] = await recording_stack.rpc("vhost_get_controllers")
    assert shown == {
        "ctrlr": "naa.0",
        "cpumask": f"{1 << core:#x}",
        "delay_base_us": 0,
        "iops_threshold": 60000,
        "socket": str(tmp_path / "naa.0"),
        "sessions": [],
        "backend_specific": {"block": {"readonly": True, "bdev": "disk0", "transport": "vhost_user_blk"}},
    }
    assert await recording_stack.rpc("vhost_get_controllers", name="naa.0") == [shown]
    assert await recording_stack.rpc("vhost_delete_controller", ctrlr="naa.0") is True
    assert await recording_stack.rpc("vhost_get_controllers") == []


async def test_rpc_shows_a_live_session(recording_stack: Any, peer: Peer, recorder: VhostEngine) -> None:
    await peer.agree()
    [shown] = await recording_stack.rpc("vhost_get_controllers")
    session = recorder.controllers["vhost.0"].session
    [told] = shown["sessions"]
    [queue] = told.pop("queues")
    assert told == {"vid": session, "id": 0, "name": f"vhost.0s{session}", "started": True, "max_queues": 1, "inflight_task_cnt": 3}
    assert (queue["index"], queue["state"], queue["inflight"]) == (0, "running", 3)


async def test_rpc_errors_carry_spdks_codes(recording_stack: Any, controller: Any) -> None:
    with pytest.raises(NoSuchController) as missing:
        await recording_stack.rpc("vhost_get_controllers", name="nobody")
    assert (missing.value.code, missing.value.text) == (-19, "No such device")
    with pytest.raises(AlreadyExists) as twice:
        await recording_stack.rpc("vhost_create_blk_controller", ctrlr="vhost.0", dev_name="disk0")
    assert (twice.value.code, twice.value.text) == (-17, "File exists")
    with pytest.raises(InvalidParameters, match="unknown parameter 'dev'"):
        await recording_stack.rpc("vhost_create_blk_controller", ctrlr="vhost.1", dev="disk0")


async def test_coalescing_goes_to_the_engine_within_its_limits(recording_stack: Any, controller: Any, recorder: VhostEngine) -> None:
    with pytest.raises(InvalidArgument, match=r"^iops_threshold is 99, it must be at least 100$"):
        await recording_stack.rpc("vhost_controller_set_coalescing", ctrlr="vhost.0", delay_base_us=10, iops_threshold=99)
    with pytest.raises(InvalidArgument, match=r"^delay_base_us is 1000001, the limit is 1000000$"):
        await recording_stack.rpc("vhost_controller_set_coalescing", ctrlr="vhost.0", delay_base_us=1_000_001, iops_threshold=100)
    assert "vhost_blk_set_coalescing" not in recorder.names()
    await recording_stack.rpc("vhost_controller_set_coalescing", ctrlr="vhost.0", delay_base_us=10, iops_threshold=1000)
    assert recorder.calls[-1].args == ("vhost.0", 10, 1000)
    [shown] = await recording_stack.rpc("vhost_get_controllers")
    assert (shown["delay_base_us"], shown["iops_threshold"]) == (10, 1000)


async def test_queues_move_to_reactors_of_the_stack_and_to_no_others(recording_stack: Any, controller: Any, recorder: VhostEngine) -> None:
    core = controller.reactors[0]
    await recording_stack.rpc("qpair_vhost_set_cpumask", ctrlr="vhost.0", cpumask=f"[{core}]")
    assert (recorder.calls[-1].name, recorder.calls[-1].args) == ("vhost_blk_set_reactors", ("vhost.0", (core,)))
    with pytest.raises(InvalidArgument, match=rf"^cpumask names core {core + 1}, the stack's reactors run on"):
        await recording_stack.rpc("qpair_vhost_set_cpumask", ctrlr="vhost.0", cpumask=f"[{core + 1}]")
    with pytest.raises(NoSuchController):
        await recording_stack.rpc("qpair_vhost_set_cpumask", ctrlr="vhost.1", cpumask=f"[{core}]")


async def test_the_one_transport_is_there_from_the_start(recording_stack: Any) -> None:
    assert await recording_stack.rpc("virtio_blk_get_transports") == [{"name": "vhost_user_blk"}]
    assert await recording_stack.rpc("virtio_blk_get_transports", name="VHOST_USER_BLK") == [{"name": "vhost_user_blk"}]
    with pytest.raises(AlreadyExists, match=r"^transport 'vhost_user_blk' is always there$"):
        await recording_stack.rpc("virtio_blk_create_transport", name="vhost_user_blk")
    with pytest.raises(InvalidArgument, match=r"^transport 'vfio_user_blk' is unknown, the only one is 'vhost_user_blk'$"):
        await recording_stack.rpc("virtio_blk_create_transport", name="vfio_user_blk")
    with pytest.raises(NoSuchDevice) as missing:
        await recording_stack.rpc("virtio_blk_get_transports", name="vfio_user_blk")
    assert (missing.value.code, missing.value.text) == (-19, "No such device")


async def test_the_configuration_makes_the_same_controllers_again(recording_stack: Any, controller: Any) -> None:
    await recording_stack.vhost.create("vhost.1", "disk0", readonly=True)
    await recording_stack.vhost.create("vhost.2", "disk0", client=True, num_queues=3)
    await recording_stack.vhost.set_coalescing("vhost.1", 5, 100)
    saved = recording_stack.config("vhost_blk")
    assert [entry["method"] for entry in saved] == [
        "vhost_create_blk_controller",
        "vhost_create_blk_controller",
        "vhost_controller_set_coalescing",
        "qpair_vhost_create_blk_controller",
    ]
    assert saved[-1]["params"]["client"] is True
    assert saved[-1]["params"]["num_queues"] == 3

    async def show() -> list[dict[str, Any]]:
        # Of one that connects, how far it has come is another matter.
        return [
            {key: value for key, value in each.items() if key != "qpair"} for each in await recording_stack.rpc("vhost_get_controllers")
        ]

    shown = await show()
    for name in ("vhost.0", "vhost.1", "vhost.2"):
        await recording_stack.vhost.delete(name)
    for entry in saved:
        await recording_stack.rpc(entry["method"], **entry["params"])
    assert await show() == shown


async def test_creating_and_deleting_at_once_ends_in_one_controller_or_none(recording_stack: Any) -> None:
    room = recording_stack.vhost
    results = await asyncio.gather(*(room.create("vhost.0", "disk0") for _ in range(3)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AlreadyExists", "AlreadyExists", "VhostBlkController"]
