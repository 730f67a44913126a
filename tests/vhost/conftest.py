"""Fixtures of the message flow's tests: a stack whose engine records, one exported disk, and a count of open descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from vhost.engine_double import VhostEngine
from vhost.peer import Peer


@pytest.fixture
def recorder() -> VhostEngine:
    return VhostEngine()


@pytest_asyncio.fixture
async def recording_stack(recorder: VhostEngine, tmp_path: Path) -> AsyncIterator[Any]:
    from qpair import Stack

    core = min(os.sched_getaffinity(0))
    recorder.cores = [core]
    async with Stack(cores=core, pin=False, vhost_dir=tmp_path, engine_factory=lambda **_: recorder) as stack:
        await stack.null("disk0", "64MiB")
        yield stack


@pytest_asyncio.fixture
async def controller(recording_stack: Any) -> Any:
    return await recording_stack.vhost.create("vhost.0", "disk0", num_queues=4)


@pytest_asyncio.fixture
async def peer(controller: Any) -> AsyncIterator[Peer]:
    connected = await Peer.connect(controller.socket)
    yield connected
    connected.close()


def open_fds() -> set[str]:
    gc.collect()
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


@pytest.fixture
def count_fds() -> Callable[[], set[str]]:
    """Open descriptors of this process, named."""
    return open_fds


async def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 5) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.002)
