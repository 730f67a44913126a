"""Events: typed, numbered, bounded, and told to readers who are slow, gone or many."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpair.bdev.events import KEPT, REASON_MAX, Appeared, EventBus, Failed, Lost, Resized, Throttled, Vanished
from qpair.errors import InvalidParameters


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


# -- hostile users ----------------------------------------------------------------------------------


async def test_thousands_come_and_go_in_order_and_who_is_slow_learns_what_it_missed(stack: Any) -> None:
    count = 3000
    reader, slow = stack.events(), stack.events()

    async def follow() -> list[tuple[str, str]]:
        return [(event.kind, event.bdev) for event in [await anext(reader) for _ in range(2 * count)]]

    following = asyncio.ensure_future(follow())
    for number in range(count):
        await stack.null(f"n{number}", "1MiB")
        await stack.delete(f"n{number}")
    wanted = [(kind, f"n{number}") for number in range(count) for kind in ("appeared", "vanished")]
    assert await asyncio.wait_for(following, 30) == wanted
    lost = await anext(slow)
    assert isinstance(lost, Lost)
    assert lost.count == 2 * count - KEPT
    assert [(event.kind, event.bdev) for event in [await anext(slow) for _ in range(KEPT)]] == wanted[-KEPT:]
    entries = await stack.rpc("notify_get_notifications")
    assert [(entry["id"], entry["ctx"]) for entry in entries] == list(enumerate([name for _, name in wanted]))[-KEPT:]


async def test_readers_dropped_cancelled_and_shared_lose_nothing_for_the_others() -> None:
    bus = EventBus(kept=8)
    reader = bus.subscribe()
    for number in range(50):
        waiting = asyncio.ensure_future(anext(reader))
        dropped = asyncio.ensure_future(anext(bus.subscribe()))
        await asyncio.sleep(0)
        if number % 2:
            bus.publish(Appeared(bdev=str(number)))
        waiting.cancel()
        dropped.cancel()
        await asyncio.gather(waiting, dropped, return_exceptions=True)
        if number % 2:
            # A wait that was cancelled when the event was there already has taken nothing.
            assert (await anext(reader)).bdev == str(number)
    del waiting, dropped
    await asyncio.sleep(0)
    gc.collect()
    assert len(bus._readers) == 1
    pair = [asyncio.ensure_future(anext(reader)) for _ in range(2)]
    await asyncio.sleep(0)
    bus.publish(Appeared(bdev="a"))
    bus.publish(Appeared(bdev="b"))
    assert {event.bdev for event in await asyncio.wait_for(asyncio.gather(*pair), 5)} == {"a", "b"}
    both = [asyncio.ensure_future(anext(reader, None)) for _ in range(2)]
    await asyncio.sleep(0)
    bus.close()
    assert await asyncio.wait_for(asyncio.gather(*both), 5) == [None, None]


def test_a_thread_that_publishes_while_the_loop_ends_hears_no_error() -> None:
    bus, failed = EventBus(), []

    def publish(done: threading.Event) -> None:
        while not done.is_set():
            try:
                bus.publish(Appeared(bdev="x"))
            except BaseException as error:
                failed.append(error)
                return

    done = threading.Event()
    threads = [threading.Thread(target=publish, args=(done,)) for _ in range(2)]

    async def main() -> None:
        """A short life of a stack."""
        bus.open(asyncio.get_running_loop())
        await asyncio.sleep(0.002)

    asyncio.run(main())
    for thread in threads:
        thread.start()
    for _ in range(20):
        asyncio.run(main())
    done.set()
    for thread in threads:
        thread.join()
    assert failed == []


async def test_what_is_no_event_is_refused_where_it_is_published(stack: Any) -> None:
    for wrong in ("appeared", None, Lost(count=1)):
        with pytest.raises(TypeError, match="must be one of Appeared, Vanished, Resized, Failed, Throttled"):
            stack.bdevs.events.publish(wrong)
    assert await stack.rpc("notify_get_notifications") == []


async def test_any_reason_can_be_read_as_json_and_none_is_endless(stack: Any, server: Any, socket_path: str) -> None:
    reader = stack.events()
    for reason in ("\udcff is no text", "ö" * 100_000, "two\nlines"):
        stack.bdevs.events.publish(Failed(bdev="\udcfe", reason=reason))
    connection = await asyncio.open_unix_connection(socket_path, limit=1 << 20)
    connection[1].write(b'{"jsonrpc":"2.0","id":1,"method":"notify_get_notifications"}')
    answer = json.loads(await asyncio.wait_for(connection[0].readline(), 5))
    connection[1].close()
    reasons = [(await anext(reader)).reason for _ in range(3)]
    assert reasons == ["? is no text", "ö" * (REASON_MAX - 3) + "...", "two\nlines"]
    assert [(entry["ctx"], entry["qpair"]["reason"]) for entry in answer["result"]] == [("?", reason) for reason in reasons]


@pytest.mark.parametrize(
    "params",
    [
        {"id": -1},
        {"id": 2**64},
        {"id": 10**40},
        {"max": 2**64},
        {"max": -1},
        {"id": 1.5},
        {"id": "1"},
        {"id": True},
        {"max": []},
        {"first": 1},
    ],
)
async def test_weird_parameters_are_refused_by_name(stack: Any, params: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameters) as refused:
        await stack.rpc("notify_get_notifications", **params)
    assert next(iter(params)) in str(refused.value)


async def test_the_largest_numbers_are_numbers(stack: Any) -> None:
    await stack.null("n", "1MiB")
    for params, wanted in (
        ({"id": 2**64 - 1, "max": 2**64 - 1}, []),
        ({"max": 0}, []),
        ({"max": 2**64 - 1}, [0]),
        ({"id": 1}, []),
        ({"id": 2**63}, []),
    ):
        assert [entry["id"] for entry in await stack.rpc("notify_get_notifications", **params)] == wanted, params


async def test_limits_below_a_mebibyte_are_told_exactly(stack: Any) -> None:
    await stack.malloc("m", "1MiB")
    reader = stack.events()
    for rates, limit, value in (
        ({"rw_bytes": 512 << 10}, "rw_mbytes_per_sec", 0.5),
        ({"rw_bytes": 0, "w_bytes": 3 << 20}, "w_mbytes_per_sec", 3),
        ({"w_bytes": (1 << 20) + 1}, "w_mbytes_per_sec", ((1 << 20) + 1) / (1 << 20)),
    ):
        await stack.bdevs.measures.set_limits("m", **rates)
        async with await stack.open("m") as disk:
            await asyncio.gather(*(disk.write(0, bytes(32 << 10)) for _ in range(8)))
        event = await asyncio.wait_for(anext(reader), 5)
        assert isinstance(event, Throttled)
        assert (event.limit, event.value, type(event.value)) == (limit, value, type(value))
        reader.close()
        reader = stack.events()
    shown = [entry for entry in await stack.rpc("notify_get_notifications") if entry["type"] == "qpair_bdev_throttled"]
    assert shown[0]["qpair"] == {"limit": "rw_mbytes_per_sec", "value": 0.5}
