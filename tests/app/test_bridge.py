"""The bridge hands each engine event to whoever waits for it, in any order of asking."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from doubles.engine import BdevEvent, EngineError, LogEvent, Reply, SessionEvent
from doubles.engine import Engine as Double
from qpair.app.bridge import Bridge
from qpair.errors import NoSuchBdev, NoSuchDevice, StackStopped


@pytest.fixture
async def pair() -> Any:
    engine = Double()
    bridge = Bridge(engine)  # type: ignore[arg-type]
    bridge.start()
    yield engine, bridge
    bridge.close()


async def test_replies_find_their_callers_whichever_comes_first(pair: Any) -> None:
    engine, bridge = pair
    later = bridge.call(7)
    engine.push(Reply(8, None, "early"))
    engine.push(Reply(7, None, "late"))
    assert await later == "late"
    assert await bridge.call(8) == "early"


async def test_an_error_is_raised_as_ours_with_its_cause(pair: Any) -> None:
    engine, bridge = pair
    engine.push(Reply(1, EngineError(errno.ENODEV, "no bdev is named 'x'"), None))
    with pytest.raises(NoSuchDevice, match="no bdev is named 'x'") as raised:
        await bridge.call(1)
    assert raised.value.code == -19
    assert isinstance(raised.value, LookupError)
    assert isinstance(raised.value.__cause__, EngineError)
    assert issubclass(NoSuchBdev, NoSuchDevice)


async def test_a_value_for_a_cancelled_caller_is_handed_to_its_disposer(pair: Any) -> None:
    engine, bridge = pair
    disposed: list[Any] = []
    future = bridge.call(1, unclaimed=disposed.append)
    future.cancel()
    engine.push(Reply(1, None, "a descriptor"))
    await asyncio.sleep(0.01)
    assert disposed == ["a descriptor"]


async def test_subscribers_are_told_though_one_of_them_fails(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine, bridge = pair
    seen: list[Any] = []

    def fail(event: Any) -> None:
        raise RuntimeError("a defect")

    bridge.subscribe_bdev(fail)
    stop = bridge.subscribe_bdev(seen.append)
    bridge.subscribe_session(seen.append)
    engine.push(BdevEvent("added", "n"))
    engine.push(SessionEvent(3, "failed", None, "a torn ring"))
    await asyncio.sleep(0.01)
    stop()
    engine.push(BdevEvent("removed", "n"))
    await asyncio.sleep(0.01)
    assert [event.kind for event in seen] == ["added", "failed"]
    assert "a subscriber of BdevEvent failed" in caplog.text


async def test_the_engines_log_is_logged_by_component(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = pair
    caplog.set_level("INFO", logger="qpair")
    engine.push(LogEvent("error", "vhost", "queue 1: the avail index jumped", suppressed=4))
    await asyncio.sleep(0.01)
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("qpair.vhost", "WARNING", "4 messages before this one were dropped by the rate limit"),
        ("qpair.vhost", "ERROR", "queue 1: the avail index jumped"),
    ]


async def test_closing_fails_whoever_still_waits(pair: Any) -> None:
    _, bridge = pair
    waiting = bridge.call(5)
    bridge.close()
    with pytest.raises(StackStopped, match="stopped before the engine answered"):
        await waiting
    with pytest.raises(StackStopped, match="the stack is stopped"):
        await bridge.call(6)
