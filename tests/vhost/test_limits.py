"""The largest device there is: 256 queues of 32768 entries, set up over the socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from hostile.front_end import (
    F_INDIRECT,
    F_PROTOCOL,
    F_VERSION_1,
    READ_IN,
    WRITE_OUT,
    FrontEnd,
    Queue,
)

QUEUES, SIZE = 256, 32768
DESC_BYTES, AVAIL_BYTES, USED_BYTES = 16 * SIZE, 2 * SIZE + 4096, 8 * SIZE + 4096
RING_BYTES = DESC_BYTES + AVAIL_BYTES + USED_BYTES
RINGS_AT = 1 << 20
MIB = 1 << 20
MEMORY_MIB_MAX = 64


def own_bytes() -> int:
    """Memory of this process alone: what a session costs, without what it shares with its guest."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


class Largest(FrontEnd):
    def add_queue(self, size: int = SIZE) -> Queue:
        queue = super().add_queue(size)
        queue.desc = RINGS_AT + RING_BYTES * queue.index
        queue.avail = queue.desc + DESC_BYTES
        queue.used = queue.avail + AVAIL_BYTES
        return queue


def play(path: str) -> int:
    """A front end that sets all of it up and asks on the first and on the last queue; how many bytes the session took."""
    with Largest(path, memory_bytes=RINGS_AT + QUEUES * RING_BYTES, timeout_s=60) as front_end:
        front_end.agree(F_PROTOCOL | F_VERSION_1 | F_INDIRECT)
        assert front_end.ask_u64(17) == QUEUES
        assert front_end.table() == 0
        before = own_bytes()
        queues = [front_end.add_queue() for _ in range(QUEUES)]
        for queue in queues:
            assert front_end.start(queue) == 0
        taken = own_bytes() - before
        for number, queue in ((3, queues[0]), (7, queues[-1])):
            status, _ = front_end.io(queue, WRITE_OUT, 8 * number, bytes([number]) * 4096)
            assert status == 0
            # The highest head, too: what is kept of it lies at the end of all.
            front_end.request(queue, READ_IN, 8 * number, 4096, head=SIZE - 3)
            front_end.offer(queue, SIZE - 3)
            assert front_end.take_used(queue)[0] == SIZE - 3
        return taken


async def test_256_queues_of_32768_entries_serve_and_cost_little(stack: Any) -> None:
    await stack.malloc("disk0", "4MiB")
    controller = await stack.vhost.create("largest", "disk0", num_queues=QUEUES)
    taken = await asyncio.to_thread(play, controller.socket)
    print(f"256 queues of 32768 entries: {taken / MIB:.1f} MiB")
    assert taken < MEMORY_MIB_MAX * MIB
