"""A thread with an asyncio loop of its own, on which other threads have work done and wait for it.

How it works: `ControlThread.run` hands a coroutine to the loop and waits for what it returns. An interrupt of the waiting thread (Ctrl-C) cancels the work, waits up to
`CANCEL_S` seconds until it has ended, and is raised.

Errors: those of the work; `StackStopped` after `end`, also to those who wait meanwhile; `ForkedStack` in a forked child, where the thread does not exist; `Busy` on
the thread itself, which would wait for itself.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from qpair.errors import Busy, ForkedStack, StackStopped

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["ControlThread"]

CANCEL_S = 15.0

T = TypeVar("T")


class ControlThread:
    """A thread and its loop, from construction to `end`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._ended = False
        self._retiring: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._main, name="qpair-control", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        loop = self.loop
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            self._ended = True
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def end(self) -> None:
        """Cancel what still runs, and wait for the thread. Idempotent."""
        if not self._ended and os.getpid() == self._pid:
            self._post(self.loop.stop)
            self._thread.join()

    def abandon(self, stack: Stack) -> None:
        """Stop ``stack``, then the loop, without anybody waiting."""

        async def retire() -> None:
            try:
                await stack.stop()
            finally:
                self.loop.stop()

        def begin() -> None:
            self._retiring = self.loop.create_task(retire())  # the loop itself holds its tasks weakly

        self._post(begin)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns, having run on the loop."""
        try:
            self.check()
            outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
            tasks: list[asyncio.Task[T]] = []

            def begin() -> None:
                tasks.append(self.loop.create_task(work))
                tasks[0].add_done_callback(lambda task: _pass_on(task, outcome))

            self._post(begin)
        except BaseException:
            work.close()
            raise
        try:
            return outcome.result()
        except concurrent.futures.CancelledError:
            raise StackStopped("the stack stopped before this call was done") from None
        except BaseException:
            if not outcome.done():  # an interrupt of this thread, not an error of the work
                self._post(lambda: tasks[0].cancel())
                concurrent.futures.wait([outcome], CANCEL_S)
            raise

    def call(self, function: Callable[[], T]) -> T:
        """What a plain ``function`` returns, having run on the loop."""

        async def work() -> T:
            return function()

        return self.run(work())

    def check(self) -> None:
        """Whether work can be handed over from here; the errors are those of the module."""
        if os.getpid() != self._pid:
            raise ForkedStack(f"this stack belongs to process {self._pid}, of which this one is a fork; start a new stack")
        if self._ended:
            raise StackStopped("the stack is stopped")
        if threading.current_thread() is self._thread:
            raise Busy("a blocking call on the stack's control thread would wait for itself; use the async API there")

    def _post(self, callback: Callable[[], object]) -> None:
        try:
            self.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            raise StackStopped("the stack is stopped") from None


def _pass_on(task: asyncio.Task[T], outcome: concurrent.futures.Future[T]) -> None:
    if task.cancelled():
        outcome.cancel()
        outcome.set_running_or_notify_cancel()
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())
