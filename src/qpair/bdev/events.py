"""What happens to bdevs, as typed events: for Python (``async for event in stack.events()``) and for JSON-RPC (notify_get_notifications).

How it works: `EventBus.publish` numbers an event, puts it into a ring of the last `KEPT` and into the queue of every reader. It neither waits nor fails, so whoever
has something to tell tells it at once; what the engine tells comes by way of `EventBus.on_engine`. A reader that falls behind loses its oldest events,
and the next thing it reads is a `Lost` that says how many.

The ring has the semantics of SPDK's notifications: ids count from 0 and never come twice, and an id that has left the ring reads as the oldest one there.

Errors: none to publishers, but for what is no event of `TYPES` (`TypeError`). Iteration ends when the stack stops.

Limits: `KEPT` events in the ring, and for each reader; `REASON_MAX` characters of a reason, what is more is cut. A reader that nobody holds any more is forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Self

import msgspec

from qpair.bdev.model import MIB

if TYPE_CHECKING:
    from qpair._engine import BdevEvent

__all__ = ["KEPT", "Appeared", "Event", "EventBus", "EventReader", "Failed", "Lost", "Resized", "Throttled", "Vanished"]

KEPT = 1024
"""As many as SPDK keeps."""
REASON_MAX = 1024
"""Characters: a reason is one sentence, and what a class of a user's raises may be any text."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=str.lower):
    """Something that happened to the bdev of that name. ``id`` and ``time`` (seconds since the epoch) are set by `EventBus.publish`."""

    bdev: str
    id: int = -1
    time: float = 0.0

    notification: ClassVar[str] = ""
    """What notify_get_notifications calls it: SPDK's name, or one of ours with the prefix ``qpair_``."""

    @property
    def kind(self) -> str:
        """ "appeared", "vanished", "resized", "failed", "throttled", "lost"."""
        return type(self).__name__.lower()


class Appeared(Event, frozen=True, kw_only=True):
    """It can be opened."""

    notification: ClassVar[str] = "bdev_register"


class Vanished(Event, frozen=True, kw_only=True):
    """It is gone; the name is free."""

    notification: ClassVar[str] = "bdev_unregister"


class Resized(Event, frozen=True, kw_only=True):
    """It has another size; None when it was gone before that could be asked."""

    size_bytes: int | None = None
    notification: ClassVar[str] = "bdev_resize"


class Failed(Event, frozen=True, kw_only=True):
    """It cannot do what it should: its medium, its base or its worker failed. ``reason`` is one sentence. Told when that begins, not for each I/O that fails of it."""

    reason: str = ""
    notification: ClassVar[str] = "qpair_bdev_failed"


class Throttled(Event, frozen=True, kw_only=True):
    """A limit began to hold I/O back. ``limit``: SPDK's name of it ("rw_ios_per_sec", "w_mbytes_per_sec"); ``value``: its figure in the unit of that name, I/Os or MiB,
    and exact: 0.5 for 524288 bytes, an `int` where it is whole."""

    limit: str = ""
    value: float = 0
    notification: ClassVar[str] = "qpair_bdev_throttled"


class Lost(Event, frozen=True, kw_only=True):
    """This reader was too slow: ``count`` events that came next are not told to it. ``bdev`` is empty."""

    bdev: str = ""
    count: int = 0


TYPES: tuple[type[Event], ...] = (Appeared, Vanished, Resized, Failed, Throttled)


class EventReader(AsyncIterator[Event]):
    """One reader's queue. ``async for``; `close`, ``async with`` or dropping it ends it."""

    def __init__(self, kept: int) -> None:
        self._queue: deque[Event] = deque()
        self._kept = kept
        self._lost = 0
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        """Called by the bus."""
        if self._closed:
            return
        if len(self._queue) >= self._kept:
            self._queue.popleft()
            self._lost += 1
        self._queue.append(event)
        self._wake.set()

    def close(self) -> None:
        """No more events come; those that wait can still be read. Idempotent."""
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        if self._lost:
            count, self._lost = self._lost, 0
            return Lost(count=count, time=time.time())
        return self._queue.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class EventBus:
    """``stack.bdevs.events``: `publish` on one side, `subscribe` and `since` on the other."""

    def __init__(self, *, kept: int = KEPT) -> None:
        self._kept = kept
        self._ring: deque[Event] = deque(maxlen=kept)
        self._next = 0
        self._readers: weakref.WeakSet[EventReader] = weakref.WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on threads other than that of ``loop`` may publish, too."""
        self._loop, self._closed = loop, False

    def close(self) -> None:
        """End every reader's iteration."""
        self._closed = True
        for reader in tuple(self._readers):
            reader.close()

    def publish(self, event: Event) -> None:
        """Tell ``event``. From any thread; it never waits. After `close` nobody hears it."""
        if not isinstance(event, TYPES):
            raise TypeError(f"event is {event!r:.256}, must be one of {', '.join(kind.__name__ for kind in TYPES)}")
        event = _presentable(event)
        if self._loop is not None and _running() is not self._loop:
            with contextlib.suppress(RuntimeError):  # closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._put, event)
            return
        self._put(event)

    def _put(self, event: Event) -> None:
        told = msgspec.structs.replace(event, id=self._next, time=time.time())
        self._next += 1
        self._ring.append(told)
        for reader in tuple(self._readers):
            reader.put(told)

    def on_engine(self, event: BdevEvent, size_bytes: Callable[[str], int | None]) -> None:
        """Tell what the engine told. ``size_bytes(name)`` is asked after a resize."""
        if event.kind == "added":
            self.publish(Appeared(bdev=event.name))
        elif event.kind == "removed":
            self.publish(Vanished(bdev=event.name))
        elif event.kind == "resized":
            self.publish(Resized(bdev=event.name, size_bytes=size_bytes(event.name)))
        elif event.kind == "throttled" and event.limit is not None:
            limit, value = event.limit
            self.publish(Throttled(bdev=event.name, limit=limit, value=_mebibytes(value) if "mbytes" in limit else value))
        elif event.kind == "failed":
            self.publish(Failed(bdev=event.name, reason=event.reason or ""))

    def subscribe(self) -> EventReader:
        """A reader of what comes from now on."""
        reader = EventReader(self._kept)
        if self._closed:
            reader.close()
        self._readers.add(reader)
        return reader

    def since(self, first: int, count: int | None = None) -> list[Event]:
        """At most ``count`` events from id ``first`` on, or from the oldest that is still there."""
        oldest = self._next - len(self._ring)
        start = max(first - oldest, 0)
        if start >= len(self._ring):  # an id may be past what an index can be
            return []
        return list(islice(self._ring, start, None if count is None else start + min(count, len(self._ring))))


def _presentable(event: Event) -> Event:
    """Texts that any reader can be given, also as JSON: a name or a path may hold bytes that are no text."""
    shown = msgspec.structs.replace(event, bdev=_text(event.bdev))
    return msgspec.structs.replace(shown, reason=_text(shown.reason)) if isinstance(shown, Failed) else shown


def _text(given: str) -> str:
    text = given if given.isascii() else given.encode(errors="replace").decode()
    return text if len(text) <= REASON_MAX else f"{text[: REASON_MAX - 3]}..."


def _mebibytes(size: int) -> float:
    """Exact: a power of two only moves the point."""
    whole, rest = divmod(size, MIB)
    return size / MIB if rest else whole


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
