"""The virtio-user initiator's memory, and the whole way round: our initiator on our target, rings and all, by hand."""

from __future__ import annotations

import errno
import gc
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from qpair import _engine as native

VERSION_1 = 1 << 32


def test_memory_is_laid_out_and_told() -> None:
    memory = native.VirtioMemory(num_queues=2, queue_size=64)
    assert os.fstat(memory.fd).st_size == memory.size_bytes
    places = [address for queue in range(2) for address in memory.queue_addresses(queue)]
    assert len(set(places)) == 6
    assert all(memory.user_address <= place < memory.user_address + memory.size_bytes for place in places)
    with pytest.raises(native.EngineError) as caught:
        memory.queue_addresses(2)
    assert (caught.value.errno, caught.value.strerror) == (errno.EINVAL, "Invalid argument: queue 2: 0 to 1")
    with pytest.raises(native.EngineError, match="queue_size 3: a power of two from 4 to 32768"):
        native.VirtioMemory(num_queues=1, queue_size=3)


def connect(driver: Any, controller: str, queue_size: int = 64) -> tuple[int, list[int]]:
    """What a vhost-user connection says, without the connection: a session whose ring 0 is driven by bdev virtio0."""
    engine = driver.engine
    session = driver.wait(engine.vhost_session_open(controller))
    features = engine.vhost_blk_info(controller)[0]["device_features"] & ~(1 << 30)
    assert features & VERSION_1
    memory = native.VirtioMemory(num_queues=1, queue_size=queue_size)
    kick, call = os.eventfd(0), os.eventfd(0)
    driver.wait(engine.vhost_set_features(session, features))
    driver.wait(engine.vhost_set_mem_table(session, [(0, memory.size_bytes, memory.user_address, 0, memory.fd)]))
    desc, avail, used = memory.queue_addresses(0)
    driver.wait(engine.vhost_set_vring_num(session, 0, queue_size))
    driver.wait(engine.vhost_set_vring_base(session, 0, 0))
    driver.wait(engine.vhost_set_vring_addr(session, 0, 0, desc, used, avail, 0))
    driver.wait(engine.vhost_set_vring_call(session, 0, call))
    driver.wait(engine.vhost_set_vring_kick(session, 0, kick))
    config = engine.vhost_get_config(session)
    queues = [(queue_size, kick, call)]
    engine.bdev_virtio_create("virtio0", features=features, config=config, memory=memory, queues=queues)
    os.close(kick)
    os.close(call)
    return session, queues


def test_our_initiator_reads_what_it_wrote_through_our_target(driver: Any) -> None:
    engine = driver.engine
    driver.malloc("m0", 4096, 512)
    driver.wait(engine.vhost_blk_create("v0", "m0", num_queues=1))
    session, _ = connect(driver, "v0")
    disk, below = driver.open("virtio0"), driver.open("m0")
    data = random.Random(5).randbytes(700 * 512)
    driver.io(disk, "write", 11, 700, data)
    assert driver.io(disk, "read", 11, 700) == data
    assert driver.io(below, "read", 11, 700) == data
    driver.io(disk, "write_zeroes", 12, 5)
    driver.io(disk, "flush")
    assert driver.io(disk, "read", 11, 7) == data[:512] + bytes(5 * 512) + data[6 * 512 : 7 * 512]
    (queue,) = engine.vhost_blk_info("v0")[0]["sessions"][0]["queues"]
    assert (queue["state"], queue["size"]) == ("running", 64)
    assert queue["requests"] > 0
    driver.wait(engine.bdev_close(disk))
    driver.wait(engine.bdev_unregister("virtio0"))
    base = driver.wait(engine.vhost_get_vring_base(session, 0))
    assert base > 0
    driver.wait(engine.vhost_session_close(session))
    driver.wait(engine.vhost_blk_delete("v0"))


@pytest.mark.parametrize("wrong", ["kick", "call"])
def test_a_notification_by_what_is_no_eventfd_is_refused_by_name_and_kept_nowhere(driver: Any, wrong: str) -> None:
    engine = driver.engine
    driver.malloc("m0", 4096, 512)
    driver.wait(engine.vhost_blk_create("v0", "m0", num_queues=1))
    session = driver.wait(engine.vhost_session_open("v0"))
    config = engine.vhost_get_config(session)
    memory = native.VirtioMemory(num_queues=1, queue_size=64)
    good, (end, pipe) = os.eventfd(0), os.pipe()
    gc.collect()  # what earlier tests left open is closed some time
    before = len(os.listdir("/proc/self/fd"))
    for fd, expected in [
        (pipe, rf"^Invalid argument: {wrong} pipe:\[\d+\]: an eventfd$"),
        (1 << 20, rf"^{wrong} 1048576: Bad file descriptor"),
    ]:
        kick, call = (fd, good) if wrong == "kick" else (good, fd)
        with pytest.raises(native.EngineError) as caught:
            engine.bdev_virtio_create("virtio0", features=VERSION_1, config=config, memory=memory, queues=[(64, kick, call)])
        assert re.match(expected, caught.value.strerror), caught.value.strerror
    deadline = time.monotonic() + 5  # a descriptor of somebody's is closed on a thread of its own
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in (good, end, pipe):
        os.close(fd)
    driver.wait(engine.vhost_session_close(session))
    driver.wait(engine.vhost_blk_delete("v0"))


def test_stop_with_a_load_on_the_whole_way_round_answers_all(start: Callable[..., Any]) -> None:
    driver = start(cores=sorted(os.sched_getaffinity(0))[:2])
    driver.malloc("m0", 4096, 512)
    core = driver.engine.reactors()[0]["lcore"]
    driver.wait(driver.engine.vhost_blk_create("v0", "m0", num_queues=1))
    connect(driver, "v0")
    run = driver.engine.perf_start("virtio0", depth=16, reactors=[core])
    disk = driver.open("m0")
    tokens = [driver.engine.bdev_io(disk, "read", i, 1) for i in range(50)]
    driver.engine.stop(8000)
    while driver.drain():
        pass
    assert [len(driver.replies[token]) for token in [run, *tokens]] == [1] * 51
