"""Attaching to targets: ours over a real socket, and hand-made ones that break the rules."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from doubles.engine import EngineError
from qpair.errors import AlreadyExists, InvalidArgument, InvalidParameters, NoSuchController, NoSuchFile, QpairError, TimedOut, Unsupported
from qpair.vhost import messages as m
from qpair.vhost.framing import ProtocolFeatures, Request
from qpair.virtio.client import TargetBrokeProtocol, TargetGone, TargetRefused
from vhost.conftest import eventually
from vhost.engine_double import FEATURES, Memory, VhostEngine
from vhost.peer import PROTOCOL_FEATURES_BIT
from virtio.target import CONFIG, Target, serving

QEMU_LIKE = ProtocolFeatures.MQ | ProtocolFeatures.CONFIG | ProtocolFeatures.REPLY_ACK


@pytest.fixture(autouse=True)
def _memory_without_an_engine(recording_stack: Any) -> None:
    recording_stack.virtio._memory_factory = Memory


@pytest_asyncio.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    async with serving(str(tmp_path / "target.sock"), QEMU_LIKE) as running:
        yield running


# -- against our own target -----------------------------------------------------------------------


async def test_our_target_becomes_a_bdev(recording_stack: Any, controller: Any, recorder: VhostEngine) -> None:
    attached = await recording_stack.virtio.attach("remote0", controller.socket, num_queues=2, queue_size=256)
    assert (attached.num_queues, attached.queue_size, attached.socket) == (2, 256, controller.socket)
    [made] = recorder.virtio
    assert made["features"] == FEATURES | PROTOCOL_FEATURES_BIT
    assert made["config"] == recorder.config[:60]
    assert made["sizes"] == [256, 256]
    names = [call.name.removeprefix("vhost_") for call in recorder.calls if call.session and "session" not in call.name]
    ring = ["set_vring_num", "set_vring_base", "set_vring_addr", "set_vring_kick", "set_vring_call"]
    assert names == ["set_protocol_features", "set_features", "set_mem_table", *ring, *ring, "set_vring_enable", "set_vring_enable"]
    kicks = [call.files for call in recorder.calls if call.name in ("vhost_set_vring_kick", "vhost_set_vring_call")]
    [create] = [call for call in recorder.calls if call.name == "bdev_virtio_create"]
    assert len(create.files) == 4
    assert len(kicks) == 4


async def test_the_memory_is_one_region_at_guest_address_zero(recording_stack: Any, controller: Any, recorder: VhostEngine) -> None:
    await recording_stack.virtio.attach("remote0", controller.socket)
    [table] = [call for call in recorder.calls if call.name == "vhost_set_mem_table"]
    assert table.args == ((0, 1 << 20, 0x7F00_0000_0000, 0),)
    [addr] = [call for call in recorder.calls if call.name == "vhost_set_vring_addr"]
    base = 0x7F00_0000_0000
    assert addr.args == (0, 0, base, base + 0x8000, base + 0x4000, 0)


async def test_more_queues_than_the_target_has_are_lowered(
    recording_stack: Any, controller: Any, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    attached = await recording_stack.virtio.attach("remote0", controller.socket, num_queues=64)
    assert attached.num_queues == 4
    assert f"virtio remote0: target {controller.socket} has 4 queues, 64 were asked" in caplog.text


async def test_detaching_removes_the_bdev_then_stops_the_rings_then_leaves(
    recording_stack: Any, controller: Any, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    server = controller.room._servers[controller.name]
    before = count_fds()
    await recording_stack.virtio.attach("remote0", controller.socket)
    await recording_stack.virtio.detach("remote0")
    await eventually(lambda: not server.connected, "the target's session ends")
    assert recorder.names()[-2:] == ["vhost_get_vring_base", "vhost_session_close"]
    assert "remote0" not in recorder.disks
    assert count_fds() == before
    with pytest.raises(NoSuchController, match=r"^no virtio controller is named 'remote0'$"):
        await recording_stack.virtio.detach("remote0")


async def test_a_target_that_goes_takes_its_bdev_with_it_where_nobody_waits(
    recording_stack: Any, controller: Any, recorder: VhostEngine
) -> None:
    recording_stack.virtio.set_options(loss_timeout_s=0)
    await recording_stack.virtio.attach("remote0", controller.socket)
    await controller.delete(force=True)
    await eventually(lambda: "remote0" not in recorder.disks, "the bdev is unregistered")
    assert recording_stack.virtio.controllers() == []


async def test_a_bdev_that_is_deleted_takes_its_connection_with_it(recording_stack: Any, controller: Any, recorder: VhostEngine) -> None:
    await recording_stack.virtio.attach("remote0", controller.socket)
    await recording_stack.delete("remote0")
    server = controller.room._servers[controller.name]
    await eventually(lambda: not server.connected, "the target's session ends")
    assert recording_stack.virtio.controllers() == []


async def test_a_stack_that_stops_detaches_first(recording_stack: Any, target: Target, recorder: VhostEngine) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    await recording_stack.stop()
    assert "remote0" not in recorder.disks
    assert target.seen[-1] is Request.GET_VRING_BASE


# -- what is asked of a target --------------------------------------------------------------------


async def test_a_target_like_qemus_is_asked_for_sixty_bytes_and_acknowledges_everything(recording_stack: Any, target: Target) -> None:
    await recording_stack.virtio.attach("remote0", target.path, num_queues=2)
    ring = [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR, Request.SET_VRING_KICK, Request.SET_VRING_CALL]
    assert target.seen == [
        Request.SET_OWNER,
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.SET_PROTOCOL_FEATURES,
        Request.SET_FEATURES,
        Request.GET_CONFIG,
        Request.GET_QUEUE_NUM,
        Request.SET_MEM_TABLE,
        *ring,
        *ring,
        Request.SET_VRING_ENABLE,
        Request.SET_VRING_ENABLE,
    ]


async def test_a_target_without_acknowledgements_is_asked_once_more_at_the_end(recording_stack: Any, tmp_path: Path) -> None:
    async with serving(str(tmp_path / "old.sock"), ProtocolFeatures.MQ | ProtocolFeatures.CONFIG) as target:
        await recording_stack.virtio.attach("remote0", target.path)
        assert target.seen[-2:] == [Request.SET_VRING_ENABLE, Request.GET_FEATURES]


async def test_a_target_without_several_queues_gives_one(recording_stack: Any, tmp_path: Path) -> None:
    async with serving(str(tmp_path / "old.sock"), ProtocolFeatures.CONFIG) as target:
        attached = await recording_stack.virtio.attach("remote0", target.path, num_queues=8)
        assert attached.num_queues == 1
        assert Request.GET_QUEUE_NUM not in target.seen


# -- targets that fail ----------------------------------------------------------------------------


async def failure(stack: Any, target: Target, recorder: VhostEngine, *, timeout_s: float = 5) -> QpairError:
    """The error of an attempt that leaves nothing behind."""
    with pytest.raises(QpairError) as caught:
        await stack.virtio.attach("remote0", target.path, timeout_s=timeout_s)
    assert stack.virtio.controllers() == []
    assert "remote0" not in recorder.disks
    link: BaseException | None = caught.value
    while link is not None:  # the frames of a traceback hold what the attempt held
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return caught.value


@pytest.mark.parametrize(
    "request_",
    [Request.GET_FEATURES, Request.GET_CONFIG, Request.SET_MEM_TABLE, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE],
)
async def test_a_target_that_leaves_during_the_handshake_is_named(
    recording_stack: Any, target: Target, recorder: VhostEngine, count_fds: Callable[[], set[str]], request_: Request
) -> None:
    before = count_fds()
    target.leave_at = request_
    error = await failure(recording_stack, target, recorder)
    assert isinstance(error, TargetGone)
    assert error.errno == errno.ECONNRESET
    assert str(error) == f"target {target.path}: closed the connection"
    await eventually(lambda: count_fds() == before, "all descriptors are closed")


@pytest.mark.parametrize("request_", [Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.SET_VRING_ADDR])
async def test_a_target_that_does_not_answer_is_given_up(
    recording_stack: Any, target: Target, recorder: VhostEngine, request_: Request
) -> None:
    target.answers[request_] = None
    error = await failure(recording_stack, target, recorder, timeout_s=0.1)
    assert isinstance(error, TimedOut)
    assert str(error) == f"target {target.path}: no answer to {request_.name} within 0.1 s"


async def test_a_target_that_refuses_a_message_is_named(recording_stack: Any, target: Target, recorder: VhostEngine) -> None:
    target.answers[Request.SET_VRING_NUM] = m.encode(m.Ack(Request.SET_VRING_NUM, 22))
    error = await failure(recording_stack, target, recorder)
    assert isinstance(error, TargetRefused)
    assert str(error) == f"target {target.path}: refused SET_VRING_NUM with 22"


@pytest.mark.parametrize(
    ("request_", "answer", "expected"),
    [
        (Request.GET_FEATURES, m.encode(m.Features(0)), "GET_FEATURES: flags is 0x1, must be those of a reply"),
        (
            Request.GET_FEATURES,
            m.encode(m.QueueNum(1), reply=True),
            "reply: request is GET_QUEUE_NUM, must be GET_FEATURES, which was asked",
        ),
        (
            Request.GET_FEATURES,
            struct.pack("<III", 1, 5, 0xFFFFFFFF),
            "GET_FEATURES: payload size is 4294967295, must be at most 268 bytes",
        ),
        (Request.GET_QUEUE_NUM, m.encode(m.QueueNum(0), reply=True), "number of queues is 0 (configuration: 2), must be at least 1"),
        (Request.GET_CONFIG, struct.pack("<IIIIII", 24, 5, 12, 0, 257, 0), "GET_CONFIG: size is 257, must be at most 256 bytes"),
        (
            Request.SET_OWNER,
            m.encode(m.Ack(Request.SET_OWNER, 0)),
            "reply: request is SET_OWNER, must be GET_FEATURES, which was asked",
        ),
    ],
    ids=["no-reply-flag", "another-reply", "4-gib", "no-queues", "config-257", "unasked"],
)
async def test_a_target_that_breaks_the_protocol_is_named(
    recording_stack: Any, target: Target, recorder: VhostEngine, request_: Request, answer: bytes, expected: str
) -> None:
    target.answers[request_] = answer
    error = await failure(recording_stack, target, recorder)
    assert isinstance(error, TargetBrokeProtocol)
    assert error.errno == errno.EPROTO
    assert str(error) == f"target {target.path}: {expected}"


@pytest.mark.parametrize(
    ("features", "protocol", "expected"),
    [
        (PROTOCOL_FEATURES_BIT, QEMU_LIKE, "feature VERSION_1 is not among those it offers, 0x40000000"),
        (1 << 32, QEMU_LIKE, "feature PROTOCOL_FEATURES is not among those it offers, 0x100000000"),
        (1 << 32 | 1 << 30, ProtocolFeatures.MQ, "protocol feature CONFIG is missing, so its size cannot be asked"),
    ],
)
async def test_a_target_that_lacks_a_feature_is_unsupported_by_name(
    recording_stack: Any, target: Target, recorder: VhostEngine, features: int, protocol: ProtocolFeatures, expected: str
) -> None:
    target.answers[Request.GET_FEATURES] = m.encode(m.Features(features), reply=True)
    target.protocol = protocol
    error = await failure(recording_stack, target, recorder)
    assert isinstance(error, Unsupported)
    assert str(error) == f"target {target.path}: {expected}"


async def test_a_target_that_refuses_its_configuration_is_named(recording_stack: Any, target: Target, recorder: VhostEngine) -> None:
    target.answers[Request.GET_CONFIG] = m.encode(m.ConfigReply(0, 0, 0, b""), reply=True)
    error = await failure(recording_stack, target, recorder)
    assert isinstance(error, TargetRefused)
    assert str(error) == f"target {target.path}: gave 0 bytes of configuration, 60 were asked"


async def test_an_engine_that_refuses_the_device_leaves_nothing_behind(
    recording_stack: Any, target: Target, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    before = count_fds()

    def refuse(*_: Any, **__: Any) -> int:
        raise EngineError(errno.EINVAL, "config: blk_size is 3, must be a multiple of 512")

    recorder.bdev_virtio_create = refuse  # type: ignore[method-assign]
    error = await failure(recording_stack, target, recorder)
    assert str(error) == "config: blk_size is 3, must be a multiple of 512"
    await eventually(lambda: count_fds() == before, "all descriptors are closed")


async def test_a_target_that_goes_while_idle_takes_its_bdev_with_it_where_nobody_waits(
    recording_stack: Any, target: Target, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    recording_stack.virtio.set_options(loss_timeout_s=0)
    await recording_stack.virtio.attach("remote0", target.path)
    target.connections[0].sock.shutdown(socket.SHUT_RDWR)
    await eventually(lambda: "remote0" not in recorder.disks, "the bdev is unregistered")
    assert f"virtio remote0: target {target.path}: closed the connection; the bdev is removed" in caplog.text
    await recording_stack.virtio.attach("remote0", target.path)
    assert [made.name for made in recording_stack.virtio.controllers()] == ["remote0"]


async def test_an_answer_that_nobody_asked_for_ends_the_connection(
    recording_stack: Any, target: Target, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    recording_stack.virtio.set_options(loss_timeout_s=0)
    await recording_stack.virtio.attach("remote0", target.path)
    target.connections[0].send_raw(m.encode(m.Ack(Request.SET_OWNER, 0)))
    await eventually(lambda: "remote0" not in recorder.disks, "the bdev is unregistered")
    assert "SET_OWNER: message is an answer, must be awaited by a request; the bdev is removed" in caplog.text


async def test_a_cancelled_attempt_leaves_nothing_behind(recording_stack: Any, target: Target, count_fds: Callable[[], set[str]]) -> None:
    before = count_fds()
    target.answers[Request.SET_MEM_TABLE] = None
    attempt = asyncio.create_task(recording_stack.virtio.attach("remote0", target.path))
    await eventually(lambda: Request.SET_MEM_TABLE in target.seen, "the handshake is half-way")
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    await eventually(lambda: count_fds() == before, "all descriptors are closed")
    del target.answers[Request.SET_MEM_TABLE]
    await recording_stack.virtio.attach("remote0", target.path)


# -- arguments and RPC ----------------------------------------------------------------------------


async def test_impossible_queues_are_refused_before_connecting(recording_stack: Any) -> None:
    room = recording_stack.virtio
    with pytest.raises(InvalidArgument, match=r"^vq_count is 257, must be from 1 to 256$"):
        await room.attach("remote0", "/nowhere", num_queues=257)
    for size in (0, 1, 3, 500, 65536):
        with pytest.raises(InvalidArgument, match=rf"^vq_size is {size}, must be a power of two from 2 to 32768$"):
            await room.attach("remote0", "/nowhere", queue_size=size)
    with pytest.raises(InvalidArgument, match=r"^name is empty$"):
        await room.attach("", "/nowhere")


async def test_a_path_that_cannot_be_connected_to_is_named(recording_stack: Any, tmp_path: Path) -> None:
    with pytest.raises(NoSuchFile, match=r"^target /nowhere: No such file or directory$"):
        await recording_stack.virtio.attach("remote0", "/nowhere")
    path = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with pytest.raises(QpairError, match=rf"^target {path}: Connection refused$") as caught:
        await recording_stack.virtio.attach("remote0", path)
    assert caught.value.errno == errno.ECONNREFUSED
    with pytest.raises(QpairError, match="path too long"):
        await recording_stack.virtio.attach("remote0", "/" + "x" * 200)


async def test_rpc_attaches_shows_saves_and_detaches_as_spdk_does(recording_stack: Any, target: Target) -> None:
    call = {"name": "Virtio0", "trtype": "user", "traddr": target.path, "dev_type": "blk", "vq_count": 2}
    assert await recording_stack.rpc("bdev_virtio_attach_controller", **call) == ["Virtio0"]
    with pytest.raises(AlreadyExists, match=r"^a virtio controller is already named 'Virtio0'$"):
        await recording_stack.rpc("bdev_virtio_attach_controller", **call)
    [shown] = await recording_stack.rpc("bdev_get_bdevs", name="Virtio0")
    assert shown["product_name"] == "VirtioBlk Disk"
    assert shown["driver_specific"] == {"virtio": {"type": "user", "socket": target.path}}
    assert shown["num_blocks"] == int.from_bytes(CONFIG[:8], "little")
    saved = [entry for entry in recording_stack.config("bdev") if entry["method"] == "bdev_virtio_attach_controller"]
    assert [entry["params"] for entry in saved] == [call | {"vq_size": 512}]
    assert await recording_stack.rpc("bdev_virtio_detach_controller", name="Virtio0") is True
    with pytest.raises(NoSuchController) as missing:
        await recording_stack.rpc("bdev_virtio_detach_controller", name="Virtio0")
    assert missing.value.code == -19
    assert await recording_stack.rpc("bdev_virtio_scsi_get_devices") == []


async def test_rpc_refuses_other_transports_and_devices_by_name(recording_stack: Any) -> None:
    call = {"name": "Virtio0", "trtype": "user", "traddr": "/nowhere", "dev_type": "blk"}
    with pytest.raises(Unsupported, match=r"^trtype is 'pci', the only one supported is 'user'$"):
        await recording_stack.rpc("bdev_virtio_attach_controller", **(call | {"trtype": "pci"}))
    with pytest.raises(Unsupported, match=r"^dev_type is 'scsi', the only one supported is 'blk'$"):
        await recording_stack.rpc("bdev_virtio_attach_controller", **(call | {"dev_type": "scsi"}))
    with pytest.raises(InvalidParameters):
        await recording_stack.rpc("bdev_virtio_attach_controller", **(call | {"trtype": "carrier-pigeon"}))
