"""The blocking twin does what the stack does, without a loop of the caller's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qpair import BlockingStack
from qpair.errors import InvalidArgument, NoSuchBdev, StackStopped


@pytest.fixture
def blocking(engine_factory: Callable[..., Any], tmp_path: Path) -> Iterator[BlockingStack]:
    with BlockingStack(cores=min(os.sched_getaffinity(0)), pin=False, vhost_dir=tmp_path, engine_factory=engine_factory) as stack:
        yield stack


def test_a_disk_is_written_read_measured_and_deleted(blocking: BlockingStack, tmp_path: Path) -> None:
    disk = blocking.malloc("m0", "1MiB")
    assert disk.size_bytes == 1 << 20
    disk.write(512, b"x" * 1024)
    disk.flush()
    assert disk.read(512, 1024) == b"x" * 1024
    disk.write_zeroes(512, 512)
    assert disk.read(512, 512) == bytes(512)
    disk.close()
    assert blocking.measure(disk, ios=100, depth=4).ios >= 100
    assert blocking.rpc("bdev_get_bdevs", name="m0")[0]["num_blocks"] == 2048
    blocking.save_config(tmp_path / "c.json")
    blocking.delete(disk)
    with pytest.raises(NoSuchBdev):
        _ = disk.info
    blocking.load_config(tmp_path / "c.json")
    assert blocking.rpc("bdev_get_bdevs")[0]["name"] == "m0"


def test_errors_are_the_same(blocking: BlockingStack) -> None:
    with pytest.raises(InvalidArgument, match="no multiple of block_size"):
        blocking.malloc("m0", 1000)


def test_outside_of_with_it_is_stopped_and_no_thread_stays() -> None:
    before = threading.active_count()
    stack = BlockingStack(cores="1023")
    with pytest.raises(InvalidArgument, match="core 1023 is not usable"):
        stack.__enter__()
    assert threading.active_count() == before
    with pytest.raises(StackStopped, match="use it inside 'with'"):
        stack.malloc("m0", "1MiB")
