"""Memory of single I/Os: used again, never under somebody who still looks at it, bounded, and given back when nothing happens."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from engine.conftest import Driver

MIB = 1 << 20
KEPT_MIB_MAX = 64


@pytest.fixture
def disk(driver: Driver) -> int:
    """A descriptor of 256 MiB in blocks of 4096 bytes."""
    driver.malloc(num_blocks=65536, block_size=4096)
    opened: int = driver.wait(driver.engine.bdev_open("m0"))
    return opened


def address(view: memoryview) -> int:
    at: int = numpy.frombuffer(view, numpy.uint8).ctypes.data
    return at


def mapped() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [(int(low, 16), int(high, 16)) for low, high in (re.match(r"(\w+)-(\w+)", line).groups() for line in lines)]  # type: ignore[union-attr]


def still_there(addresses: list[int]) -> int:
    ranges = mapped()
    return sum(any(low <= at < high for low, high in ranges) for at in addresses)


def read(driver: Driver, disk: int, block: int, blocks: int = 256) -> memoryview:
    token = driver.engine.bdev_io(disk, "read", block, blocks, view=True)
    view: memoryview = driver.wait(token)
    del driver.replies[token]  # it holds the view, too
    return view


def test_a_view_is_the_bytes_in_place_and_cannot_be_written_to(driver: Driver, disk: int) -> None:
    pattern = bytes(range(256)) * 16
    driver.wait(driver.engine.bdev_io(disk, "write", 7, 1, pattern))
    view = read(driver, disk, 7, 1)
    assert (view.readonly, view.format, view.nbytes, bytes(view)) == (True, "B", 4096, pattern)
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    assert driver.wait(driver.engine.bdev_io(disk, "read", 7, 1)) == pattern


def test_memory_that_nobody_looks_at_is_used_again(driver: Driver, disk: int) -> None:
    places = set()
    for _ in range(100):
        view = read(driver, disk, 0)
        places.add(address(view))
        del view
    assert len(places) <= 2, "one request at a time"


@pytest.mark.parametrize("keep", [lambda view: view, lambda view: view[4096:8192], lambda view: numpy.frombuffer(view, numpy.uint8)[4096:]])
def test_a_buffer_that_python_still_holds_is_set_aside_and_never_used_under_it(
    driver: Driver, disk: int, keep: Callable[[memoryview], Any]
) -> None:
    driver.wait(driver.engine.bdev_io(disk, "write", 0, 256, b"A" * MIB))
    held = keep(read(driver, disk, 0))
    before = bytes(held)
    place = address(memoryview(held))
    assert before == b"A" * len(before)
    for turn in range(200):
        driver.wait(driver.engine.bdev_io(disk, "write", 256, 256, bytes([turn]) * MIB))
        other = read(driver, disk, 256)
        assert not address(other) <= place < address(other) + MIB, "its memory is somebody else's"
        assert other[0] == other[-1] == turn
    assert bytes(held) == before
    del held, other
    gc.collect()
    starts = set()
    for _ in range(4):
        view = read(driver, disk, 0)
        starts.add(address(view))
        del view
    assert any(start <= place < start + MIB for start in starts), "once let go it is used again"


def test_a_view_outlives_its_bdev_and_the_engine(driver: Driver, disk: int) -> None:
    driver.wait(driver.engine.bdev_io(disk, "write", 0, 1, b"B" * 4096))
    view = read(driver, disk, 0, 1)
    driver.wait(driver.engine.bdev_close(disk))
    driver.wait(driver.engine.bdev_unregister("m0"))
    driver.engine.stop()
    gc.collect()
    assert bytes(view) == b"B" * 4096
    place = [address(view)]
    assert still_there(place) == 1
    del view
    assert still_there(place) == 0, "a stopped engine keeps nothing"


def test_what_an_earlier_request_left_is_never_seen(driver: Driver, disk: int) -> None:
    """A null bdev leaves what it is to read into as it is: those must be zeros, also where the memory was somebody's before."""
    driver.wait(driver.engine.bdev_null_create("n0", num_blocks=4096, block_size=4096))
    null = driver.wait(driver.engine.bdev_open("n0"))
    for blocks in (1, 3, 256):
        for _ in range(8):
            driver.wait(driver.engine.bdev_io(disk, "write", 0, blocks, b"secret!!" * (blocks * 512)))
            assert driver.wait(driver.engine.bdev_io(null, "read", 0, blocks)) == bytes(blocks * 4096)
            assert bytes(read(driver, null, 0, blocks)) == bytes(blocks * 4096)


def test_metadata_are_a_view_of_their_own_on_the_same_memory(driver: Driver) -> None:
    driver.malloc("meta", num_blocks=64, block_size=512, metadata_bytes=8)
    opened = driver.wait(driver.engine.bdev_open("meta"))
    driver.wait(driver.engine.bdev_io(opened, "write", 0, 2, b"D" * 1024, metadata=b"M" * 16))
    token = driver.engine.bdev_io(opened, "read", 0, 2, metadata=True, view=True)
    data, metadata = driver.wait(token)
    del driver.replies[token]
    assert (bytes(data), bytes(metadata)) == (b"D" * 1024, b"M" * 16)
    del data
    driver.wait(driver.engine.bdev_io(opened, "write", 0, 2, b"E" * 1024, metadata=b"N" * 16))
    assert driver.wait(driver.engine.bdev_io(opened, "read", 0, 2)) == b"E" * 1024
    assert bytes(metadata) == b"M" * 16, "one of two views is enough"


def test_what_is_kept_is_bounded_and_given_back_when_nothing_happens(driver: Driver, disk: int) -> None:
    hoard = [read(driver, disk, 0) for _ in range(KEPT_MIB_MAX + 64)]
    places = [address(view) for view in hoard]
    assert len(set(places)) == len(places)
    assert still_there(places) == len(places)
    hoard.clear()
    assert 0 < still_there(places) <= KEPT_MIB_MAX, "some are kept for later, not all"
    end = time.monotonic() + 10
    while (left := still_there(places)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == 0, "it is idle"
