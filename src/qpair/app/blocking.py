"""The blocking twin of `Stack`, for scripts and notebooks: the same calls without ``await``.

    with qpair.BlockingStack(cores="0") as stack:
        disk = stack.malloc("disk0", "64MiB")
        disk.write(0, b"hello".ljust(512))
        print(stack.measure(disk, seconds=1).iops)

In a notebook, whose cells no ``with`` spans: ``stack = qpair.BlockingStack().start()``, later ``stack.stop()``.

How it works: one thread runs an asyncio loop that owns the real stack; each call runs there and the caller waits. A loop that the caller's own thread runs
(Jupyter's) is not touched. Calls may come from several threads. A twin's method is made from the method of the same name, so signature and
documentation are those; where bdevs go in or out there are `BlockingDisk` and `BlockingOpenBdev` instead of `BdevHandle` and `OpenBdev`. Other objects
(``stack.bdevs``, ``stack.vhost``, what `export` gives) come as `BlockingObject`, which does the same for any attribute.

Errors: those of `Stack`; `StackStopped` before `start` and after `stop`; `ForkedStack` in a forked child; `Busy` for a call on the control thread itself (from
a method of a Python bdev), which would wait for itself. An interrupt (Ctrl-C) while a call waits cancels that call, waits for its end up to
15 seconds, and is raised; a second one does not wait.

Not stopping a stack warns when it is collected, and stops it behind the caller's back; at the end of the process the kernel takes the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from qpair.app.loop_thread import ControlThread
from qpair.app.stack import Stack
from qpair.bdev.client import BdevHandle, OpenBdev, TimedOut
from qpair.bdev.events import Event, EventReader
from qpair.bdev.perf import PerfRun
from qpair.errors import Busy, StackStopped

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qpair.bdev.client import TimedOut
    from qpair.bdev.filter import Filter
    from qpair.bdev.model import BdevInfo
    from qpair.bdev.perf import PerfResult, PerfSnapshot

__all__ = [
    "BlockingDisk",
    "BlockingEvents",
    "BlockingObject",
    "BlockingOpenBdev",
    "BlockingPerfRun",
    "BlockingStack",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Twin(Generic[R]):
    """An object of the control loop, used from other threads."""

    def __init__(self, control: ControlThread, real: R) -> None:
        self._control_or_none: ControlThread | None = control
        self._real = real

    @property
    def _control(self) -> ControlThread:
        if self._control_or_none is None:
            raise StackStopped("the stack is not running; use it inside 'with', or call start()")
        return self._control_or_none


def _blocking(method: Callable[Concatenate[R, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[_Twin[R], P], T]:
    """The twin of a coroutine function."""

    @functools.wraps(method)
    def twin(self: _Twin[R], /, *args: P.args, **options: P.kwargs) -> T:
        return self._control.run(method(self._real, *args, **options))

    return twin


def _on_loop(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[_Twin[R], P], T]:
    """The twin of a plain method that must run on its own loop."""

    @functools.wraps(method)
    def twin(self: _Twin[R], /, *args: P.args, **options: P.kwargs) -> T:
        return self._control.call(lambda: method(self._real, *args, **options))

    return twin


def _giving_disk(
    method: Callable[Concatenate[Stack, P], Coroutine[Any, Any, BdevHandle]],
) -> Callable[Concatenate[BlockingStack, P], BlockingDisk]:
    """The twin of a coroutine function that makes a bdev."""

    @functools.wraps(method)
    def twin(self: BlockingStack, /, *args: P.args, **options: P.kwargs) -> BlockingDisk:
        control = self._control
        return BlockingDisk(control, control.run(method(self._real, *args, **options)), self)

    return twin


class BlockingStack(_Twin[Stack]):
    """Takes what `Stack` takes. Use it in a ``with`` statement, or `start` and `stop` it. As a `Stack`, it starts once."""

    def __init__(self, **options: Any) -> None:
        self._control_or_none = None
        self._real = Stack(**options)

    # -- life -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """As `Stack.start`; gives the stack itself, for ``stack = BlockingStack().start()``."""
        if self._control_or_none is not None or self._real.state != "new":
            raise StackStopped(f"a stack starts once; this one is {self._real.state}")
        control = self._control_or_none = ControlThread()
        try:
            control.run(self._real.start())
        except BaseException:
            self._control_or_none = None
            control.end()
            raise
        return self

    def stop(self, deadline_ms: int | None = None) -> None:
        """As `Stack.stop`. Idempotent; calls that still wait raise `StackStopped`."""
        control = self._control_or_none
        if control is None:
            return
        try:
            control.run(self._real.stop(deadline_ms))
        finally:
            self._control_or_none = None
            control.end()

    def __del__(self) -> None:
        control = getattr(self, "_control_or_none", None)
        if control is None or self._real.state not in ("startup", "runtime"):
            return
        warnings.warn(
            f"qpair.BlockingStack on cores {self._real.cores} was dropped while running; use 'with' or stop()",
            ResourceWarning,
            stacklevel=2,
        )
        try:
            control.check()
            control.abandon(self._real)
        except (StackStopped, Busy):
            return

    start_subsystems = _blocking(Stack.start_subsystems)
    wait_ready = _blocking(Stack.wait_ready)

    @property
    def state(self) -> str:
        """As `Stack.state`."""
        return self._real.state

    @property
    def cores(self) -> list[int]:
        """As `Stack.cores`."""
        return list(self._real.cores)

    @property
    def stack(self) -> Stack:
        """The real one, to be used on its own loop only."""
        _ = self._control
        return self._real

    # -- parts ------------------------------------------------------------------------------------

    @property
    def bdevs(self) -> BlockingObject:
        """The bdev room, every method blocking: ``stack.bdevs.iostat("disk0")``."""
        return BlockingObject(self._control, self._real.bdevs, self)

    @property
    def vhost(self) -> BlockingObject:
        """The vhost room, every method blocking."""
        return BlockingObject(self._control, self._real.vhost, self)

    @property
    def virtio(self) -> BlockingObject:
        """The virtio room, every method blocking: ``stack.virtio.attach("v0", "/tmp/disk0.sock")``."""
        return BlockingObject(self._control, self._real.virtio, self)

    def disk(self, name: str) -> BlockingDisk:
        """The bdev of that name, alias or UUID; `NoSuchBdev`."""
        control = self._control
        return BlockingDisk(control, control.call(lambda: self._real.bdevs.handle(name)), self)

    def listen(self, address: str | None = None) -> BlockingObject:
        """As `Stack.listen`; the server has ``bound`` and ``stop()``."""
        control = self._control
        return BlockingObject(control, control.run(self._real.listen(address)), self)

    def listen_http(self, address: str, user: str, password: str, *, certificate: str | None = None) -> BlockingObject:
        """As `Stack.listen_http`; the server has ``bound`` and ``stop()``."""
        control = self._control
        return BlockingObject(control, control.run(self._real.listen_http(address, user, password, certificate=certificate)), self)

    add_subsystem = _on_loop(Stack.add_subsystem)
    config = _on_loop(Stack.config)
    load_config = _blocking(Stack.load_config)
    reactors = _blocking(Stack.reactors)
    save_config = _on_loop(Stack.save_config)
    subsystem_dependencies = _on_loop(Stack.subsystem_dependencies)
    subsystem_order = _on_loop(Stack.subsystem_order)

    def rpc(self, method: str, **params: Any) -> Any:
        """As `Stack.rpc`: ``stack.rpc("bdev_get_bdevs", name="disk0")``."""
        return self._control.run(self._real.rpc(method, **params))

    # -- the short way ----------------------------------------------------------------------------

    add = _giving_disk(Stack.add)
    file = _giving_disk(Stack.file)
    malloc = _giving_disk(Stack.malloc)
    null = _giving_disk(Stack.null)

    def delete(self, bdev: str | BlockingDisk, *, deadline_ms: int = 10_000) -> None:
        """As `Stack.delete`."""
        if isinstance(bdev, BlockingDisk):
            bdev.close()
        self._control.run(self._real.delete(_name(bdev), deadline_ms=deadline_ms))

    def filter(self, bdev: str | BlockingDisk, by: Filter) -> BlockingDisk:
        """As `Stack.filter`: its methods run on the control thread."""
        control = self._control
        return BlockingDisk(control, control.run(self._real.filter(_name(bdev), by)), self)

    def open(self, bdev: str | BlockingDisk, *, write: bool = True) -> BlockingOpenBdev:
        """As `Stack.open`: ``with stack.open("disk0") as disk: disk.read(0, 4096)``."""
        control = self._control
        return BlockingOpenBdev(control, control.run(self._real.open(_name(bdev), write=write)))

    def export(self, bdev: str | BlockingDisk, socket: str | os.PathLike[str], **options: Any) -> BlockingObject:
        """As `Stack.export`: ``with stack.export("disk0", "disk0.sock") as controller: print(controller.socket)``."""
        control = self._control
        return BlockingObject(control, control.run(self._real.export(_name(bdev), socket, **options)), self)

    def perf(self, bdev: str | BlockingDisk, **options: Any) -> BlockingPerfRun:
        """As `Stack.perf`."""
        control = self._control
        return BlockingPerfRun(control, control.run(self._real.perf(_name(bdev), **options)))

    def measure(self, bdev: str | BlockingDisk, **options: Any) -> PerfResult:
        """As `Stack.measure`."""
        return self._control.run(self._real.measure(_name(bdev), **options))

    def trace(self, points: Iterable[str] | None = None, *, bdevs: Iterable[str] | None = None) -> BlockingObject:
        """As `Stack.trace`: ``with stack.trace() as trace: ...``."""
        control = self._control
        return BlockingObject(control, control.call(lambda: self._real.trace(points, bdevs=bdevs)), self)

    def events(self, *, timeout_s: float | None = None) -> BlockingEvents:
        """As `Stack.events`: ``for event in stack.events(): ...``. It listens from this call on. ``timeout_s``: end the iteration when
        nothing came for so long."""
        control = self._control
        return BlockingEvents(control, control.call(self._real.events), timeout_s)


class BlockingOpenBdev(_Twin[OpenBdev]):
    """The twin of `OpenBdev`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<open bdev {self.name!r}>"

    @property
    def name(self) -> str:
        """Of the bdev."""
        return self._real.name

    @property
    def block_size(self) -> int:
        """In bytes."""
        return self._real.block_size

    def set_timeout(self, seconds: float, callback: Callable[[TimedOut], None] | None) -> None:
        """As `OpenBdev.set_timeout`. ``callback`` runs on the control thread: what it may call of a stack is ``late.abort()``."""
        self._control.call(lambda: self._real.set_timeout(seconds, callback))

    @property
    def info(self) -> BdevInfo:
        """Geometry and state now."""
        return self._control.call(lambda: self._real.info)

    @property
    def zones(self) -> BlockingObject:
        """As `OpenBdev.zones`, every method blocking."""
        control = self._control
        return BlockingObject(control, control.call(lambda: self._real.zones), None)

    close = _blocking(OpenBdev.close)
    compare = _blocking(OpenBdev.compare)
    compare_and_write = _blocking(OpenBdev.compare_and_write)
    copy = _blocking(OpenBdev.copy)
    flush = _blocking(OpenBdev.flush)
    read = _blocking(OpenBdev.read)
    reset = _blocking(OpenBdev.reset)
    unmap = _blocking(OpenBdev.unmap)
    write = _blocking(OpenBdev.write)
    write_zeroes = _blocking(OpenBdev.write_zeroes)
    read_view = _blocking(OpenBdev.read_view)
    read_with_metadata = _blocking(OpenBdev.read_with_metadata)
    write_with_metadata = _blocking(OpenBdev.write_with_metadata)
    zone_io = _blocking(OpenBdev.zone_io)


class BlockingDisk(_Twin[BdevHandle]):
    """The twin of `BdevHandle`, and of `OpenBdev` for short: its descriptor is opened at the first I/O and kept until `close`."""

    def __init__(self, control: ControlThread, real: BdevHandle, owner: BlockingStack) -> None:
        super().__init__(control, real)
        self._owner = owner  # a stack is not collected while somebody holds a disk of it
        self._opened: BlockingOpenBdev | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<disk {self.name!r}>"

    @property
    def name(self) -> str:
        """As `BdevHandle.name`."""
        return self._real.name

    @property
    def info(self) -> BdevInfo:
        """Geometry and state now; `NoSuchBdev` once it is gone."""
        return self._control.call(lambda: self._real.info)

    @property
    def size_bytes(self) -> int:
        """Its size now, in bytes."""
        return self.info.size_bytes

    def open(self, *, write: bool = True) -> BlockingOpenBdev:
        """As `BdevHandle.open`: a descriptor of its own."""
        control = self._control
        return BlockingOpenBdev(control, control.run(self._real.open(write=write)))

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        return self._open().read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        """All of ``data`` at ``offset``."""
        self._open().write(offset, data)

    def flush(self) -> None:
        """As `OpenBdev.flush`."""
        self._open().flush()

    def unmap(self, offset: int, length: int) -> None:
        """As `OpenBdev.unmap`."""
        self._open().unmap(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """As `OpenBdev.write_zeroes`."""
        self._open().write_zeroes(offset, length)

    def reset(self) -> None:
        """As `OpenBdev.reset`."""
        self._open().reset()

    resize = _blocking(BdevHandle.resize)

    def delete(self) -> None:
        """As `BdevHandle.delete`, after `close`."""
        self.close()
        self._control.run(self._real.delete())

    def close(self) -> None:
        """Give its descriptor back; a later I/O opens it again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _open(self) -> BlockingOpenBdev:
        with self._lock:
            if self._opened is None:
                self._opened = self.open(write=not self.info.readonly)
            return self._opened


class BlockingPerfRun(_Twin[PerfRun]):
    """The twin of `PerfRun`."""

    result = _blocking(PerfRun.result)
    snapshot = _on_loop(PerfRun.snapshot)
    stop = _on_loop(PerfRun.stop)

    def progress(self, interval_s: float = 0.2) -> Iterator[PerfSnapshot]:
        """As `PerfRun.progress`: ``for snapshot in run.progress(): ...``."""
        control, source = self._control, self._real.progress(interval_s)
        while (snapshot := control.run(_next(source))) is not None:
            yield snapshot


class BlockingEvents(_Twin[EventReader], Iterator[Event]):
    """The twin of `EventReader`: an iterator that waits. It ends after the stack has stopped, by its ``timeout_s``, or by `close`."""

    def __init__(self, control: ControlThread, real: EventReader, timeout_s: float | None) -> None:
        super().__init__(control, real)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Event:
        try:
            event = self._control.run(self._wait())
        except StackStopped:
            event = self._left()
        if event is None:
            raise StopIteration
        return event

    async def _wait(self) -> Event | None:
        try:
            return await asyncio.wait_for(_next(self._real), self._timeout_s)
        except TimeoutError:
            return None

    def _left(self) -> Event | None:
        """What was told before the stop: a closed reader never waits, so no loop is needed."""
        self._real.close()
        try:
            _next(self._real).send(None)
        except StopIteration as done:
            event: Event | None = done.value
            return event
        return None

    def close(self) -> None:
        """Listen no more. Idempotent."""
        with contextlib.suppress(StackStopped):
            self._control.call(self._real.close)


class BlockingObject(_Twin[Any]):
    """Any object of the control loop: attributes are read there, methods run there and are waited for, bdev handles come out as `BlockingDisk`. A context
    manager where the object is an asynchronous one."""

    def __init__(self, control: ControlThread, real: Any, owner: BlockingStack | None) -> None:
        super().__init__(control, real)
        self._owner = owner

    def __repr__(self) -> str:
        return f"<blocking {type(self._real).__name__}>"

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._real) if not name.startswith("_")]

    def __enter__(self) -> Self:
        self._control.run(self._real.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._control.run(self._real.__aexit__(*error))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self._control.call(lambda: getattr(self._real, name))
        if not inspect.isroutine(value):
            return self._shown(value)

        @functools.wraps(value)
        def method(*args: Any, **options: Any) -> Any:
            async def work() -> Any:
                given = value(*(_real(item) for item in args), **{key: _real(item) for key, item in options.items()})
                return await given if inspect.isawaitable(given) else given

            return self._shown(self._control.run(work()))

        return method

    def _shown(self, value: Any) -> Any:
        if isinstance(value, BdevHandle) and self._owner is not None:
            return BlockingDisk(self._control, value, self._owner)
        if isinstance(value, OpenBdev):
            return BlockingOpenBdev(self._control, value)
        if isinstance(value, list | tuple):
            return type(value)(self._shown(item) for item in value) if type(value) in (list, tuple) else value
        # what has coroutines of its own is of the loop: a controller, a server
        if any(inspect.iscoroutinefunction(getattr(type(value), name, None)) for name in dir(type(value))):
            return BlockingObject(self._control, value, self._owner)
        return value


async def _next(source: AsyncIterator[T]) -> T | None:
    return await anext(source, None)


def _real(value: Any) -> Any:
    return value._real if isinstance(value, _Twin) else value


def _name(bdev: str | BlockingDisk) -> str:
    return bdev if isinstance(bdev, str) else bdev.name
