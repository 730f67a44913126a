"""IN_ORDER: a fast answer waits behind a slow one, and what waits is still in flight."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.front_end import DATA_AT, F_PROTOCOL, F_VERSION_1, GET_ID, WRITE_OUT, FrontEnd, Queue
from hostile.process import Serve, until

F_IN_ORDER = 1 << 35
SLOW_US = 400_000
FAST_AT = DATA_AT + 0x2000


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Serve]:
    with Serve(tmp_path) as server:
        server.malloc("ram")
        latencies = dict.fromkeys(("avg_read_latency", "p99_read_latency"), 0) | dict.fromkeys(
            ("avg_write_latency", "p99_write_latency"), SLOW_US
        )
        server.rpc("bdev_delay_create", base_bdev_name="ram", name="slow", **latencies)
        server.export("disk", "slow")
        yield server
        assert server.alive


def ask_two(front_end: FrontEnd, queue: Queue) -> None:
    """A write, which takes its time, and a get-id, which is answered at once."""
    front_end.request(queue, WRITE_OUT, 0, 512, head=0)
    front_end.request(queue, GET_ID, 0, 20, head=3, at=FAST_AT)
    front_end.offer(queue, 0, 3)
    until(lambda: front_end.memory[FAST_AT + 16] == 0, "the get-id is done")


@pytest.mark.parametrize("in_order", [False, True])
def test_answers_come_in_the_order_of_the_requests_where_that_was_chosen(slow: Serve, in_order: bool) -> None:
    with FrontEnd(slow.folder / "disk").ready(features=F_PROTOCOL | F_VERSION_1 | (F_IN_ORDER if in_order else 0)) as front_end:
        [queue] = front_end.queues
        begin = time.monotonic()
        ask_two(front_end, queue)
        first, second = front_end.take_used(queue)[0], front_end.take_used(queue)[0]
        assert (first, second) == ((0, 3) if in_order else (3, 0))
        assert time.monotonic() - begin >= SLOW_US / 1e6
        assert front_end.memory[DATA_AT + 16] == 0


def test_what_is_done_and_waits_for_its_turn_cannot_be_offered_anew(slow: Serve) -> None:
    with FrontEnd(slow.folder / "disk").ready(features=F_PROTOCOL | F_VERSION_1 | F_IN_ORDER) as front_end:
        [queue] = front_end.queues
        ask_two(front_end, queue)
        assert front_end.used_index(queue) == 0
        front_end.offer(queue, 3)
        assert front_end.failed(queue)
        until(lambda: slow.lines("queue 0 failed: .*in flight"), "the log tells of it")


def test_a_ring_that_stops_has_answered_all_of_them(slow: Serve) -> None:
    from hostile.front_end import GET_VRING_BASE

    with FrontEnd(slow.folder / "disk").ready(features=F_PROTOCOL | F_VERSION_1 | F_IN_ORDER) as front_end:
        [queue] = front_end.queues
        ask_two(front_end, queue)
        front_end.ask(GET_VRING_BASE, queue.index.to_bytes(4, "little") + bytes(4))
        assert front_end.used_index(queue) == 2
        assert [front_end.take_used(queue)[0] for _ in range(2)] == [0, 3]
