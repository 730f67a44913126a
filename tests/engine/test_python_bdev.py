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
            for op, requests in self.ring.fetch():
                self.seen.append(op)
                for request in requests:
                    span = slice(request.offset, request.end)
                    if op == "read":
                        request.data[:] = self.data[span]
                    elif op == "write":
                        self.data[span] = request.data
                    elif op in ("unmap", "write_zeroes"):
                        self.data[span] = bytes(request.length)
                self.ring.finish(requests)

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
    ((op, (request,)),) = got
    assert op == request.op
    return request


def fetch_all(ring: Any, count: int) -> list[Any]:
    requests: list[Any] = []
    while len(requests) < count:
        requests += [request for _, batch in ring.fetch(3) for request in batch]
    return requests


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
    requests = fetch_all(ring, 10)
    assert [event.ring for event in driver.events_of(native.PythonBdevWork)] == [ring.id]
    assert ring.fetch() == []
    ring.finish(requests)
    assert [driver.wait(token) for token in tokens] == [bytes(SIZE)] * 10
    again = driver.engine.bdev_io(disk, "read", 0, 1)
    driver.until(lambda: len(driver.events_of(native.PythonBdevWork)) == 2, "work again")
    fetch_all(ring, 1)[0].fail(errno.ENOSPC)
    with pytest.raises(native.EngineError) as caught:
        driver.wait(again)
    assert caught.value.errno == errno.ENOSPC


def test_each_request_is_completed_once(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    token = driver.engine.bdev_io(disk, "flush")
    request = fetch(driver, ring)
    with pytest.raises(native.EngineError, match="errno 5000: 0 to 4095"):
        request.complete(5000)
    with pytest.raises(native.EngineError, match="errno 0: 1 to 4095"):
        request.fail(0)
    assert repr(request) == "<flush at 0, 0 bytes>"
    request.complete()
    driver.wait(token)
    with pytest.raises(ValueError, match="flush at 0 was completed before"):
        request.complete()
    ring.finish([request], errno.EIO)  # done: left as it is
    other = driver.engine.bdev_python_create("p1", num_blocks=8, block_size=SIZE)
    with pytest.raises(ValueError, match="a request of another bdev"):
        other.finish([request])
    with pytest.raises(TypeError):
        ring.finish([1])


def test_a_request_that_is_dropped_fails(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    token = driver.engine.bdev_io(disk, "read", 0, 1)
    request = fetch(driver, ring)
    del request
    with pytest.raises(native.EngineError) as caught:
        driver.wait(token)
    assert caught.value.errno == errno.EIO


def test_what_python_does_not_fill_reads_as_zeros(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE, depth=1)
    disk = driver.open("p0")
    token = driver.engine.bdev_io(disk, "write", 0, 1, b"secret!!" * 64)
    fetch(driver, ring).complete()
    driver.wait(token)
    token = driver.engine.bdev_io(disk, "read", 0, 1)
    fetch(driver, ring).complete()
    assert driver.wait(token) == bytes(SIZE)


def test_a_view_outlives_its_request_without_reaching_another_one(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE, depth=1)
    disk = driver.open("p0")
    token = driver.engine.bdev_io(disk, "read", 0, 1)
    request = fetch(driver, ring)
    view = request.data
    assert (request.op, request.offset, request.length, request.end) == ("read", 0, SIZE, SIZE)
    assert (view.nbytes, view.readonly, view.format, request.data is view) == (SIZE, False, "B", True)
    kept = view[:]
    kept[:] = b"a" * SIZE
    exporter = view.obj
    request.complete()
    kept[:] = b"b" * SIZE
    assert driver.wait(token) == b"a" * SIZE
    assert ring.buffers_kept == 1
    with pytest.raises(ValueError, match="operation forbidden on released memoryview object"):
        view[0]
    with pytest.raises(ValueError, match="read at 0 was completed: its data are gone"):
        request.data  # noqa: B018
    with pytest.raises(BufferError, match="a buffer is looked at through its request's data"):
        memoryview(exporter)
    token = driver.engine.bdev_io(disk, "write", 3, 1, b"c" * SIZE)
    request = fetch(driver, ring)
    written = request.data[:]
    kept[:] = b"d" * SIZE
    assert (request.op, request.offset, written.readonly, bytes(written)) == ("write", 3 * SIZE, True, b"c" * SIZE)
    with pytest.raises(TypeError):
        written[0] = 1
    request.complete()
    driver.wait(token)
    assert bytes(written) == b"c" * SIZE
    token = driver.engine.bdev_io(disk, "read", 0, 1)
    request = fetch(driver, ring)
    assert bytes(request.data) == bytes(SIZE)
    assert (bytes(kept), bytes(written)) == (b"d" * SIZE, b"c" * SIZE)
    request.complete()
    driver.wait(token)
    assert ring.buffers_kept == 2


def test_an_array_over_the_data_works_and_may_be_kept(start: Callable[..., Any]) -> None:
    numpy = pytest.importorskip("numpy")
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE, depth=1)
    disk = driver.open("p0")
    token = driver.engine.bdev_io(disk, "read", 0, 1)
    request = fetch(driver, ring)
    array = numpy.frombuffer(request.data, dtype="<u8")
    array[:] = numpy.arange(SIZE // 8)
    ring.finish([request])
    expected = numpy.arange(SIZE // 8, dtype="<u8").tobytes()
    assert driver.wait(token) == expected
    for _ in range(3):
        token = driver.engine.bdev_io(disk, "write", 0, 1, b"z" * SIZE)
        request = fetch(driver, ring)
        assert not numpy.frombuffer(request.data, dtype="u1").flags.writeable
        request.complete()
        driver.wait(token)
    assert array.tobytes() == expected


def test_buffers_go_when_their_views_do(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE, depth=4, max_io_bytes=1 << 20)
    disk = driver.open("p0")

    def mapped() -> int:
        gc.collect()
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)

    def once(keep: bool) -> Any:
        token = driver.engine.bdev_io(disk, "read", 0, 1)
        request = fetch(driver, ring)
        view = request.data[:1] if keep else None
        request.complete()
        driver.wait(token)
        return view

    for _ in range(8):
        once(False)
    before = mapped()
    views = [once(True) for _ in range(100)]
    assert mapped() >= before + 90
    assert ring.buffers_kept == 100
    views.clear()
    assert mapped() <= before + 20


def test_closing_the_ring_fails_what_is_under_way(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    tokens = [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(4)]
    request = fetch(driver, ring)
    view = request.data
    ring.close()
    for token in tokens:
        with pytest.raises(native.EngineError) as caught:
            driver.wait(token)
        assert caught.value.errno == errno.EIO
    assert view.nbytes == SIZE
    request.complete()
    driver.wait(driver.engine.bdev_unregister("p0"))


def test_removal_aborts_what_python_does_not_answer(start: Callable[..., Any]) -> None:
    driver = start()
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=SIZE)
    disk = driver.open("p0")
    tokens = [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(4)]
    request = fetch(driver, ring)
    driver.wait(driver.engine.bdev_unregister("p0", deadline_ms=50))
    for token in tokens:
        with pytest.raises(native.EngineError) as caught:
            driver.wait(token)
        assert caught.value.errno == errno.ECANCELED
    request.complete()


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
