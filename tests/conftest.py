"""Fixtures of the control plane's tests: a running stack on the compiled engine."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))


# A busy machine is no finding.
settings.register_profile("qpair", deadline=None)
settings.load_profile("qpair")


try:
    from qpair._engine import Engine as ENGINE
except ImportError as error:
    pytest.exit(f"the engine is not built: run `make engine` ({error})", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def engine_factory() -> Callable[..., Any]:
    """What makes the engine that the tests run on."""
    return ENGINE


@pytest.fixture
def make_stack(tmp_path: Path) -> Callable[..., Any]:
    """A stack that is not started yet."""
    from qpair import Stack

    core = min(os.sched_getaffinity(0))

    def make(**options: Any) -> Any:
        options.setdefault("cores", core)
        options.setdefault("pin", False)
        options.setdefault("vhost_dir", tmp_path)
        return Stack(engine_factory=ENGINE, **options)

    return make


@pytest_asyncio.fixture
async def stack(make_stack: Callable[..., Any]) -> AsyncIterator[Any]:
    async with make_stack() as running:
        yield running


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    return str(tmp_path / "rpc.sock")


@pytest_asyncio.fixture
async def server(stack: Any, socket_path: str) -> AsyncIterator[Any]:
    yield await stack.listen(socket_path)


async def run_client(*command: str, stdin: bytes | None = None, timeout: float = 30) -> tuple[int, str, str]:
    """A client as a process of its own, while this loop serves it."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), timeout)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def qpair_command() -> list[str]:
    """The ``qpair`` command."""
    return [sys.executable, "-m", "qpair.cli"]


@pytest.fixture
def client() -> Callable[..., Awaitable[tuple[int, str, str]]]:
    return run_client
