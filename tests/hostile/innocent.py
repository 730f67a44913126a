"""A well-behaved disk beside the victims: a front end in a thread that writes, reads back and compares all the time, and times its answers."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Self

from hostile.front_end import READ_IN, WRITE_OUT, FrontEnd

BLOCKS = 64
BLOCK_BYTES = 4096


class Innocent:
    """Runs from entering to leaving; `check` raises what went wrong so far."""

    def __init__(self, path: Path) -> None:
        self.front_end = FrontEnd(path, name="innocent").ready()
        self.ios = 0
        self.longest_s = 0.0
        self.problem: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="innocent")

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.problem = error

    def _work(self) -> None:
        rng, content = random.Random(7), {}
        queue = self.front_end.queues[0]
        while not self._stopping.is_set():
            block = rng.randrange(BLOCKS)
            before = time.monotonic()
            if block in content and rng.random() < 0.6:
                status, data = self.front_end.io(queue, READ_IN, 8 * block, BLOCK_BYTES)
                assert status == 0, f"status {status} of a read of block {block}"
                assert data == content[block], f"block {block} reads other bytes than were written"
            else:
                content[block] = rng.randbytes(BLOCK_BYTES)
                status, _ = self.front_end.io(queue, WRITE_OUT, 8 * block, content[block])
                assert status == 0, f"status {status} of a write of block {block}"
            self.longest_s = max(self.longest_s, time.monotonic() - before)
            self.ios += 1
            time.sleep(0.0005)

    def check(self, *, longest_s: float = 5.0) -> None:
        """It goes on without an error, and no answer took longer than ``longest_s``."""
        before, end = self.ios, time.monotonic() + longest_s
        while self.problem is None and self.ios < before + 3:
            assert time.monotonic() < end, f"the innocent disk is stuck: no answer within {longest_s} s"
            time.sleep(0.005)
        if self.problem is not None:
            raise AssertionError("the innocent disk failed") from self.problem
        assert self.longest_s < longest_s

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30)
        self.front_end.close()
