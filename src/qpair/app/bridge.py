"""Between the engine and asyncio: one reader of ``Engine.event_fd`` that hands each event to whoever waits for it.

How it works: an engine call returns a token; `Bridge.call` gives a future for it. `Bridge` takes one batch of events a turn of the loop
(the fd is level-triggered, so the rest comes in the next turn and other tasks are not starved), resolves futures, tells subscribers,
and renders the engine's log through ``logging`` as ``qpair.<component>``.

Errors: a reply with an error raises the mapped `qpair.errors.QpairError`. A subscriber that raises is logged; the others are still told.
After `close` every waiting future raises `StackStopped`.

Limits: 4096 replies that nobody has asked for yet are kept; the oldest is then dropped with a warning.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qpair.errors import StackStopped, from_engine

if TYPE_CHECKING:
    from qpair._engine import BdevEvent, Engine, IoTimeout, LogEvent, Reply, SessionEvent

__all__ = ["Bridge"]

_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
_UNCLAIMED_MAX = 4096
_EVENTS_PER_TURN = 256

logger = logging.getLogger("qpair.app")


class Bridge:
    """Owns the reading of one engine's events on the running asyncio loop. Not thread-safe: use it on its loop only."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, tuple[asyncio.Future[Any], Callable[[Any], None] | None]] = {}
        self._unclaimed: dict[int, Reply] = {}
        self._bdev: list[Callable[[BdevEvent], None]] = []
        self._session: list[Callable[[SessionEvent], None]] = []
        self._work: dict[int, Callable[[], None]] = {}
        self._timeouts: dict[int, Callable[[IoTimeout], None]] = {}
        self._workers: dict[int, Callable[[int, str], None]] = {}
        self._closed = False
        # By name, so that importing this module does not load the compiled engine.
        self._handlers: dict[str, Callable[[Any], None]] = {
            "Reply": self._on_reply,
            "BdevEvent": self._on_bdev,
            "SessionEvent": self._on_session,
            "LogEvent": self._on_log,
            "PythonBdevWork": self._on_work,
            "PythonWorkerDown": self._on_worker_down,
            "IoTimeout": self._on_timeout,
        }

    def start(self) -> None:
        """Begin reading on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.engine.event_fd, self._turn)

    def close(self) -> None:
        """Take what is left, then fail every future that still waits with `StackStopped`. Idempotent."""
        if self._closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(self.engine.event_fd)
        while self.drain():
            pass
        self._closed = True
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(StackStopped("the stack stopped before the engine answered"))
                future.exception()  # a caller that is gone must not provoke "exception was never retrieved"
        self._waiting.clear()
        self._unclaimed.clear()

    def call(self, token: int, *, unclaimed: Callable[[Any], None] | None = None) -> asyncio.Future[Any]:
        """``value = await bridge.call(engine.bdev_open("disk0"))``. Registered at once, so it may be awaited later.

        ``unclaimed(value)`` runs for a value that arrives after the waiter was cancelled (a file descriptor to close)."""
        loop = self._loop or asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._closed:
            future.set_exception(StackStopped("the stack is stopped"))
            return future
        self._waiting[token] = (future, unclaimed)
        if (reply := self._unclaimed.pop(token, None)) is not None:
            self._on_reply(reply)
        return future

    def subscribe_bdev(self, callback: Callable[[BdevEvent], None]) -> Callable[[], None]:
        """``callback(event)`` on the loop for each `BdevEvent`. Returns the way to stop it."""
        return _subscribe(self._bdev, callback)

    def subscribe_session(self, callback: Callable[[SessionEvent], None]) -> Callable[[], None]:
        """``callback(event)`` on the loop for each `SessionEvent` of any session. Returns the way to stop it."""
        return _subscribe(self._session, callback)

    def subscribe_work(self, ring: int, callback: Callable[[], None]) -> Callable[[], None]:
        """``callback()`` on the loop when the ring of Python bdev ``ring`` has requests. One callback a ring."""
        self._work[ring] = callback
        return lambda: self._work.pop(ring, None) and None

    def subscribe_timeout(self, descriptor: int, callback: Callable[[IoTimeout], None]) -> Callable[[], None]:
        """``callback(event)`` on the loop for each I/O of an open descriptor that takes too long. One callback a descriptor."""
        self._timeouts[descriptor] = callback
        return lambda: self._timeouts.pop(descriptor, None) and None

    def subscribe_worker(self, link: int, callback: Callable[[int, str], None]) -> Callable[[], None]:
        """``callback(number, reason)`` on the loop when the engine severed a worker of that link. One callback a link."""
        self._workers[link] = callback
        return lambda: self._workers.pop(link, None) and None

    def drain(self) -> int:
        """Hand out one batch of events now; the number of them."""
        events = self.engine.events(_EVENTS_PER_TURN)
        for event in events:
            handler = self._handlers.get(type(event).__name__)
            if handler is None:
                logger.error("the engine sent an event of unknown type %s", type(event).__name__)
                continue
            try:
                handler(event)
            except Exception:
                logger.exception("a subscriber of %s failed", type(event).__name__)
        return len(events)

    def _turn(self) -> None:
        self.drain()

    def _on_reply(self, reply: Reply) -> None:
        waiter = self._waiting.pop(reply.token, None)
        if waiter is None:
            self._unclaimed[reply.token] = reply
            if len(self._unclaimed) > _UNCLAIMED_MAX:
                oldest = next(iter(self._unclaimed))
                del self._unclaimed[oldest]
                logger.warning("nobody asked for the reply to token %d: dropped (limit %d)", oldest, _UNCLAIMED_MAX)
            return
        future, unclaimed = waiter
        if future.done():
            if unclaimed is not None and reply.error is None:
                unclaimed(reply.value)
        elif reply.error is not None:
            error = from_engine(reply.error)
            error.__cause__ = reply.error
            future.set_exception(error)
        else:
            future.set_result(reply.value)

    def _on_bdev(self, event: BdevEvent) -> None:
        _tell(self._bdev, event)

    def _on_session(self, event: SessionEvent) -> None:
        _tell(self._session, event)

    def _on_work(self, event: Any) -> None:
        if (callback := self._work.get(event.ring)) is not None:
            callback()

    def _on_worker_down(self, event: Any) -> None:
        if (callback := self._workers.get(event.link)) is not None:
            callback(event.number, event.reason)

    def _on_timeout(self, event: IoTimeout) -> None:
        if (callback := self._timeouts.get(event.descriptor)) is not None:
            callback(event)

    def _on_log(self, event: LogEvent) -> None:
        target = logging.getLogger(f"qpair.{event.component}")
        if event.suppressed:
            target.warning("%d messages before this one were dropped by the rate limit", event.suppressed)
        target.log(_LEVELS.get(event.level, logging.ERROR), "%s", event.message)


def _subscribe(callbacks: list[Any], callback: Any) -> Callable[[], None]:
    callbacks.append(callback)

    def stop() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return stop


def _tell(callbacks: list[Any], event: Any) -> None:
    for callback in tuple(callbacks):
        try:
            callback(event)
        except Exception:
            logger.exception("a subscriber of %s failed", type(event).__name__)
