"""Events: typed, numbered, bounded, and told to readers who are slow, gone or many."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qpair.bdev.events import KEPT, Appeared, EventBus, Failed, Lost, Resized, Throttled, Vanished


def told(events: list[Any]) -> list[tuple[str, str]]:
    return [(event.kind, event.bdev) for event in events]


async def test_events_tell_of_bdevs_that_come_change_and_go(stack: Any) -> None:
    reader = stack.events()
    await stack.null("n", "1MiB")
    await stack.bdevs.resize("n", "2MiB")
    await stack.delete("n")
    stack.bdevs.events.publish(Failed(bdev="x", reason="its worker hangs"))
    stack.bdevs.events.publish(Throttled(bdev="x", limit="rw_ios_per_sec", value=1000))
    seen = [await asyncio.wait_for(anext(reader), 5) for _ in range(5)]
    assert told(seen) == [("appeared", "n"), ("resized", "n"), ("vanished", "n"), ("failed", "x"), ("throttled", "x")]
    assert isinstance(seen[1], Resized)
    assert seen[1].size_bytes == 2 << 20
    assert [event.id for event in seen] == list(range(5))
    assert isinstance(seen[4], Throttled)
    assert (seen[4].limit, seen[4].value) == ("rw_ios_per_sec", 1000)


async def test_iteration_ends_when_the_stack_stops_after_what_was_told(make_stack: Any) -> None:
    async with make_stack() as stack:
        reader = stack.events()
        waiting = asyncio.ensure_future(anext(stack.events(), None))
        await asyncio.sleep(0)
        await stack.null("n", "1MiB")
        assert (await asyncio.wait_for(waiting, 5)).kind == "appeared"
        never = asyncio.ensure_future(anext(stack.events(), None))
        await asyncio.sleep(0)
    assert await asyncio.wait_for(never, 5) is None
    assert [event.kind async for event in reader] == ["appeared"]
    assert [event async for event in stack.events()] == [], "nothing comes after the end"


async def test_a_slow_reader_is_told_how_many_it_missed_and_reads_on_from_the_oldest_kept() -> None:
    bus = EventBus(kept=4)
    slow, fast = bus.subscribe(), bus.subscribe()
    for number in range(10):
        bus.publish(Appeared(bdev=str(number)))
        assert (await anext(fast)).bdev == str(number)
    first = await anext(slow)
    assert isinstance(first, Lost)
    assert first.count == 6
    assert [(await anext(slow)).bdev for _ in range(4)] == ["6", "7", "8", "9"]
    bus.publish(Vanished(bdev="0"))
    assert (await anext(slow)).kind == "vanished", "what was lost is told once"


async def test_a_reader_that_left_a_loop_early_is_forgotten() -> None:
    bus = EventBus()
    bus.publish(Appeared(bdev="before"))

    async def one() -> str:
        async for event in bus.subscribe():
            return event.bdev
        return ""

    task = asyncio.ensure_future(one())
    await asyncio.sleep(0)
    bus.publish(Appeared(bdev="after"))
    assert await task == "after", "a reader hears of what comes after it subscribed"
    gc.collect()
    assert len(bus._readers) == 0


async def test_another_thread_may_publish(stack: Any) -> None:
    reader = stack.events()
    thread = threading.Thread(target=stack.bdevs.events.publish, args=(Failed(bdev="x", reason="r"),))
    thread.start()
    event = await asyncio.wait_for(anext(reader), 5)
    thread.join()
    assert (event.kind, event.id) == ("failed", 0)


@given(published=st.integers(0, 3 * 8), first=st.integers(0, 2**64 - 1) | st.integers(0, 30), count=st.none() | st.integers(0, 40))
def test_the_ring_gives_what_spdks_gives(published: int, first: int, count: int | None) -> None:
    """SPDK's rule: start at ``first`` or the oldest kept, whichever is later; at most ``count``; ids without gaps."""
    bus = EventBus(kept=8)
    for number in range(published):
        bus.publish(Appeared(bdev=str(number)))
    start = max(first, published - 8, 0)
    wanted = list(range(start, published))[:count]
    found = bus.since(first, count)
    assert [event.id for event in found] == wanted
    assert [event.bdev for event in found] == [str(number) for number in wanted]


async def test_notifications_read_as_spdks(stack: Any) -> None:
    assert await stack.rpc("notify_get_types") == [
        "bdev_register",
        "bdev_unregister",
        "bdev_resize",
        "qpair_bdev_failed",
        "qpair_bdev_throttled",
    ]
    await stack.null("n", "1MiB")
    await stack.bdevs.resize("n", "2MiB")
    await stack.delete("n")
    assert await stack.rpc("notify_get_notifications") == [
        {"type": "bdev_register", "ctx": "n", "id": 0},
        {"type": "bdev_resize", "ctx": "n", "id": 1},
        {"type": "bdev_unregister", "ctx": "n", "id": 2},
    ]
    assert [entry["id"] for entry in await stack.rpc("notify_get_notifications", id=1, max=1)] == [1]
    assert await stack.rpc("notify_get_notifications", id=2**64 - 1) == []
    for _ in range(KEPT):
        stack.bdevs.events.publish(Appeared(bdev="m"))
    entries = await stack.rpc("notify_get_notifications", id=1)
    assert [entry["id"] for entry in entries] == list(range(3, 3 + KEPT))
