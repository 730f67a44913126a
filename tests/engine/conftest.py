"""Helpers for tests of the compiled engine, without asyncio and without the control plane."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from missing import missing

native = pytest.importorskip("qpair._engine", reason="the engine is not built: run `make engine`")

ALLOWED = sorted(os.sched_getaffinity(0))


class Driver:
    """An engine and its events, sorted: replies by token, the rest in order."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.replies: dict[int, list[Any]] = {}
        self.news: list[Any] = []

    def drain(self, timeout: float = 0.0) -> int:
        """Takes what is there, waiting up to ``timeout`` seconds for the first."""
        if not select.select([self.engine.event_fd], [], [], timeout)[0]:
            return 0
        events = self.engine.events()
        for event in events:
            if isinstance(event, native.Reply):
                self.replies.setdefault(event.token, []).append(event)
            else:
                self.news.append(event)
        return len(events)

    def until(self, there: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
        end = time.monotonic() + timeout
        while not there():
            left = end - time.monotonic()
            assert left > 0, f"{what} did not come within {timeout} s"
            self.drain(left)

    def reply(self, token: int, timeout: float = 10.0) -> Any:
        self.until(lambda: token in self.replies, f"the reply to token {token}", timeout)
        return self.replies[token][0]

    def wait(self, token: int, timeout: float = 10.0) -> Any:
        """The value of a token's reply; its error is raised."""
        reply = self.reply(token, timeout)
        if reply.error is not None:
            # A copy: with a traceback on it the reply would hold the test's frame, which holds the reply, unseen by the garbage collector.
            raise native.EngineError(*reply.error.args)
        return reply.value

    def malloc(self, name: str = "m0", num_blocks: int = 256, block_size: int = 512, **options: Any) -> str:
        self.wait(self.engine.bdev_malloc_create(name, num_blocks=num_blocks, block_size=block_size, **options))
        return name

    def open(self, name: str, *, write: bool = True) -> int:
        descriptor: int = self.wait(self.engine.bdev_open(name, write=write))
        return descriptor

    def io(self, descriptor: int, op: str, *args: Any) -> Any:
        return self.wait(self.engine.bdev_io(descriptor, op, *args))

    def events_of(self, kind: type) -> list[Any]:
        return [event for event in self.news if isinstance(event, kind)]


@pytest.fixture
def start() -> Iterator[Callable[..., Driver]]:
    """Starts engines; they are stopped after the test."""
    made: list[Driver] = []

    def make(**options: Any) -> Driver:
        options.setdefault("cores", ALLOWED[:1])
        options.setdefault("pin", False)
        made.append(Driver(native.Engine(**options)))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.stop(2000)


@pytest.fixture(params=["io_uring", "epoll"])
def driver(request: pytest.FixtureRequest, start: Callable[..., Driver]) -> Driver:
    try:
        return start(driver=request.param, cores=ALLOWED[:2])
    except native.EngineError as error:
        if request.param == "io_uring":
            missing("io_uring", error.strerror)
        raise
