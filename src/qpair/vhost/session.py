"""One connection of a front end: messages in order, each a call of the engine, each answered when the engine has.

The vhost-user protocol; `qpair.vhost.protocol` holds its rules, this file moves bytes and waits.

How it works: `Session.run` opens a session of the engine, then reads one message, has `BackendProtocol` check it, calls the engine, waits for
its reply, answers, and only then reads the next. When the loop ends, for whatever reason, the engine's session is closed first (it drains every ring and lets
go of all memory) and the socket after it, because a front end that sees the socket closed may give its memory to somebody else.

A session can move to another process (`qpair.app.takeover`): `release` lets the message under way be answered, stops the rings without ending anything, closes the
engine's session, and gives a `Released`: what the front end told so far, and the connection. A session made from that has all of it back before `restored` is set, and starts its
rings when `start` is called. If the rings do not become quiet in time, this session goes on as if nothing had been asked.

Errors: none leave `run`. The end of a session is one line in the log: the peer left, the peer broke the protocol, the engine refused,
the engine ended the session, or somebody stopped it. A failed queue is one line too. ``lines`` limits them a second.

Limits: closing waits ``close_deadline_ms`` for requests in flight, then they are aborted.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from qpair.app.logs import LineLimit
from qpair.app.parcel import Descriptor
from qpair.errors import Busy, QpairError, from_engine
from qpair.vhost.backend_requests import BackendChannel
from qpair.vhost.framing import ProtocolError
from qpair.vhost.messages import SetBackendReqFd
from qpair.vhost.protocol import BackendProtocol, Command, Refused
from qpair.vhost.record import MemoryRecord, Released, SessionRecord
from qpair.vhost.transport import Channel, Received, close_all

if TYPE_CHECKING:
    from qpair._engine import BdevEvent, SessionEvent
    from qpair.app.bridge import Bridge

__all__ = ["Session"]

PATIENCE_MS = 24 * 3600 * 1000
"""Requests of a ring that stops to go on elsewhere are not ended early."""

# These methods of the engine answer at once; all others return a token.
_IMMEDIATE = frozenset({"vhost_get_config"})

logger = logging.getLogger("qpair.vhost")


class Session:
    """One connection to controller ``controller``. ``channel`` becomes the session's."""

    def __init__(
        self,
        bridge: Bridge,
        controller: str,
        channel: Channel,
        *,
        close_deadline_ms: int = 10_000,
        lines: LineLimit | None = None,
        record: SessionRecord | None = None,
    ) -> None:
        self.controller = controller
        self.channel = channel
        self.id: int | None = None
        self.reason: str | None = None
        """Why it ended; None while it lives."""
        self._bridge = bridge
        self._close_deadline_ms = close_deadline_ms
        self._lines = LineLimit() if lines is None else lines
        self._serving: asyncio.Task[None] | None = None
        self._memory_fds: list[int] = []
        self._record = SessionRecord() if record is None else record
        self.restored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the engine has taken what another process's session left, if there is such; or what it said against it."""
        self._start = asyncio.Event()
        if record is None:
            self._start.set()
        self._protocol: BackendProtocol
        self._receiving: asyncio.Task[Received | None] | None = None
        self._releasing: asyncio.Future[Released] | None = None
        self._bdev: str | None = None
        self._backend: BackendChannel | None = None
        self._failed: str | None = None
        self._stopped: str | None = None

    @property
    def ending(self) -> bool:
        """It has ended, is ending, or will as soon as its task runs: a new connection need not be refused for it."""
        return self.reason is not None or self._failed is not None or self._stopped is not None or self.channel.hung_up

    def stop(self, reason: str) -> None:
        """End it. `run` returns after the drain."""
        self._stopped = reason
        if self._serving is not None:
            self._serving.cancel()

    def start(self) -> None:
        """Rings that ran in another process may run here now."""
        self._start.set()

    async def release(self, deadline_s: float) -> Released:
        """Leave off between two messages, with all rings quiet; `run` ends then. `Busy` if they are not in time: it goes on as soon as they are; or if it ends."""
        if self._serving is None or self._releasing is not None or self.ending:
            raise Busy(f"vhost {self.controller}: its session cannot be released now")
        self._releasing = asyncio.get_running_loop().create_future()
        if self._receiving is not None:
            self._receiving.cancel()
        try:
            return await asyncio.wait_for(self._releasing, deadline_s)
        except TimeoutError:
            raise Busy(f"vhost {self.controller}: requests in flight were not done within {deadline_s:g} s") from None

    async def run(self) -> None:
        """Serve until the end, then drain and close; or until released."""
        unsubscribe = (self._bridge.subscribe_session(self._on_event), self._bridge.subscribe_bdev(self._on_bdev))
        try:
            self._serving = asyncio.create_task(self._serve(), name=f"vhost {self.controller}")
            if self._stopped is not None:
                self._serving.cancel()
            await asyncio.wait([self._serving])
            self._log_end(self._serving)
            await self._close_engine_session()
        finally:
            for stop in unsubscribe:
                stop()
            if self._backend is not None:
                self._backend.close()
            if self._serving is not None:
                self._serving.cancel()  # only if this task itself was cancelled is there anything to cancel
            self.channel.close()
            self._record = SessionRecord()  # its descriptors are closed now, unless they have moved
            memory_fds, self._memory_fds = self._memory_fds, []
            close_all(memory_fds)
            for asked in (self.restored, self._releasing):
                if asked is not None and not asked.done():
                    asked.set_exception(Busy(f"vhost {self.controller}: its session ended: {self.reason}"))
                    asked.exception()  # nobody need have asked

    async def _serve(self) -> None:
        await self._open()
        while True:
            await self._start.wait()
            for name, args in self._record.start_calls():
                await self._call(name, args)
            while self._releasing is None and (received := await self._next()) is not None:
                with received:
                    command = self._protocol.handle(received.frame)
                    logger.debug("vhost %s: %s", self.controller, command.message)
                    await self._answer(self._protocol, command, received)
            if self._releasing is None or await self._hand_over(self._releasing):
                return
            self._releasing = None

    async def _open(self) -> None:
        """A session of the engine's, with all that the record has but its rings' start."""
        engine = self._bridge.engine
        try:
            opening = engine.vhost_session_open(self.controller)
            info = engine.vhost_blk_info(self.controller)[0]
        except OSError as error:
            raise from_engine(error) from error
        self._bdev = info["bdev"]
        self.id = await self._bridge.call(opening, unclaimed=self._abandon)
        self._protocol = BackendProtocol(device_features=info["device_features"], num_queues=info["num_queues"])
        fresh = self._start.is_set()
        for name, args in self._record.restore_calls():
            await self._call(name, args)
        if (known := self._record.backend) is not None:
            self._backend = BackendChannel(known.connection.take(), self._on_backend_channel, known.rest)
        self._protocol.resume(self._record)
        self._memory_fds = sorted(fd for _, fd in self._protocol.memory)
        self.restored.set_result(None)
        came = "a front end connected" if fresh else "a front end was taken over"
        self._lines.log(logger, logging.INFO, "vhost %s: %s (session %s)", self.controller, came, self.id)

    async def _next(self) -> Received | None:
        """The next message; None: the front end left, or `release` was called."""
        self._receiving = asyncio.create_task(self.channel.receive())
        try:
            return await self._receiving
        except asyncio.CancelledError:
            if self._releasing is None or (task := asyncio.current_task()) is None or task.cancelling():
                raise
            return None
        finally:
            self._receiving = None

    async def _hand_over(self, asked: asyncio.Future[Released]) -> bool:
        """Stop the rings, and give away what there is; False: whoever asked waits no longer. Nothing in flight is ended early, however long it takes."""
        for index in self._record.running():
            self._record.rings[index].base = await self._call("vhost_get_vring_base", (index,), deadline_ms=PATIENCE_MS)
        if asked.done():
            return False
        record = self._record
        record.memory = [MemoryRecord(Descriptor.duplicate(fd), *astuple(region)) for region, fd in self._protocol.memory]
        record.backend = self._backend.record() if self._backend is not None else None
        record.unread, record.unread_fds = self.channel.take_unread()
        self._stopped = "it was released"
        asked.set_result(Released(self.channel.duplicate(), record))
        return True

    async def _answer(self, protocol: BackendProtocol, command: Command, received: Received) -> None:
        try:
            value = await self._execute(command)
            if command.memory is not None:
                self._keep_memory(protocol, command, received)
            elif isinstance(command.message, SetBackendReqFd):
                self._keep_backend_channel(received)
            self._record.note(command.message, value, received.take)
            answer = protocol.answer(command, value)
        except (QpairError, Refused) as error:
            answer = protocol.refuse(command, error.errno)
            if answer is None:
                raise
            self._lines.log(logger, logging.WARNING, "vhost %s: %s refused: %s", self.controller, command.name, error)
        if answer is not None:
            try:
                await self.channel.send(answer.data, answer.fds)
            finally:
                close_all(answer.fds)

    def _keep_memory(self, protocol: BackendProtocol, command: Command, received: Received) -> None:
        """The descriptors of guest memory stay open, for the table that a later message makes."""
        assert command.memory is not None
        dropped = protocol.replace_memory(command)
        wanted = {fd for _, fd in command.memory}
        for index, fd in enumerate(received.frame.fds):
            if fd in wanted:
                received.take(index)
        self._memory_fds = sorted(wanted)
        close_all(dropped)

    def _keep_backend_channel(self, received: Received) -> None:
        """Later ones replace earlier ones."""
        channel = BackendChannel.of(received.frame.fds[0], self._on_backend_channel)
        received.take()
        if self._backend is not None:
            self._backend.close()
        self._backend = channel

    async def _execute(self, command: Command) -> Any:
        if command.refused is not None:
            raise command.refused
        return None if command.call is None else await self._call(command.call, command.args)

    async def _call(self, name: str, args: tuple[Any, ...], **options: Any) -> Any:
        try:
            result = getattr(self._bridge.engine, name)(self.id, *args, **options)
        except OSError as error:
            raise from_engine(error) from error
        if name in _IMMEDIATE:
            return result
        unclaimed = _close_reply if name == "vhost_get_inflight_fd" else None
        return await self._bridge.call(result, unclaimed=unclaimed)

    async def _close_engine_session(self) -> None:
        closing, self.id = self.id, None
        if closing is None:
            return
        try:
            await self._bridge.call(self._bridge.engine.vhost_session_close(closing, deadline_ms=self._close_deadline_ms))
        except (QpairError, OSError) as error:
            logger.error("vhost %s: session %s did not close cleanly: %s", self.controller, closing, error)

    def _abandon(self, session: int) -> None:
        """The engine opened a session whose task was cancelled meanwhile."""
        self._bridge.call(self._bridge.engine.vhost_session_close(session, deadline_ms=self._close_deadline_ms))

    def _on_event(self, event: SessionEvent) -> None:
        if event.session != self.id:
            return
        if event.kind == "queue_failed" and event.queue is not None:
            self._lines.log(logger, logging.WARNING, "vhost %s: queue %s failed: %s", self.controller, event.queue, event.reason)
            self._record.ring(event.queue).failed = True
        else:
            self._failed = event.reason
            if self._serving is not None:
                self._serving.cancel()

    def _on_bdev(self, event: BdevEvent) -> None:
        if self._backend is not None and event.kind == "resized" and event.name == self._bdev:
            self._backend.config_changed()

    def _on_backend_channel(self, what: str) -> None:
        self._lines.log(logger, logging.WARNING, "vhost %s: the front end cannot be told of a change: %s", self.controller, what)

    def _log_end(self, serving: asyncio.Task[None]) -> None:
        error = None if serving.cancelled() else serving.exception()
        level = logging.WARNING
        if self._failed is not None:
            self.reason = f"the engine ended it: {self._failed}"
        elif self._stopped is not None:
            self.reason, level = self._stopped, logging.INFO
        elif error is None:
            self.reason, level = "the front end left", logging.INFO
        elif isinstance(error, ProtocolError):
            self.reason = f"the front end broke the protocol: {error}"
        elif isinstance(error, QpairError | Refused):
            self.reason = f"refused: {error}"
        elif isinstance(error, OSError):
            self.reason = f"the connection failed: {error.strerror or error}"
        else:
            self.reason = f"internal error: {error!r}"
            logger.error("vhost %s: internal error", self.controller, exc_info=error)
        self._lines.log(logger, level, "vhost %s: session %s ended: %s", self.controller, self.id, self.reason)


def _close_reply(value: tuple[int, int, int]) -> None:
    close_all(value[:1])
