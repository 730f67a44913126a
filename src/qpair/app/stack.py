"""The stack: one engine, its bridge, and the subsystems that live on it.

How it works: `Stack` is an asynchronous context manager. Entering starts the reactors, then (unless ``wait_for_rpc``) the subsystems in the order of
their dependencies; leaving stops front ends, bdevs and reactors, in the reverse order, each with a deadline. States: ``new``, ``startup``, ``runtime``,
``stopping``, ``stopped``.

Errors: whatever a subsystem's start raises, after those already started are stopped again; `StackStopped` once stopped; `ForkedStack` in a forked child,
where no reactor exists.

Limits: a subsystem that does not stop within its share of ``stop_deadline_ms`` is abandoned, by name, in the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Self

from qpair.app.bridge import Bridge
from qpair.app.cores import check_usable, parse_cores
from qpair.app.inert import InertStore
from qpair.app.parcel import Descriptor
from qpair.app.passed import PassedRecord, PassedSockets
from qpair.app.rooms import make_subsystems
from qpair.app.subsystems import ConfigEntry, Subsystem, order
from qpair.bdev.trace import Trace, Tracing
from qpair.errors import Busy, ForkedStack, NoSuchDevice, StackStopped, from_engine

if TYPE_CHECKING:
    from qpair._engine import Engine
    from qpair.bdev.client import BdevHandle, OpenBdev
    from qpair.bdev.control import BdevSubsystem
    from qpair.bdev.events import EventReader
    from qpair.bdev.filter import Filter
    from qpair.bdev.perf import PerfResult, PerfRun
    from qpair.bdev.python import Bdev
    from qpair.rpc.http import HttpServer
    from qpair.rpc.server import RpcServer
    from qpair.vhost.control import VhostSubsystem
    from qpair.virtio.control import VirtioSubsystem

__all__ = ["Stack"]

State = Literal["new", "startup", "runtime", "stopping", "stopped"]
EngineFactory = Callable[..., "Engine"]

logger = logging.getLogger("qpair.app")


class Stack:
    """``async with qpair.Stack(cores="0") as stack:`` a running stack.

    ``cores``: "0", "0,2-3", "0x3", a number or numbers: one reactor each. ``driver``: "auto", "io_uring" or "epoll". ``busy_poll``: reactors never
    sleep. ``spin_us``: how long an idle poller spins before it sleeps. ``vhost_dir``: where vhost sockets with relative names go.
    ``wait_for_rpc``: stay in the startup state until `start_subsystems` (``framework_start_init``).
    """

    bdevs: BdevSubsystem
    vhost: VhostSubsystem
    virtio: VirtioSubsystem

    def __init__(
        self,
        *,
        cores: str | int | Iterable[int] = "0",
        driver: Literal["auto", "io_uring", "epoll"] = "auto",
        busy_poll: bool = False,
        spin_us: int = 50,
        pin: bool = True,
        vhost_dir: str | os.PathLike[str] = ".",
        wait_for_rpc: bool = False,
        stop_deadline_ms: int = 10_000,
        engine_factory: EngineFactory | None = None,
    ) -> None:
        self.state: State = "new"
        self.cores = parse_cores(cores)
        self.vhost_dir = os.path.abspath(os.fspath(vhost_dir))
        self.inert = InertStore()
        self.passed_sockets = PassedSockets()
        """Listening sockets that somebody else opened, for whoever is to listen on their paths."""
        self.inherited_memory: dict[str, Descriptor] = {}
        """What malloc bdevs held in the process whose place this one takes, by their names, until they are made."""
        self.takeover: Callable[[str, list[int]], Awaitable[None]] | None = None
        """Set by ``qpair serve``: what ``qpair_takeover`` calls with a socket's path and protocol versions."""
        self.tracing = Tracing(self)
        self.stop_deadline_ms = stop_deadline_ms
        self.stop_requested: Callable[[str], None] | None = None
        """Set by ``qpair serve``: what ``spdk_kill_instance`` calls with the signal's name."""
        self._engine_options = {"cores": self.cores, "driver": driver, "busy_poll": busy_poll, "spin_us": spin_us, "pin": pin}
        self._engine_factory = engine_factory
        self._wait_for_rpc = wait_for_rpc
        self._engine: Any = None
        self._bridge: Bridge | None = None
        self._forked = False
        subsystems, rooms = make_subsystems()
        self._subsystems: dict[str, Subsystem] = {}
        self._rooms = rooms
        for subsystem in subsystems:
            self.add_subsystem(subsystem)
        for attribute, room in rooms.items():
            setattr(self, attribute, room)
        self._started: list[Subsystem] = []
        self._starting = False
        self._ready = asyncio.Event()
        self._servers: list[RpcServer | HttpServer] = []
        _STACKS.add(self)

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the reactors; then the subsystems, unless ``wait_for_rpc``."""
        if self.state != "new":
            raise StackStopped(f"a stack starts once; this one is {self.state}")
        check_usable(self.cores)
        ordered = self.subsystem_order()  # a missing or circular dependency is found before anything runs
        factory = self._engine_factory or _real_engine()
        try:
            self._engine = factory(**self._engine_options)
        except OSError as error:
            raise from_engine(error) from error
        self._bridge = Bridge(self._engine)
        self._bridge.start()
        self.state = "startup"
        logger.debug("subsystems in order: %s", ", ".join(ordered))
        if not self._wait_for_rpc:
            try:
                await self.start_subsystems()
            except BaseException:
                await self.stop()
                raise

    def add_subsystem(self, subsystem: Subsystem) -> None:
        """Add one of your own before `start`. A name in use is a `ValueError`."""
        if self.state != "new" or not subsystem.name or subsystem.name in self._subsystems:
            raise ValueError(f"subsystem {subsystem.name!r}: it needs a name of its own, and to be added before the stack starts")
        self._subsystems[subsystem.name] = subsystem

    def subsystem_order(self) -> list[str]:
        """Names in the order of starting; `SubsystemError` names what is missing or circular."""
        return order(self.subsystem_dependencies())

    def subsystem_dependencies(self) -> dict[str, tuple[str, ...]]:
        """Name -> names it depends on."""
        return {name: subsystem.depends_on for name, subsystem in self._subsystems.items()}

    async def start_subsystems(self) -> None:
        """Startup ends, runtime begins (``framework_start_init``). If one cannot start, those before it are stopped and the state stays."""
        if self.state != "startup":
            raise StackStopped(f"subsystems start in the startup state; the stack is {self.state}")
        if self._starting:
            raise Busy("the subsystems are being started")
        self._starting = True
        try:
            for name in self.subsystem_order():
                subsystem = self._subsystems[name]
                await subsystem.start(self)
                self._started.append(subsystem)
        except BaseException:
            await self._stop_subsystems(time.monotonic() + self.stop_deadline_ms / 1000)
            raise
        finally:
            self._starting = False
        self.state = "runtime"
        self._ready.set()

    async def wait_ready(self) -> None:
        """Return when the stack is in the runtime state (``framework_wait_init``)."""
        await self._ready.wait()
        if self.state != "runtime":
            raise StackStopped(f"the stack is {self.state}")

    async def stop(self, deadline_ms: int | None = None) -> None:
        """RPC, then subsystems in reverse order, then reactors. Idempotent. ``deadline_ms`` is for all of it."""
        if self._forked or self.state in ("stopping", "stopped"):
            return
        deadline = time.monotonic() + (self.stop_deadline_ms if deadline_ms is None else deadline_ms) / 1000
        had_engine = self._engine is not None
        self.state = "stopping"
        for server in self._servers:
            await server.stop(deadline_s=max(0.0, min(2.0, deadline - time.monotonic())))
        await self._stop_subsystems(deadline)
        if had_engine:
            left_ms = max(100, int((deadline - time.monotonic()) * 1000))
            await self._stop_engine(left_ms)
        self.passed_sockets.close()
        self._ready.set()
        self.state = "stopped"

    async def rest(self, deadline_ms: int) -> None:
        """As much of `stop` as lets go of everything outside this process; `stop` ends the reactors, which takes longer."""
        deadline = time.monotonic() + deadline_ms / 1000
        await self._stop_subsystems(deadline)
        try:
            await asyncio.get_running_loop().run_in_executor(
                None, self.engine.stop_bdevs, max(100, int((deadline - time.monotonic()) * 1000))
            )
        except OSError as error:
            raise from_engine(error) from error

    async def _stop_subsystems(self, deadline: float) -> None:
        while self._started:
            await self._stop_one(self._started.pop(), deadline)

    async def _stop_one(self, subsystem: Subsystem, deadline: float) -> None:
        left = max(0.1, deadline - time.monotonic())
        try:
            await asyncio.wait_for(subsystem.stop(self, int(left * 1000)), left)
        except TimeoutError:
            logger.error("subsystem %s did not stop within %.1f s and is abandoned", subsystem.name, left)
        except Exception:
            logger.exception("subsystem %s failed to stop", subsystem.name)

    async def _stop_engine(self, deadline_ms: int) -> None:
        """engine.stop blocks: in a thread, so that replies to those who still wait are handed out meanwhile."""
        assert self._bridge is not None
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._engine.stop, deadline_ms)
        except OSError as error:
            logger.error("the engine did not stop cleanly: %s", from_engine(error))
        self._bridge.close()

    def __del__(self) -> None:
        if getattr(self, "state", "new") in ("startup", "runtime") and not self._forked:
            warnings.warn(
                f"qpair.Stack on cores {self.cores} was dropped while running; use 'async with' or await stop()",
                ResourceWarning,
                stacklevel=2,
            )

    # -- parts ------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine. `StackStopped` before start and after stop, `ForkedStack` in a forked child."""
        self._check_alive()
        engine: Engine = self._engine
        return engine

    @property
    def bridge(self) -> Bridge:
        """The engine's events on this loop."""
        self._check_alive()
        assert self._bridge is not None
        return self._bridge

    def _check_alive(self) -> None:
        if self._forked:
            raise ForkedStack(f"this stack belongs to process {os.getppid()}, of which this one is a fork; start a new stack")
        if self._engine is None or self.state == "stopped":
            raise StackStopped(f"the stack is {self.state}")

    async def reactors(self) -> list[dict[str, Any]]:
        """One dict a reactor, see ``Engine.reactors``: busy and idle time, sleeps, pollers. Asked in a thread, for it may wait 100 ms each."""
        return await asyncio.get_running_loop().run_in_executor(None, self.engine.reactors)

    async def load_config(self, path: str | os.PathLike[str]) -> None:
        """Load a configuration file (SPDK's JSON format); `ConfigError` names the entry that was refused."""
        from qpair.app.config import load, read
        from qpair.app.rooms import load_rpc

        load_rpc()
        await load(self, read(path))

    def save_config(self, path: str | os.PathLike[str]) -> None:
        """Write the present configuration to ``path``, atomically."""
        from qpair.app.config import save

        save(self, path)

    def config(self, subsystem: str) -> list[ConfigEntry]:
        """The calls that recreate ``subsystem``: what inert methods said, then the room's own."""
        owner = self._subsystems.get(subsystem)
        if owner is None:
            raise NoSuchDevice(f"no subsystem is named {subsystem!r:.80}")
        return owner.config(self)

    async def listen(self, address: str | None = None) -> RpcServer:
        """Answer JSON-RPC on ``address`` (default /var/tmp/spdk.sock) until the stack stops or the server is stopped."""
        from qpair.app.rooms import load_rpc
        from qpair.rpc.server import DEFAULT_ADDRESS, RpcServer

        load_rpc()
        server = RpcServer(self, address or DEFAULT_ADDRESS, passed=self.passed_sockets)
        await server.start()
        self._servers.append(server)
        return server

    async def stop_listening(self) -> list[PassedRecord]:
        """Answer no RPC any more; what another process needs to listen in this one's place."""
        released = [record for server in self._servers if (record := server.release()) is not None]
        for server in self._servers:
            await server.stop(deadline_s=2.0)
        self._servers.clear()
        return released

    async def listen_http(self, address: str, user: str, password: str, *, certificate: str | None = None) -> HttpServer:
        """Answer JSON-RPC by HTTP POST with Basic authentication, as SPDK's proxy does; see `qpair.rpc.http`. ``certificate``: HTTPS."""
        from qpair.app.rooms import load_rpc
        from qpair.rpc.http import Credentials, HttpServer

        load_rpc()
        server = HttpServer(self, address, Credentials(user, password), certificate=certificate)
        await server.start()
        self._servers.append(server)
        return server

    async def rpc(self, method: str, **params: Any) -> Any:
        """Call a JSON-RPC method in process: ``await stack.rpc("bdev_get_bdevs", name="disk0")``."""
        from qpair.app.rooms import load_rpc
        from qpair.rpc.dispatch import call

        load_rpc()
        return await call(self, method, params or None)

    # -- the short way ----------------------------------------------------------------------------

    async def malloc(self, name: str, size: int | str, *, block_size: int = 512, uuid: str | None = None) -> BdevHandle:
        """A bdev in memory. ``size``: bytes, or "64MiB"; a multiple of ``block_size``."""
        return await self.bdevs.create_malloc(name, size, block_size=block_size, uuid=uuid)

    async def null(self, name: str, size: int | str, *, block_size: int = 512, uuid: str | None = None) -> BdevHandle:
        """A bdev that keeps nothing and reads as zeros."""
        return await self.bdevs.create_null(name, size, block_size=block_size, uuid=uuid)

    async def file(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        size: int | str | None = None,
        block_size: int = 0,
        readonly: bool = False,
        uuid: str | None = None,
    ) -> BdevHandle:
        """A bdev on a file or block device. ``size`` creates the file, or grows it, first."""
        return await self.bdevs.create_file(name, path, size=size, block_size=block_size, readonly=readonly, uuid=uuid)

    async def add(self, /, bdev: Bdev | type[Bdev], *, process: bool = False, **options: Any) -> BdevHandle:
        """Put a bdev written in Python on the stack: a `qpair.Bdev` object, or with ``process=True`` its class, made with ``options`` in a process of its own
        (``await stack.add(Ram, process=True, name="ram0", timeout_ms=5000)``; the options of `qpair.bdev.worker.Policy` are the worker's)."""
        return await self.bdevs.add_python(bdev, process=process, **options)

    async def filter(self, bdev: str | BdevHandle, by: Filter) -> BdevHandle:
        """A bdev on top of ``bdev`` whose I/O a `qpair.Filter` is shown."""
        from qpair.bdev.modules.filter import add

        return self.bdevs.handle(await add(self.bdevs, _name(bdev), by))

    async def delete(self, bdev: str | BdevHandle, *, deadline_ms: int = 10_000) -> None:
        """Stop new I/O, drain or abort what is in flight, remove."""
        await self.bdevs.delete(_name(bdev), deadline_ms=deadline_ms)

    async def open(self, bdev: str | BdevHandle, *, write: bool = True) -> OpenBdev:
        """Open for I/O: ``async with await stack.open("disk0") as disk: await disk.read(0, 4096)``."""
        return await self.bdevs.handle(_name(bdev)).open(write=write)

    async def export(self, bdev: str | BdevHandle, socket: str | os.PathLike[str], **options: Any) -> Any:
        """Serve ``bdev`` as a vhost-user-blk device on ``socket`` (relative: in ``vhost_dir``). Options: those of `qpair.vhost`."""
        return await self.vhost.export(self, _name(bdev), os.fspath(socket), **options)

    async def perf(self, bdev: str | BdevHandle, **options: Any) -> PerfRun:
        """Start a load on ``bdev``; the run gives snapshots and its result. Options: see `qpair.bdev.perf.start`."""
        from qpair.bdev.perf import start

        return start(self, _name(bdev), **options)

    async def measure(self, bdev: str | BdevHandle, **options: Any) -> PerfResult:
        """As `perf`, and wait for the result."""
        return await (await self.perf(bdev, **options)).result()

    def trace(self, points: Iterable[str] | None = None, *, bdevs: Iterable[str] | None = None) -> Trace:
        """``async with stack.trace() as trace: ...``: trace points are on within; then ``trace.records`` is what they told, ``trace.summary()`` how long I/Os took
        at each bdev. ``points``: names of `qpair.bdev.trace.POINTS`, by default what the summary needs; ``bdevs``: keep records of these alone."""
        return Trace(self.tracing, points, bdevs)

    def events(self) -> EventReader:
        """``async for event in stack.events()``: bdevs that appear, vanish, change size, fail or are throttled, from this call on; see `qpair.bdev.events`.
        It ends when the stack stops. The last 1024 are kept for a slow reader, who is told by a `Lost` how many it missed."""
        return self.bdevs.events.subscribe()


def _name(bdev: str | BdevHandle) -> str:
    return bdev if isinstance(bdev, str) else bdev.name


def _real_engine() -> EngineFactory:
    from qpair._engine import Engine

    return Engine


_STACKS: weakref.WeakSet[Stack] = weakref.WeakSet()
_ORPHANS: list[Any] = []


def _after_fork_in_child() -> None:
    """Reactor threads do not exist here: every stack is dead, and its engine is kept unfreed, for to free it would join them."""
    for stack in tuple(_STACKS):
        _ORPHANS.append((stack._engine, stack._bridge))
        stack._forked = True


os.register_at_fork(after_in_child=_after_fork_in_child)
