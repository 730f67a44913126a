"""The vhost-user-blk controllers of one stack: each a device of the engine, a socket and at most one front end.

How it works: a controller's device lives in the engine (`Engine.vhost_blk_create`); this room listens for it, or connects where the front end listens (``client``), and
runs a `Session` a connection. One front end at a
time: a second one, while the first lives, is disconnected at once, so that it fails loudly instead of hanging at start. One that
comes while the first is leaving (QEMU that reconnects, or its successor) waits until the engine has drained the old session.

Errors: `AlreadyExists` (the name, a transport), `NoSuchController`, `Busy` (a front end is connected; somebody listens on the socket), `InvalidArgument` (cpumask,
transport, path, coalescing), what the engine says of the bdev.

Limits: one live session a controller.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from qpair.app.cores import parse_mask
from qpair.app.logs import LineLimit
from qpair.app.passed import PassedSockets
from qpair.app.subsystems import ConfigEntry, Subsystem
from qpair.errors import AlreadyExists, Busy, InvalidArgument, NoSuchController, NoSuchDevice, from_engine
from qpair.vhost.connector import Connector
from qpair.vhost.listener import Listener
from qpair.vhost.model import TRANSPORT, Coalescing, VhostBlkController
from qpair.vhost.transport import Channel

if TYPE_CHECKING:
    from qpair.app.bridge import Bridge
    from qpair.app.stack import Stack
    from qpair.vhost.record import ControllerRecord, Released
    from qpair.vhost.session import Session

__all__ = ["ControllerServer", "VhostSubsystem"]

COALESCING_DELAY_US_MAX = 1_000_000
COALESCING_IOPS_MIN = 100
"""Less is no request in the ten milliseconds over which requests are counted."""

logger = logging.getLogger("qpair.vhost")


class ControllerServer:
    """The socket of one controller, from `start` to `stop`."""

    def __init__(self, bridge: Bridge, controller: str, path: str, *, client: bool = False) -> None:
        self.controller = controller
        self.connector = Connector(path) if client else None
        self.session: Session | None = None
        self._bridge = bridge
        self._lines = LineLimit()  # of all its sessions: a front end may come and go a thousand times a second
        self._listener = Listener(path)
        self._accepting: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None

    def start(self, passed: PassedSockets, *, resumes: bool = False) -> None:
        """Listen, on one of ``passed`` if it has the path, or begin to connect; the errors are those of `Listener.open`. ``resumes``: not before `resume`."""
        if self.connector is None:
            self._listener.open(passed.borrow(self._listener.path))
        if not resumes:
            self._accept()

    @property
    def connected(self) -> bool:
        """A front end is connected, or its session still drains."""
        return self._running is not None and not self._running.done()

    @property
    def in_use(self) -> bool:
        """A front end is connected and has not left."""
        return self.connected and self.session is not None and not self.session.ending

    async def release(self, deadline_s: float) -> ControllerRecord:
        """Accept no more, and bring the session, if there is one, to rest: for another process. `Busy` if it does not come to rest: then nothing has happened."""
        from qpair.vhost.record import ControllerRecord

        await self._accept_no_more()
        released: Released | None = None
        try:
            if self.in_use and self.session is not None and self._running is not None:
                released = await self.session.release(deadline_s)
                await asyncio.wait([self._running])
        except BaseException:
            self._accept()
            raise
        return ControllerRecord(self.controller, self._listener.release(), released)

    async def resume(self, record: ControllerRecord) -> None:
        """Take what `release` gave, of another process or of this: the session has all of it back, but its rings do not run before `Session.start`."""
        if record.listener is not None and self._listener.closed:
            sockets = PassedSockets()
            sockets.inherit(record.listener)
            self.start(sockets, resumes=True)
        if (released := record.session) is not None:
            from qpair.vhost.session import Session

            known = released.record
            channel = Channel(socket.socket(fileno=released.connection.take()), known.unread, known.unread_fds)
            self.session = Session(self._bridge, self.controller, channel, lines=self._lines, record=known)
            self._running = asyncio.create_task(self.session.run(), name=f"vhost session {self.controller}")
            await self.session.restored
        self._accept()

    def disown(self) -> None:
        """The socket's file is somebody else's."""
        self._listener.disown()

    async def _accept_no_more(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])

    def _accept(self) -> None:
        self._accepting = asyncio.create_task(self._front_ends(), name=f"vhost front ends of {self.controller}")

    async def _front_ends(self) -> None:
        if self.connector is None:
            await self._listener.run(self._accepted)
            return
        if self._running is not None:
            self.connector.reason = None
            await asyncio.wait([self._running])
        await self.connector.run(self._connected)

    async def stop(self, reason: str) -> None:
        """Accept no more, remove the socket file, end the session, wait for its drain. In this order: who gives up waiting leaves no file."""
        await self._accept_no_more()
        self._listener.close()
        if self.session is not None and self._running is not None:
            self.session.stop(reason)
            await asyncio.wait([self._running])

    async def _connected(self, connection: socket.socket) -> None:
        await self._accepted(connection)
        if self._running is not None:
            await asyncio.wait([self._running])

    async def _accepted(self, connection: socket.socket) -> None:
        if self.in_use:
            connection.close()
            self._lines.log(
                logger, logging.WARNING, "vhost %s: a second front end was disconnected: the limit is one at a time", self.controller
            )
            return
        if self._running is not None:
            try:
                await asyncio.wait([self._running])
            except BaseException:
                connection.close()
                raise
        # The codecs are only needed by a front end: a server without one answers its first RPC sooner.
        from qpair.vhost.session import Session

        self.session = Session(self._bridge, self.controller, Channel(connection), lines=self._lines)
        self._running = asyncio.create_task(self.session.run(), name=f"vhost session {self.controller}")


class VhostSubsystem(Subsystem):
    """``stack.vhost``."""

    name = "vhost_blk"
    depends_on = ("bdev",)

    def __init__(self) -> None:
        self._stack: Stack | None = None
        self._controllers: dict[str, VhostBlkController] = {}
        self._servers: dict[str, ControllerServer] = {}
        self._busy_names: set[str] = set()
        self._resuming: set[str] = set()

    # -- life -------------------------------------------------------------------------------------

    async def start(self, stack: Stack) -> None:
        """Nothing listens until a controller is made."""
        self._stack = stack

    async def stop(self, stack: Stack, deadline_ms: int) -> None:
        """Disconnect every front end and remove every controller, all at once."""
        deadline = time.monotonic() + deadline_ms / 1000
        names = list(self._controllers)
        results = await asyncio.gather(*(self._remove(name, "the stack stops", deadline) for name in names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, BaseException):
                logger.error("vhost %s: not removed cleanly: %s", name, result)

    def config(self, stack: Stack) -> list[ConfigEntry]:
        entries: list[ConfigEntry] = list(stack.inert.config(self.name))
        for controller in self._controllers.values():
            if self.engine_info(controller.name)["bdev"]:
                entries.extend(controller.config())
        return entries

    @property
    def stack(self) -> Stack:
        """The stack, once started."""
        if self._stack is None:
            raise NoSuchDevice("the vhost_blk subsystem has not started")
        return self._stack

    # -- moving to another process ------------------------------------------------------------------

    async def release(self, deadline_s: float) -> list[ControllerRecord]:
        """Every controller's socket and session, at rest; of those that have a bdev. `Busy` if one does not come to rest: then all go on as before."""
        servers = [server for name, server in self._servers.items() if self.engine_info(name)["bdev"]]
        outcomes = await asyncio.gather(*(server.release(deadline_s) for server in servers), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        records = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        if refused:
            await self.resume(records)
            self.start_sessions()
            raise refused[0]
        return records

    async def resume(self, records: Iterable[ControllerRecord]) -> None:
        """Take what `release` gave; sessions stand still until `start_sessions`."""
        known = [record for record in records if record.controller in self._servers]
        await asyncio.gather(*(self._servers[record.controller].resume(record) for record in known))
        self._resuming.clear()

    def expect(self, records: Iterable[ControllerRecord]) -> None:
        """Controllers of these names, once made, take no front end before `resume`."""
        self._resuming = {record.controller for record in records}

    def disown(self) -> None:
        """The files of the sockets are somebody else's: leave them when this stops."""
        for server in self._servers.values():
            server.disown()

    def start_sessions(self) -> None:
        """Rings that were taken over may run."""
        for server in self._servers.values():
            if server.session is not None:
                server.session.start()

    # -- finding ----------------------------------------------------------------------------------

    def controllers(self) -> list[VhostBlkController]:
        """All, in order of creation."""
        return list(self._controllers.values())

    def has(self, name: str) -> bool:
        """A controller of that name exists."""
        return self._key(name) in self._controllers

    def controller(self, name: str) -> VhostBlkController:
        """By name, or by its socket's path; `NoSuchController`."""
        found = self._controllers.get(self._key(name))
        if found is None:
            raise NoSuchController(f"no vhost controller is named {name!r:.256}")
        return found

    def engine_info(self, name: str) -> dict[str, Any]:
        """The engine's dict of one controller."""
        return self.stack.engine.vhost_blk_info(self._key(name))[0]

    def _key(self, name: str) -> str:
        """A path inside the vhost directory names the same controller as its last part does, as SPDK has it."""
        prefix = os.path.join(self.stack.vhost_dir, "")
        return name.removeprefix(prefix)

    # -- making -----------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        bdev: str,
        *,
        cpumask: str | None = None,
        reactors: Iterable[int] | None = None,
        readonly: bool = False,
        num_queues: int = 16,
        packed_ring: bool = False,
        client: bool = False,
        transport: str = TRANSPORT,
    ) -> VhostBlkController:
        """Export ``bdev`` on the socket ``name`` (relative: in the vhost directory). ``cpumask``: "0x3" or "[0,1]"; default all reactors.
        ``client``: the front end listens there, and is connected to whenever it does."""
        stack = self.stack
        self.transport(transport)
        key = self._key(name)
        if not key or not key.isprintable():
            raise InvalidArgument(f"controller name {name!r:.64} is empty or holds what cannot be printed")
        lcores = self._reactors(cpumask, reactors)
        if key in self._controllers or key in self._busy_names:
            raise AlreadyExists(f"a vhost controller is already named {key!r:.256}")
        path = os.path.join(stack.vhost_dir, key)
        controller = VhostBlkController(key, stack.bdevs.info(bdev).name, path, lcores, readonly, packed_ring, num_queues, client, self)
        self._busy_names.add(key)
        try:
            await self._bring_up(controller)
        finally:
            self._busy_names.discard(key)
        logger.info("vhost %s: bdev %s on %s", key, controller.bdev, path)
        return controller

    async def _bring_up(self, controller: VhostBlkController) -> None:
        engine, bridge, name = self.stack.engine, self.stack.bridge, controller.name
        try:
            token = engine.vhost_blk_create(
                name,
                controller.bdev,
                reactors=controller.reactors,
                readonly=controller.readonly,
                num_queues=controller.num_queues,
                packed_ring=controller.packed_ring,
            )
        except OSError as error:
            raise from_engine(error) from error

        def undo(_: object) -> None:
            bridge.call(engine.vhost_blk_delete(name))

        await bridge.call(token, unclaimed=undo)
        try:
            server = ControllerServer(bridge, name, controller.socket, client=controller.client)
            server.start(self.stack.passed_sockets, resumes=name in self._resuming)
        except BaseException:
            await bridge.call(engine.vhost_blk_delete(name))
            raise
        self._controllers[name] = controller
        self._servers[name] = server

    def _reactors(self, cpumask: str | None, reactors: Iterable[int] | None) -> tuple[int, ...]:
        stack = self.stack
        if cpumask is not None and reactors is not None:
            raise InvalidArgument("cpumask and reactors: give one of them")
        chosen = parse_mask(cpumask) if cpumask is not None else sorted(set(reactors or stack.cores))
        if outside := [core for core in chosen if core not in stack.cores]:
            raise InvalidArgument(f"cpumask names core {outside[0]}, the stack's reactors run on {list(stack.cores)}")
        return tuple(chosen)

    async def export(self, stack: Stack, bdev: str, socket_path: str, **options: Any) -> VhostBlkController:
        """What `Stack.export` calls. Options: ``cpumask, reactors, readonly, num_queues, packed_ring, client``."""
        return await self.create(socket_path, bdev, **options)

    async def delete(self, name: str, *, force: bool = False, deadline_ms: int = 10_000) -> None:
        """Remove a controller. `Busy` with a front end connected, unless ``force``; one that has left is waited for."""
        controller = self.controller(name)
        if not force and self._servers[controller.name].in_use:
            raise Busy(f"vhost controller {controller.name!r:.256}: a front end is connected")
        await self._remove(controller.name, "the controller was deleted", time.monotonic() + deadline_ms / 1000)

    async def _remove(self, name: str, reason: str, deadline: float) -> None:
        server = self._servers.pop(name)
        del self._controllers[name]
        self._busy_names.add(name)
        try:
            await server.stop(reason)
            left_ms = max(100, int((deadline - time.monotonic()) * 1000))
            await self.stack.bridge.call(self.stack.engine.vhost_blk_delete(name, deadline_ms=left_ms))
        finally:
            self._busy_names.discard(name)

    # -- changing ---------------------------------------------------------------------------------

    async def set_coalescing(self, name: str, delay_base_us: int, iops_threshold: int) -> None:
        """Hold interrupts back, the longer the more a queue answers beyond ``iops_threshold`` requests a second; a delay of 0: not at all."""
        controller = self.controller(name)
        if delay_base_us > COALESCING_DELAY_US_MAX:
            raise InvalidArgument(f"delay_base_us is {delay_base_us}, the limit is {COALESCING_DELAY_US_MAX}")
        if iops_threshold < COALESCING_IOPS_MIN:
            raise InvalidArgument(f"iops_threshold is {iops_threshold}, it must be at least {COALESCING_IOPS_MIN}")
        await self._change(self.stack.engine.vhost_blk_set_coalescing, controller.name, delay_base_us, iops_threshold)
        controller.coalescing = Coalescing(delay_base_us, iops_threshold)

    async def set_reactors(self, name: str, *, cpumask: str | None = None, reactors: Iterable[int] | None = None) -> None:
        """Move a controller's queues to other reactors, also those of a live session, which goes on there."""
        controller = self.controller(name)
        lcores = self._reactors(cpumask, reactors)
        await self._change(self.stack.engine.vhost_blk_set_reactors, controller.name, lcores)
        controller.reactors = lcores

    async def _change(self, call: Callable[..., int], *args: Any) -> None:
        try:
            token = call(*args)
        except OSError as error:
            raise from_engine(error) from error
        await self.stack.bridge.call(token)

    def connection(self, name: str) -> str | None:
        """Of a controller that connects: why there is no connection, or None."""
        connector = self._servers[self.controller(name).name].connector
        return connector.reason if connector is not None else None

    # -- transports -------------------------------------------------------------------------------

    def transports(self) -> list[str]:
        """The transports of virtio-blk: vhost-user, which is always there."""
        return [TRANSPORT]

    def transport(self, name: str) -> str:
        """By name, in capitals or not; `InvalidArgument`."""
        if name.lower() not in self.transports():
            raise InvalidArgument(f"transport {name!r:.64} is unknown, the only one is {TRANSPORT!r}")
        return name.lower()
