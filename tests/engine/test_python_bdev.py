"""A bdev whose I/O this process does: a store behind `PythonBdevRing`, and what happens to its buffers."""

from __future__ import annotations

import errno
import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from qpair import _engine as native

SIZE = 512


class Store:
    """A plain store that serves a ring from a thread of its own."""

    def __init__(self, driver: Any, name: str, num_blocks: int, **options: Any) -> None:
        self.ring = driver.engine.bdev_python_create(name, num_blocks=num_blocks, block_size=SIZE, **options)
        self.data = bytearray(num_blocks * SIZE)
        self.seen: list[str] = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.stopping.wait(0.0005):
            for slot, op, offset, blocks, buffer in self.ring.fetch():
                self.seen.append(op)
                span = slice(offset * SIZE, (offset + blocks) * SIZE)
                if op == "read":
                    buffer[:] = self.data[span]
                elif op == "write":
                    self.data[span] = buffer
                elif op in ("unmap", "write_zeroes"):
                    self.data[span] = bytes(blocks * SIZE)
                self.ring.complete(slot)

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join()


def fetch(driver: Any, ring: Any) -> Any:
    """The next request, waited for by its event."""
    before = len(driver.events_of(native.PythonBdevWork))
    got = ring.fetch(1)
    if not got:
        driver.until(lambda: len(driver.events_of(native.PythonBdevWork)) > before, "work")
        got = ring.fetch(1)
    (request,) = got
    return request


def test_a_store_in_python_keeps_what_was_written(driver: Any) -> None:
    store = Store(driver, "p0", 300, depth=8, max_io_bytes=8192)
    try:
        disk = driver.open("p0")
        rng = random.Random(3)
        data = rng.randbytes(300 * SIZE)
        driver.io(disk, "write", 0, 300, data)
        assert driver.io(disk, "read", 0, 300) == data
        driver.io(disk, "unmap", 10, 5)
        driver.io(disk, "write_zeroes", 20, 5)
        driver.io(disk, "flush")
        expected = bytearray(data)
        expected[10 * SIZE : 15 * SIZE] = bytes(5 * SIZE)
        expected[20 * SIZE : 25 * SIZE] = bytes(5 * SIZE)
        assert driver.io(disk, "read", 0, 300) == bytes(expected) == bytes(store.data)
        assert {"read", "write", "unmap", "write_zeroes", "flush"} <= set(store.seen)
        driver.wait(driver.engine.bdev_close(disk))
    finally:
        store.stop()


def test_work_is_told_once_until_a_fetch_finds_nothing(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    tokens = [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(10)]
    driver.until(lambda: bool(driver.events_of(native.PythonBdevWork)), "work")
    slots = []
    while len(slots) < 10:
        slots += [slot for slot, *_ in ring.fetch(3)]
    assert [event.ring for event in driver.events_of(native.PythonBdevWork)] == [ring.id]
    assert ring.fetch() == []
    for slot in slots:
        ring.complete(slot)
    assert [driver.wait(token) for token in tokens] == [bytes(SIZE)] * 10
    again = driver.engine.bdev_io(disk, "read", 0, 1)
    driver.until(lambda: len(driver.events_of(native.PythonBdevWork)) == 2, "work again")
    ring.complete(ring.fetch()[0][0], errno.ENOSPC)
    with pytest.raises(native.EngineError) as caught:
        driver.wait(again)
    assert caught.value.errno == errno.ENOSPC


def test_each_request_is_completed_once(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    token = driver.engine.bdev_io(disk, "flush")
    slot = fetch(driver, ring)[0]
    with pytest.raises(native.EngineError, match="errno 5000: 0 to 4095"):
        ring.complete(slot, 5000)
    ring.complete(slot)
    driver.wait(token)
    text = "is not with Python: each fetched request is completed once"
    with pytest.raises(ValueError, match=f"slot {slot} {text}"):
        ring.complete(slot)
    with pytest.raises(ValueError, match=f"slot 4000000000 {text}"):
        ring.complete(4_000_000_000)


def test_a_view_outlives_its_request_without_reaching_another_one(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE, depth=1)
    disk = driver.open("p0")
    token = driver.engine.bdev_io(disk, "read", 0, 1)
    slot, op, offset, blocks, kept = fetch(driver, ring)
    assert (op, offset, blocks, kept.nbytes, kept.readonly) == ("read", 0, 1, SIZE, False)
    kept[:] = b"a" * SIZE
    ring.complete(slot)
    kept[:] = b"b" * SIZE
    assert driver.wait(token) == b"a" * SIZE
    token = driver.engine.bdev_io(disk, "write", 3, 1, b"c" * SIZE)
    slot, op, offset, _, view = fetch(driver, ring)
    kept[:] = b"d" * SIZE
    assert (op, offset, view.readonly, bytes(view)) == ("write", 3, True, b"c" * SIZE)
    with pytest.raises(TypeError):
        view[0] = 1
    ring.complete(slot)
    driver.wait(token)
    assert bytes(view) == b"c" * SIZE
    token = driver.engine.bdev_io(disk, "read", 0, 1)
    slot, *_, fresh = fetch(driver, ring)
    assert bytes(fresh) == bytes(SIZE)
    assert (bytes(kept), bytes(view)) == (b"d" * SIZE, b"c" * SIZE)
    ring.complete(slot)
    driver.wait(token)


def test_buffers_come_back_when_their_views_are_gone(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE, depth=4, max_io_bytes=1 << 20)
    disk = driver.open("p0")

    def mapped() -> int:
        gc.collect()
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)

    def once() -> None:
        token = driver.engine.bdev_io(disk, "read", 0, 1)
        slot, *_ = fetch(driver, ring)
        ring.complete(slot)
        driver.wait(token)

    once()
    before = mapped()
    for _ in range(200):
        once()
    assert mapped() <= before + 20


def test_closing_the_ring_fails_what_is_under_way(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    tokens = [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(4)]
    slot, *_, view = fetch(driver, ring)
    ring.close()
    for token in tokens:
        with pytest.raises(native.EngineError) as caught:
            driver.wait(token)
        assert caught.value.errno == errno.EIO
    ring.complete(slot)
    assert view.nbytes == SIZE
    driver.wait(driver.engine.bdev_unregister("p0"))


def test_removal_aborts_what_python_does_not_answer(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    tokens = [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(4)]
    slot, *_ = fetch(driver, ring)
    driver.wait(driver.engine.bdev_unregister("p0", deadline_ms=50))
    for token in tokens:
        with pytest.raises(native.EngineError) as caught:
            driver.wait(token)
        assert caught.value.errno == errno.ECANCELED
    ring.complete(slot)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"depth": 0}, "depth 0: 1 to 4096"),
        ({"depth": 4097}, "depth 4097: 1 to 4096"),
        ({"max_io_bytes": 1000}, "max_io_bytes 1000: a multiple of block_size 512, at most 8388608"),
    ],
)
def test_impossible_rings_are_refused(start: Callable[..., Any], options: dict[str, int], text: str) -> None:
    with pytest.raises(native.EngineError) as caught:
        start().engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE, **options)
    assert (caught.value.errno, caught.value.strerror) == (errno.EINVAL, f"Invalid argument: {text}")
