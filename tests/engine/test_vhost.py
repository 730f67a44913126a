"""Controllers and sessions by the engine's interface. Rings at work: tests/interop and the crate's own tests."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from qpair import _engine as native

PROTOCOL_FEATURES = 1 << 30


def refusal(call: Callable[[], Any]) -> tuple[int | None, str | None]:
    with pytest.raises(native.EngineError) as caught:
        call()
    return caught.value.errno, caught.value.strerror


@pytest.fixture
def disk(start: Callable[..., Any]) -> Any:
    driver = start(cores=sorted(os.sched_getaffinity(0))[:2])
    driver.malloc("m0", 4096, 512)
    driver.wait(driver.engine.vhost_blk_create("v0", "m0", num_queues=2))
    return driver


def test_a_controller_tells_what_it_is(disk: Any) -> None:
    (info,) = disk.engine.vhost_blk_info("v0")
    cores = [reactor["lcore"] for reactor in disk.engine.reactors()]
    assert (info["name"], info["bdev"], info["readonly"], info["num_queues"], info["reactors"]) == ("v0", "m0", False, 2, cores)
    assert info["device_features"] & PROTOCOL_FEATURES
    assert info["sessions"] == []
    session = disk.wait(disk.engine.vhost_session_open("v0"))
    disk.wait(disk.engine.vhost_set_features(session, PROTOCOL_FEATURES))
    disk.wait(disk.engine.vhost_set_vring_num(session, 1, 256))
    ((told,),) = [info["sessions"] for info in disk.engine.vhost_blk_info()]
    assert (told["id"], told["features"]) == (session, PROTOCOL_FEATURES)
    assert [(queue["index"], queue["size"], queue["state"]) for queue in told["queues"]] == [(0, 0, "stopped"), (1, 256, "stopped")]
    config = disk.engine.vhost_get_config(session)
    assert int.from_bytes(config[:8], "little") == 4096
    disk.wait(disk.engine.vhost_session_close(session))
    disk.wait(disk.engine.vhost_blk_delete("v0"))
    assert disk.engine.vhost_blk_info() == []


def test_packed_rings_are_offered_where_they_are_asked_for_and_may_have_any_size(disk: Any) -> None:
    engine = disk.engine
    offered = {name: engine.vhost_blk_info(name)[0]["device_features"] >> 34 & 1 for name in ("v0",)}
    disk.wait(engine.vhost_blk_create("p0", "m0", packed_ring=True, readonly=True))
    assert (offered["v0"], engine.vhost_blk_info("p0")[0]["device_features"] >> 34 & 1) == (0, 1)
    session = disk.wait(engine.vhost_session_open("p0"))
    assert disk.wait(engine.vhost_get_vring_base(session, 0)) == 0
    disk.wait(engine.vhost_set_features(session, 1 << 32 | 1 << 34))
    assert disk.wait(engine.vhost_get_vring_base(session, 0)) == 0x8000_8000, "a ring that was never used"
    disk.wait(engine.vhost_set_vring_num(session, 0, 100))
    disk.wait(engine.vhost_set_vring_base(session, 0, 0x8005_0007))
    assert disk.wait(engine.vhost_get_vring_base(session, 0)) == 0x8005_0007
    assert refusal(lambda: disk.wait(engine.vhost_set_vring_num(session, 0, 32769))) == (
        errno.EINVAL,
        "Invalid argument: vring num 32769: 1 to 32768",
    )
    fd, size, _ = disk.wait(engine.vhost_get_inflight_fd(session, 1, 100))
    os.close(fd)
    assert size == 32 * 1025 + 32, "32 bytes an entry, in lines of 64, and room for 1024"
    disk.wait(engine.vhost_blk_delete("p0"))


def test_refusals_name_what_is_wrong(disk: Any) -> None:
    engine = disk.engine
    assert refusal(lambda: engine.vhost_blk_create("v0", "m0")) == (errno.EEXIST, "File exists: controller v0")
    assert refusal(lambda: engine.vhost_blk_create("v1", "x")) == (errno.ENODEV, "No such device: bdev x")
    assert refusal(lambda: engine.vhost_blk_create("v1", "m0", num_queues=257)) == (
        errno.EINVAL,
        "Invalid argument: num_queues 257: 1 to 256",
    )
    assert refusal(lambda: engine.vhost_blk_delete("v1")) == (errno.ENODEV, "No such device: controller v1")
    assert refusal(lambda: engine.vhost_session_open("v1")) == (errno.ENODEV, "No such device: controller v1")
    session = disk.wait(engine.vhost_session_open("v0"))
    assert refusal(lambda: engine.vhost_session_open("v0"))[0] == errno.EBUSY
    assert refusal(lambda: disk.wait(engine.vhost_set_vring_num(session, 0, 3)))[0] == errno.EINVAL
    assert refusal(lambda: disk.wait(engine.vhost_set_vring_num(session, 9, 4)))[0] == errno.EINVAL
    assert refusal(lambda: engine.vhost_set_vring_kick(session, 0, 1 << 20))[0] == errno.EBADF
    assert refusal(lambda: engine.vhost_set_vring_kick(session, 0, -1)) == (errno.EINVAL, "Invalid argument: fd -1: 0 to 2147483647")
    rows = [(0, 4096, 0, 0, 0)] * 510
    assert refusal(lambda: engine.vhost_set_mem_table(session, rows)) == (
        errno.EINVAL,
        "Invalid argument: regions of 510 rows: at most 509 rows",
    )
    assert refusal(lambda: disk.wait(engine.vhost_reset_device(session + 9))) == (errno.ENODEV, f"No such device: session {session + 9}")


def test_the_inflight_descriptor_is_the_callers(disk: Any) -> None:
    session = disk.wait(disk.engine.vhost_session_open("v0"))
    fd, size, offset = disk.wait(disk.engine.vhost_get_inflight_fd(session, 2, 128))
    assert os.fstat(fd).st_size >= offset + size > 0
    disk.wait(disk.engine.vhost_set_inflight_fd(session, fd, size, offset, 2, 128))
    os.close(fd)


def test_deleting_a_controller_ends_its_session(disk: Any) -> None:
    session = disk.wait(disk.engine.vhost_session_open("v0"))
    memory = os.memfd_create("guest")
    os.ftruncate(memory, 1 << 20)
    disk.wait(disk.engine.vhost_set_mem_table(session, [(0, 1 << 20, 0x7000_0000, 0, memory)]))
    os.close(memory)
    disk.wait(disk.engine.vhost_blk_delete("v0", deadline_ms=500))
    assert disk.engine.vhost_blk_info() == []
    assert refusal(lambda: disk.wait(disk.engine.vhost_session_close(session)))[0] == errno.ENODEV
    disk.wait(disk.engine.bdev_unregister("m0"))


def test_stop_ends_sessions_and_controllers(disk: Any) -> None:
    session = disk.wait(disk.engine.vhost_session_open("v0"))
    tokens = [disk.engine.vhost_set_features(session, 0) for _ in range(5)]
    disk.engine.stop(3000)
    while disk.drain():
        pass
    assert [len(disk.replies[token]) for token in tokens] == [1] * 5
