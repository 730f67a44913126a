"""Carries requests from a ring to the methods of one object and back, on an asyncio loop: in the stack's process, and in a worker's."""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from qpair.bdev.python.model import Request

__all__ = ["PythonBdevRunner", "Requests"]

BATCH_MAX = 64
# Batches in one turn of the loop: then others have theirs.
BATCHES_A_TURN = 4
CLOSE_SECONDS = 5.0

logger = logging.getLogger("qpair.bdev")


class Requests(Protocol):
    """A ring, or a worker's end of one."""

    def fetch(self, max_requests: int = 64) -> Sequence[tuple[str, tuple[Request, ...]]]:
        """Requests by operation. Empty: there are none, and the runner will be woken."""

    def finish(self, requests: Sequence[Any], errno: int = 0) -> None:
        """Complete those that are not done."""

    def close(self) -> None:
        """Fail what is under way."""


class PythonBdevRunner:
    """``subscribe(wake)`` has ``wake()`` called on the loop when requests wait, and returns the way to stop that. ``target``: a `qpair.Bdev`, or what has such methods."""

    def __init__(self, name: str, ring: Requests, target: Any, subscribe: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        self.name = name
        self._ring = ring
        self.target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._scheduled = False
        self._unsubscribe = subscribe(self._pump)
        self._pump()  # what came before the subscription

    def _pump(self) -> None:
        """Take some batches; come back in the loop's next turn until there is none (the ring then says again when there is)."""
        self._scheduled = False
        for _ in range(BATCHES_A_TURN):
            if self._closed:
                return
            fetched = self._ring.fetch(BATCH_MAX)
            if not fetched:
                return
            for op, requests in fetched:
                self._serve(op, requests)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _serve(self, op: str, requests: tuple[Request, ...]) -> None:
        try:
            answer = getattr(self.target, op)(requests)
        except Exception as error:
            self._finish(requests, self._errno(op, error))
            return
        if answer is None:
            self._finish(requests, 0)
        elif inspect.isawaitable(answer):
            task = self._loop.create_task(self._wait(op, answer, requests), name=f"bdev {self.name} {op}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._finish(requests, self._errno(op, TypeError(f"{op} must return None or an awaitable, not {type(answer).__name__}")))

    async def _wait(self, op: str, answer: Awaitable[Any], requests: tuple[Request, ...]) -> None:
        code = errno.ECANCELED
        try:
            await answer
            code = 0
        except Exception as error:
            code = self._errno(op, error)
        finally:
            self._finish(requests, code)

    def _errno(self, op: str, error: Exception) -> int:
        logger.error("bdev %s: %s raised %s: %s", self.name, op, type(error).__name__, error, exc_info=error)
        code = error.errno if isinstance(error, OSError) else None
        return code if code is not None and 0 < code < 4096 else errno.EIO

    def _finish(self, requests: Sequence[Request], code: int) -> None:
        try:
            self._ring.finish(requests, code)
        except (ValueError, OSError) as error:
            logger.error("bdev %s: %s", self.name, error)

    def close(self) -> None:
        """The engine has let go of the bdev: cancel what still runs."""
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        for task in self._tasks:
            task.cancel()
        self._ring.close()

    async def finish(self, within_s: float = CLOSE_SECONDS) -> None:
        """As `close`, and wait for the user's coroutines to end; each of the two steps ``within_s``."""
        self.close()
        patience = min(within_s, CLOSE_SECONDS)
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=patience)
        close = getattr(self.target, "close", None)
        if close is not None:
            try:
                if inspect.isawaitable(answer := close()):
                    await asyncio.wait_for(answer, patience)
            except Exception as error:
                logger.error("bdev %s: close raised %s: %s", self.name, type(error).__name__, error, exc_info=error)
