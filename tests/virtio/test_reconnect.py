"""Targets that leave and come back, and what they say of themselves; the engine is a recorder, so that the order of calls can be seen."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from doubles.engine import EngineError
from qpair.bdev.events import Event, EventReader, Failed, Resized
from qpair.errors import InvalidArgument, InvalidParameters
from qpair.vhost import messages as m
from qpair.vhost.framing import FLAG_NEED_REPLY, VERSION, BackendRequest, Header, ProtocolFeatures, Request
from qpair.virtio import attachment
from vhost.conftest import eventually
from vhost.engine_double import FEATURES, Memory, VhostEngine
from vhost.peer import PROTOCOL_FEATURES_BIT
from virtio.target import CONFIG, Target, serving

PROTOCOL = ProtocolFeatures.MQ | ProtocolFeatures.CONFIG | ProtocolFeatures.REPLY_ACK
LARGER = (262144).to_bytes(8, "little") + CONFIG[8:]


@pytest.fixture(autouse=True)
def _quickly_and_without_an_engine(recording_stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recording_stack.virtio._memory_factory = Memory
    monkeypatch.setattr(attachment, "PAUSE_MIN_S", 0.005)
    monkeypatch.setattr(attachment, "PAUSE_MAX_S", 0.02)


@pytest_asyncio.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    async with serving(str(tmp_path / "target.sock"), PROTOCOL | ProtocolFeatures.BACKEND_REQ) as running:
        yield running


@pytest.fixture
def told(recording_stack: Any) -> EventReader:
    return recording_stack.bdevs.events.subscribe()  # type: ignore[no-any-return]


def of(reader: EventReader, kind: type[Event]) -> list[Any]:
    return [event for event in reader._queue if isinstance(event, kind)]


def about_targets(recorder: VhostEngine) -> list[str]:
    return [name for name in recorder.names() if name in ("bdev_virtio_create", "leave", "wipe", "rejoin", "configure")]


async def test_a_target_that_leaves_is_connected_to_again_and_the_bdev_stays(
    recording_stack: Any, target: Target, recorder: VhostEngine, told: EventReader, count_fds: Callable[[], set[str]]
) -> None:
    await recording_stack.virtio.attach("remote0", target.path, num_queues=2)
    first, before = list(target.seen), count_fds()
    target.seen.clear()
    target.drop()
    await eventually(lambda: recorder.names()[-1] == "configure", "it is connected to again")
    assert target.seen == first, "memory and queues are handed over anew"
    assert about_targets(recorder) == ["bdev_virtio_create", "leave", "wipe", "rejoin", "configure"]
    assert [event.reason for event in of(told, Failed)] == [
        f"target {target.path}: closed the connection; its I/O waits until the target is back"
    ]
    assert "remote0" in recorder.disks
    await eventually(lambda: len(count_fds()) == len(before), "what belonged to the first connection is closed")
    target.drop()
    await eventually(lambda: recorder.names().count("rejoin") == 2, "and once more")
    await recording_stack.virtio.detach("remote0")
    assert "remote0" not in recorder.disks


async def test_a_target_that_is_away_is_tried_again_and_again(
    recording_stack: Any, tmp_path: Path, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "target.sock")
    async with serving(path, PROTOCOL) as target:
        await recording_stack.virtio.attach("remote0", path)
        target.drop()
    os.unlink(path)
    await eventually(lambda: f"virtio remote0: not connected again: target {path}: No such file or directory" in caplog.text, "it is tried")
    assert caplog.text.count("not connected again: target") <= 2, "a reason is told once in a row"
    assert "rejoin" not in recorder.names()
    async with serving(path, PROTOCOL):
        await eventually(lambda: "rejoin" in recorder.names(), "it is found")
        await recording_stack.virtio.detach("remote0")


async def test_a_target_that_breaks_a_rule_of_the_rings_loses_its_connection_and_may_come_back(
    recording_stack: Any, target: Target, recorder: VhostEngine, told: EventReader
) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    recorder.links["remote0"].break_rule("queue 0: used id 77 is no request's")
    await eventually(lambda: "rejoin" in recorder.names(), "it is connected to again")
    assert len(target.connections) == 2
    [event] = of(told, Failed)
    assert event.reason == f"target {target.path}: queue 0: used id 77 is no request's; its I/O waits until the target is back"
    recorder.links["remote0"].break_rule("queue 0: used id 78 is no request's")
    await eventually(lambda: recorder.names().count("rejoin") == 2, "the second time, too")


async def test_a_target_that_does_not_come_back_in_time_is_given_up_by_name(
    recording_stack: Any, tmp_path: Path, recorder: VhostEngine, told: EventReader, count_fds: Callable[[], set[str]]
) -> None:
    before, path = count_fds(), str(tmp_path / "target.sock")
    recording_stack.virtio.set_options(loss_timeout_s=0.1)
    async with serving(path, PROTOCOL) as target:
        await recording_stack.virtio.attach("remote0", path)
        target.drop()
    os.unlink(path)
    await eventually(lambda: "remote0" not in recorder.disks, "the bdev is removed")
    assert of(told, Failed)[-1].reason == f"target {path}: closed the connection; not back within 0.1 s; the bdev is removed"
    assert recording_stack.virtio.controllers() == []
    await eventually(lambda: count_fds() == before, "all descriptors are closed")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (FEATURES & ~(1 << 9), r"features 0x200 are not among those it offers, 0x\w+, and were agreed on before"),
        (FEATURES | 1 << 5, r"feature RO is among those it offers, and was not before"),
    ],
    ids=["fewer", "read-only"],
)
async def test_a_successor_with_other_features_is_refused_by_name_and_tried_again(
    recording_stack: Any, target: Target, recorder: VhostEngine, caplog: pytest.LogCaptureFixture, features: int, expected: str
) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    target.features = features | PROTOCOL_FEATURES_BIT
    target.drop()
    await eventually(lambda: "not connected again" in caplog.text, "it is refused")
    assert re.search(rf"virtio remote0: not connected again: target {target.path}: {expected}", caplog.text)
    assert "rejoin" not in recorder.names()
    target.features = FEATURES | PROTOCOL_FEATURES_BIT
    await eventually(lambda: "rejoin" in recorder.names(), "it is accepted")


async def test_a_successor_with_more_features_is_asked_for_the_same(recording_stack: Any, target: Target, recorder: VhostEngine) -> None:
    target.features = FEATURES & ~(1 << 13) | PROTOCOL_FEATURES_BIT
    await recording_stack.virtio.attach("remote0", target.path)
    target.features = FEATURES | PROTOCOL_FEATURES_BIT
    target.drop()
    await eventually(lambda: "rejoin" in recorder.names(), "it is accepted")
    assert target.agreed == [FEATURES & ~(1 << 13) | PROTOCOL_FEATURES_BIT] * 2


async def test_a_successor_with_fewer_queues_is_refused_by_name(
    recording_stack: Any, target: Target, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    await recording_stack.virtio.attach("remote0", target.path, num_queues=2)
    target.num_queues = 1
    target.drop()
    await eventually(lambda: f"not connected again: target {target.path}: has 1 queues, 2 are in use" in caplog.text, "it is refused")
    assert "rejoin" not in recorder.names()


async def test_a_configuration_that_the_engine_cannot_live_with_is_refused_and_tried_again(
    recording_stack: Any, target: Target, recorder: VhostEngine, caplog: pytest.LogCaptureFixture
) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    recorder.refusals["rejoin"] = EngineError(errno.EINVAL, "config.blk_size 4096: 512 as before")
    target.drop()
    await eventually(lambda: "not connected again: config.blk_size 4096: 512 as before" in caplog.text, "it is refused")
    del recorder.refusals["rejoin"]
    await eventually(lambda: "configure" in recorder.names(), "it is accepted")


async def test_a_successor_of_another_size_is_taken_and_told(
    recording_stack: Any, target: Target, recorder: VhostEngine, told: EventReader
) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    target.config = LARGER
    target.drop()
    await eventually(lambda: of(told, Resized) != [], "it is told")
    assert of(told, Resized)[0].size_bytes == 262144 * 512


async def test_detaching_while_the_target_is_away_ends_at_once(
    recording_stack: Any, tmp_path: Path, recorder: VhostEngine, count_fds: Callable[[], set[str]]
) -> None:
    before, path = count_fds(), str(tmp_path / "target.sock")
    async with serving(path, PROTOCOL) as target:
        await recording_stack.virtio.attach("remote0", path)
        target.drop()
    os.unlink(path)
    await eventually(lambda: "leave" in recorder.names(), "it is away")
    await recording_stack.virtio.detach("remote0")
    assert "remote0" not in recorder.disks
    assert recorder.deadlines == {"remote0": 0}
    await eventually(lambda: count_fds() == before, "all descriptors are closed")


# -- what a target says of its own accord ---------------------------------------------------------


async def test_a_changed_configuration_is_read_anew_and_told(
    recording_stack: Any, target: Target, recorder: VhostEngine, told: EventReader
) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    assert target.backend is not None
    target.config = LARGER
    target.backend.send_raw(Header.layout.pack(BackendRequest.CONFIG_CHANGE_MSG, VERSION, 0))
    await eventually(lambda: of(told, Resized) != [], "it is told")
    assert of(told, Resized)[0].size_bytes == 262144 * 512
    target.backend.send_raw(Header.layout.pack(BackendRequest.CONFIG_CHANGE_MSG, VERSION | FLAG_NEED_REPLY, 0))
    frame = await target.backend.receive()
    assert frame is not None
    assert m.decode_reply(frame, to=Request(2)) == m.Ack(Request(2), 0)
    assert len(target.connections) == 1


async def test_a_change_that_cannot_be_lived_with_is_told_by_name(
    recording_stack: Any, target: Target, recorder: VhostEngine, told: EventReader
) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    recorder.refusals["configure"] = EngineError(errno.EINVAL, "config.blk_size 4096: 512 as before")
    assert target.backend is not None
    target.backend.send_raw(Header.layout.pack(BackendRequest.CONFIG_CHANGE_MSG, VERSION, 0))
    await eventually(lambda: of(told, Failed) != [], "it is told")
    assert of(told, Failed)[0].reason == "its configuration changed: config.blk_size 4096: 512 as before"
    assert len(target.connections) == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Header.layout.pack(3, VERSION, 0), "back-end request: request is 3, must be 2, a changed configuration"),
        (Header.layout.pack(2, VERSION, 4) + bytes(4), "CONFIG_CHANGE_MSG: payload size is 4, must be 0"),
        (Header.layout.pack(2, 3, 0), "SET_FEATURES: version is 3, must be 1"),
    ],
    ids=["notifier", "payload", "version"],
)
async def test_a_target_that_breaks_the_protocol_there_loses_its_connection_by_name(
    recording_stack: Any, target: Target, told: EventReader, message: bytes, expected: str
) -> None:
    await recording_stack.virtio.attach("remote0", target.path)
    assert target.backend is not None
    target.backend.send_raw(message)
    await eventually(lambda: len(target.connections) == 2, "it is connected to again")
    assert of(told, Failed)[0].reason == f"target {target.path}: {expected}; its I/O waits until the target is back"


# -- limits, and what is saved --------------------------------------------------------------------


async def test_rpc_sets_how_long_io_waits_and_the_configuration_keeps_it(recording_stack: Any, target: Target) -> None:
    call = {"name": "Virtio0", "trtype": "user", "traddr": target.path, "dev_type": "blk"}
    assert await recording_stack.rpc("qpair_virtio_set_options", ctrlr_loss_timeout_sec=30) is True
    assert await recording_stack.rpc("bdev_virtio_attach_controller", **call) == ["Virtio0"]
    assert await recording_stack.rpc("qpair_virtio_set_options") is True
    saved = [entry for entry in recording_stack.config("bdev") if "virtio" in entry["method"]]
    assert [entry["method"] for entry in saved] == ["qpair_virtio_set_options", "bdev_virtio_attach_controller", "qpair_virtio_set_options"]
    assert [entry["params"].get("ctrlr_loss_timeout_sec") for entry in saved] == [30, None, -1]
    with pytest.raises(InvalidArgument, match=r"^ctrlr_loss_timeout_sec is -2, must be -1 \(for ever\), or at least 0$"):
        await recording_stack.rpc("qpair_virtio_set_options", ctrlr_loss_timeout_sec=-2)
    with pytest.raises(InvalidParameters):
        await recording_stack.rpc("qpair_virtio_set_options", ctrlr_loss_timeout_sec="long")


async def test_hotplug_of_pci_devices_is_accepted_and_without_effect(recording_stack: Any) -> None:
    assert await recording_stack.rpc("bdev_virtio_blk_set_hotplug", enable=True, period_us=100000) is True
