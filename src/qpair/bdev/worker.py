"""Python bdevs in processes of their own: starting the worker, watching it, starting the next one.

How it works: `Worker` starts `qpair.bdev.worker_main`, tells it what to make, learns the geometry, has the engine make the bdev (once) and hands the shared ring's
descriptors over. Then it waits until the process ends or the engine says that it severed it (it was silent past ``timeout_ms``, it wrote rubbish). A worker is killed
with its process group, and the next one is attached only when it is gone: what it had failed with EIO; what waited goes on, or fails, as ``while_down`` says. A worker that
ends, and one that is not started again, are events (`qpair.bdev.events.Failed`).

Errors: a class that cannot be made refuses the bdev with its own words (`InvalidArgument`); later that is one more failure. A worker whose successor has
another geometry fails for good.

Limits: a worker has `START_SECONDS` to be made and to open, `STOP_SECONDS` to end by itself. Failures count towards ``restart_max`` until a worker has served for
`HEALTHY_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from qpair.bdev.events import Failed
from qpair.bdev.worker_main import MESSAGE_BYTES, Geometry, Hello, Refusal, Serve
from qpair.errors import InvalidArgument, TimedOut, from_engine

if TYPE_CHECKING:
    from qpair._engine import PythonWorkerLink
    from qpair.app.stack import Stack

__all__ = ["Policy", "Worker"]

START_SECONDS = 30.0
STOP_SECONDS = 2.0
HEALTHY_SECONDS = 60.0
LINE_BYTES = 4096

logger = logging.getLogger("qpair.bdev")

State = Literal["starting", "running", "restarting", "failed", "stopped"]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What happens when a worker dies. ``backoff_ms`` doubles with each failure in a row up to ``backoff_max_ms``."""

    restart: Literal["never", "on-failure"] = "on-failure"
    restart_max: int = 5
    backoff_ms: int = 100
    backoff_max_ms: int = 10_000
    while_down: Literal["wait", "fail"] = "wait"
    timeout_ms: int = 30_000

    def backoff_s(self, failures: int) -> float:
        """Before the next start, after so many failures in a row."""
        return float(min(self.backoff_ms << min(failures - 1, 30), self.backoff_max_ms)) / 1000


class _Process:
    """One worker process and its socket."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self.process = process
        self.channel = channel
        self.since = time.monotonic()
        self.ended = asyncio.ensure_future(process.wait())

    async def kill(self) -> None:
        """The whole group; returns when the process is gone."""
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.ended

    async def end(self) -> None:
        """By itself, or else."""
        self.channel.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), STOP_SECONDS)
        await self.kill()

    @property
    def fate(self) -> str:
        code = self.process.returncode
        if code is not None and code < 0:
            return f"the worker was killed by {signal.Signals(-code).name}"
        return f"the worker exited with {code}"


class Worker:
    """One bdev that a process serves."""

    def __init__(
        self, stack: Stack, name: str, target: str, options: dict[str, Any], policy: Policy, *, uuid: str, script: str | None = None
    ) -> None:
        self.name = name
        self.target = target
        self.options = options
        self.policy = policy
        self.state: State = "starting"
        self.restarts = 0
        self.last_failure: str | None = None
        self._stack = stack
        self._uuid = uuid
        self._script = script
        self._geometry: Geometry | None = None
        self._link: PythonWorkerLink | None = None
        self._process: _Process | None = None
        self._number = 0
        self._down: asyncio.Future[str] | None = None
        self._task: asyncio.Task[None] | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._unsubscribe: Callable[[], None] = lambda: None

    @property
    def pid(self) -> int | None:
        """Of the process that serves now."""
        return None if self._process is None else self._process.process.pid

    def describe(self) -> dict[str, Any]:
        """As qpair_python_get_bdevs shows it."""
        return {
            "name": self.name,
            "class": self.target,
            "state": self.state,
            "pid": self.pid,
            "restarts": self.restarts,
            "last_failure": self.last_failure,
            **msgspec.to_builtins(self.policy),
        }

    async def start(self) -> None:
        """The first worker, and the bdev. What it raises leaves nothing behind."""
        process = await self._spawn()
        try:
            geometry = self._geometry
            assert geometry is not None
            blocks, rest = divmod(geometry.size_bytes, geometry.block_size)
            if rest:
                raise InvalidArgument(f"bdev {self.name!r}: size {geometry.size_bytes} is no multiple of block_size {geometry.block_size}")
            try:
                self._link = self._stack.engine.bdev_python_worker_create(
                    self.name,
                    num_blocks=blocks,
                    block_size=geometry.block_size,
                    depth=geometry.depth,
                    max_io_bytes=geometry.max_io_bytes,
                    uuid=self._uuid,
                    readonly=geometry.readonly,
                    timeout_ms=self.policy.timeout_ms,
                    while_down=self.policy.while_down if self.policy.restart != "never" else "fail",
                )
            except OSError as error:
                raise from_engine(error) from error
            self._unsubscribe = self._stack.bridge.subscribe_worker(self._link.id, self._on_down)
            self._attach(process)
        except BaseException:
            await process.kill()
            raise
        self._task = asyncio.create_task(self._watch(process), name=f"bdev {self.name} worker")

    async def _spawn(self) -> _Process:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "qpair.bdev.worker_main",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
                )
            except BaseException:
                ours.close()
                raise
        process = _Process(child, ours)
        reader = asyncio.create_task(self._tell(child))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        try:
            await asyncio.wait_for(self._greet(process), START_SECONDS)
        except TimeoutError:
            await process.kill()
            raise TimedOut(f"bdev {self.name!r}: its worker was not ready within {START_SECONDS:.0f} s") from None
        except BaseException:
            await process.kill()
            raise
        return process

    async def _greet(self, process: _Process) -> None:
        loop = asyncio.get_running_loop()
        hello = msgspec.msgpack.encode(Hello(self.target, self.options, [entry for entry in sys.path if entry], self._script))
        if len(hello) > MESSAGE_BYTES:
            raise InvalidArgument(f"bdev {self.name!r}: its options take {len(hello)} bytes, at most {MESSAGE_BYTES}")
        await loop.sock_sendall(process.channel, hello)
        answer = await loop.sock_recv(process.channel, MESSAGE_BYTES)
        if not answer:
            await process.ended
            raise InvalidArgument(f"bdev {self.name!r}: {process.fate} before it was ready")
        try:
            told = msgspec.msgpack.decode(answer, type=Geometry | Refusal)
        except msgspec.MsgspecError as error:
            raise InvalidArgument(f"bdev {self.name!r}: its worker answered with what it should not: {error}") from error
        if isinstance(told, Refusal):
            raise InvalidArgument(f"bdev {self.name!r}: {told.why}")
        if self._geometry is not None and told != self._geometry:
            raise _Changed(f"bdev {self.name!r}: its worker came back as {told}, it was {self._geometry}")
        self._geometry = told

    def _attach(self, process: _Process) -> None:
        assert self._link is not None
        assert self._geometry is not None
        self._down = asyncio.get_running_loop().create_future()
        self._number, *descriptors = self._link.attach()
        try:
            serve = Serve(self._geometry.depth, self._link.stride, self._geometry.block_size)
            socket.send_fds(process.channel, [msgspec.msgpack.encode(serve)], descriptors)
        except OSError:
            pass  # it is dead already, as its watcher will find
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._process = process
        process.since = time.monotonic()
        self.state = "running"

    def _on_down(self, number: int, reason: str) -> None:
        if number == self._number and self._down is not None and not self._down.done():
            self._down.set_result(reason)

    async def _watch(self, process: _Process) -> None:
        failures = 0
        while True:
            reason = await self._fail(process)
            if time.monotonic() - process.since >= HEALTHY_SECONDS:
                failures = 0
            failures += 1
            successor = None
            while successor is None:
                self.last_failure = reason
                logger.error("bdev %s: %s", self.name, reason)
                if self.policy.restart == "never" or failures > self.policy.restart_max:
                    self._give_up(reason)
                    return
                if self.state == "running":
                    self._publish(f"{reason}; the next one is started")
                self.state = "restarting"
                await asyncio.sleep(self.policy.backoff_s(failures))
                try:
                    successor = await self._spawn()
                except _Changed as error:
                    self.last_failure = str(error)
                    logger.error("%s", error)
                    self._give_up(self.last_failure)
                    return
                except Exception as error:
                    reason = f"the worker could not be started again: {error}"
                    failures += 1
            self.restarts += 1
            process = successor
            self._attach(process)
            logger.warning("bdev %s: worker %d serves it now", self.name, process.process.pid)

    async def _fail(self, process: _Process) -> str:
        """Return when the process is gone, with why."""
        assert self._down is not None
        assert self._link is not None
        await asyncio.wait(cast("list[asyncio.Future[Any]]", [process.ended, self._down]), return_when=asyncio.FIRST_COMPLETED)
        reason = self._down.result() if self._down.done() else None
        await process.kill()
        self._process = None
        if reason is None:
            self._link.sever(self._number, process.fate)
        return reason or process.fate

    def _publish(self, reason: str) -> None:
        self._stack.bdevs.events.publish(Failed(bdev=self.name, reason=reason))

    def _give_up(self, reason: str) -> None:
        self.state = "failed"
        self._publish(f"{reason}; it is not started again (restart {self.policy.restart!r}, restart_max {self.policy.restart_max})")
        if self._link is not None:
            self._link.while_down("fail")

    async def _tell(self, child: asyncio.subprocess.Process) -> None:
        """What the worker prints goes to the log, line by line."""
        assert child.stdout is not None
        while True:
            try:
                line = await child.stdout.readline()
            except ValueError:
                continue  # longer than the reader's limit: cut there
            if not line:
                return
            logger.info("bdev %s worker %d: %s", self.name, child.pid, line[:LINE_BYTES].decode(errors="replace").rstrip())

    def close(self) -> None:
        """The engine has let go of the bdev: end the worker. `finish` waits for it."""
        if self.state == "stopped":
            return
        self.state = "stopped"
        self._unsubscribe()
        if self._task is not None:
            self._task.cancel()
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            ending = asyncio.ensure_future(self._process.end())
            self._readers.add(ending)
            ending.add_done_callback(self._readers.discard)

    async def finish(self, within_s: float = STOP_SECONDS) -> None:
        """As `close`, and wait for the process to be gone; end it by force if ``within_s`` is over."""
        self.close()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        try:
            if self._readers:
                await asyncio.wait(tuple(self._readers), timeout=min(within_s, 2 * STOP_SECONDS))
        finally:
            # Also when whoever waits for this has no time left.
            if self._process is not None and self._process.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.process.pid, signal.SIGKILL)
        if self._process is not None:
            await self._process.ended


class _Changed(InvalidArgument):
    """Another geometry than before: no restart can help."""
