"""The life of a serving process: ``qpair serve``.

How it works: reactors, then the configuration's startup calls, then (unless it waits for framework_start_init) the subsystems and the rest of the
configuration, then the RPC socket and the ready line; a service manager is told as well (see `qpair.app.systemd`). SIGTERM, SIGINT and spdk_kill_instance end it cleanly: RPC, front ends, bdevs, reactors, each with a deadline. A
second signal ends it at once. SIGUSR2 starts a successor. How one process takes another's place stands in `qpair.app.takeover.messages`; here is what each then does with its stack.

Exit codes: 0 stopped cleanly; 1 could not start (the reason is on standard error); 128 + signal for the second signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from qpair.app.config import Config, load_runtime, load_startup, parse, read, snapshot
from qpair.app.cores import parse_mask
from qpair.app.logs import setup
from qpair.app.rooms import load_rpc
from qpair.app.stack import EngineFactory, Stack
from qpair.app.systemd import Manager
from qpair.app.version import VERSION
from qpair.errors import InvalidArgument, QpairError, from_errno
from qpair.rpc.server import DEFAULT_ADDRESS, RpcServer

if TYPE_CHECKING:
    from qpair.app.takeover.giver import Giver
    from qpair.app.takeover.messages import Handover
    from qpair.vhost.record import ControllerRecord

__all__ = ["HttpOptions", "ServeOptions", "run"]

REST_MS = 10_000
PASSWORD_VARIABLE = "QPAIR_RPC_HTTP_PASSWORD"

logger = logging.getLogger("qpair.app")


@dataclass
class HttpOptions:
    """Where JSON-RPC is answered by HTTP, and to whom."""

    address: str
    user: str
    password: str
    certificate: str | None = None

    @classmethod
    def of(cls, address: str, user: str | None, password_file: str | None, certificate: str | None) -> HttpOptions:
        """The password is the first line of a file, or the environment's QPAIR_RPC_HTTP_PASSWORD: a command line is readable by everybody."""
        if not user:
            raise InvalidArgument("--rpc-http needs --rpc-http-user: RPC by HTTP is never open to everybody")
        if password_file is not None:
            return cls(address, user, _first_line(password_file), certificate)
        password = os.environ.get(PASSWORD_VARIABLE, "")
        if not password:
            raise InvalidArgument(f"--rpc-http needs a password: --rpc-http-password-file FILE, or {PASSWORD_VARIABLE} in the environment")
        return cls(address, user, password, certificate)


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & 0o77:
                logger.warning("HTTP password file %s can be read by others than its owner: chmod 600", path)
            line = file.readline(4096).rstrip("\r\n")
    except OSError as error:
        raise from_errno(error.errno or 5, f"HTTP password file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InvalidArgument(f"HTTP password file {path}: it is not UTF-8 text") from None
    if not line:
        raise InvalidArgument(f"HTTP password file {path}: its first line is empty")
    return line


@dataclass
class ServeOptions:
    """What the command line says."""

    address: str = DEFAULT_ADDRESS
    mask: str | None = None
    """None: 0x1, or what the process has whose place is taken."""
    config: str | None = None
    wait_for_rpc: bool = False
    vhost_dir: str | None = None
    """None: here, or what the process has whose place is taken."""
    takeover: bool = False
    again: list[str] = field(default_factory=list)
    """The command of a successor, which SIGUSR2 starts."""
    busy_poll: bool = False
    driver: Literal["auto", "io_uring", "epoll"] = "auto"
    spin_us: int = 50
    pin: bool = True
    log_flags: list[str] = field(default_factory=list)
    log_level: str = "NOTICE"
    pid_file: str | None = None
    http: HttpOptions | None = None
    trace_mask: int = 0
    """Trace points of the group ``bdev`` that are on from the start."""
    notes: list[str] = field(default_factory=list)
    """Flags that were accepted and have no effect."""


def run(options: ServeOptions, *, engine_factory: EngineFactory | None = None) -> int:
    """Serve until told to stop; the exit code."""
    setup(options.log_level)
    for flag in options.log_flags:
        logging.getLogger(f"qpair.{flag}").setLevel(logging.DEBUG)
    for note in options.notes:
        logger.log(25, "%s is accepted and has no effect here", note)
    try:
        return asyncio.run(_Process(options, Manager.of_environment(), engine_factory).main())
    except QpairError as error:
        print(f"qpair serve: {error}", file=sys.stderr)
        return 1


class _Process:
    """It is what `qpair.app.takeover.giver` calls `Serving`."""

    def __init__(self, options: ServeOptions, manager: Manager, engine_factory: EngineFactory | None) -> None:
        self._options = options
        self._manager = manager
        self._watching: asyncio.Task[None] | None = None
        self._factory = engine_factory
        self._stopping = asyncio.Event()
        self._server: RpcServer | None = None
        self._addresses = ""
        self._giver: Giver | None = None
        self._successor: int | None = None
        self._exit_code = 0
        self.stack: Stack

    async def main(self) -> int:
        """Start, announce, wait, stop."""
        options = self._options
        _raise_descriptor_limit()
        load_rpc()
        config = read(options.config) if options.config is not None else None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal, number)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, self._start_successor)
        if options.takeover:
            await self._take_over()
        else:
            self.stack = self._new_stack(parse_mask(options.mask or "0x1"), options.vhost_dir or ".")
        try:
            if not options.takeover and not await self._start(config):
                return 0
            self._announce(self.stack)
            await self._stopping.wait()
            return self._exit_code
        finally:
            await self._end()

    def _new_stack(self, cores: Iterable[int], vhost_dir: str) -> Stack:
        options = self._options
        stack = Stack(
            cores=cores,
            driver=options.driver,
            busy_poll=options.busy_poll,
            spin_us=options.spin_us,
            pin=options.pin,
            vhost_dir=vhost_dir,
            wait_for_rpc=True,
            engine_factory=self._factory,
        )
        stack.stop_requested = self._request
        stack.takeover = self._asked_to_give
        stack.passed_sockets = self._manager.sockets
        return stack

    async def _start(self, config: Config | None) -> bool:
        """Everything up to RPC. False: told to stop before the subsystems started."""
        options, stack = self._options, self.stack
        await self._start_reactors(stack)
        if config is not None:
            await load_startup(stack, config)
        if options.wait_for_rpc:
            await self._listen(stack)
            self._tell_ready(f"qpair {VERSION}: RPC on {self._addresses}, waiting for framework_start_init")
            if not await self._started(stack):
                return False
        else:
            await stack.start_subsystems()
        if config is not None:
            await load_runtime(stack, config)
        if self._server is None:
            await self._listen(stack)
        return True

    async def _start_reactors(self, stack: Stack) -> None:
        await stack.start()
        self._watching = asyncio.create_task(self._manager.watch(stack), name="watchdog")
        if self._options.trace_mask:
            await stack.tracing.set(self._options.trace_mask)

    async def _end(self) -> None:
        if self._successor is None:
            self._manager.tell(STOPPING=1, STATUS="stopping")
        else:
            self._manager.tell(MAINPID=self._successor, STATUS=f"taken over by process {self._successor}")
        if self._watching is not None:
            self._watching.cancel()
        await self.stack.stop()
        self._remove_pid_file()

    # -- taking another process's place, and giving this one's ------------------------------------

    async def _take_over(self) -> None:
        import qpair.vhost.session  # noqa: F401  (else it would be read while disks stand still)
        from qpair.app.takeover.taker import Taker, adopt

        taker = await Taker.ask(self._options.address)
        try:
            cores = parse_mask(self._options.mask) if self._options.mask is not None else taker.offer.cores
            self.stack = self._new_stack(cores, self._options.vhost_dir or taker.offer.vhost_dir)
            try:
                await self._start_reactors(self.stack)
                await load_startup(self.stack, taker.config())
                await self.stack.start_subsystems()
                await adopt(self.stack, await taker.handover())
                await taker.go()
            except BaseException as error:
                self.stack.vhost.disown()
                await self.stack.stop()
                await taker.failed(error)
                raise
        finally:
            taker.close()
        await self._resume(self.stack)

    async def _resume(self, stack: Stack) -> None:
        stack.vhost.start_sessions()
        await self._listen(stack)

    def _start_successor(self) -> None:
        """The program as it is installed now takes this process's place: how a service manager upgrades (``systemctl reload``)."""
        environment = {**os.environ, **self._manager.environment()}
        try:
            child = subprocess.Popen(self._options.again, env=environment, stdin=subprocess.DEVNULL)
        except OSError as error:
            logger.error("SIGUSR2: a successor cannot be started: %s", error.strerror)
            return
        logger.log(25, "SIGUSR2: process %d is to take over", child.pid)
        threading.Thread(target=child.wait, name="qpair-successor", daemon=True).start()

    async def _asked_to_give(self, path: str, protocols: list[int]) -> None:
        from qpair.app.takeover.giver import Giver

        if self._giver is None:
            self._giver = Giver(self)
        await self._giver.asked(path, protocols)

    async def rest(self, quiet_s: float) -> Handover:
        """Stop all that answers or moves, and close the disks."""
        from qpair.app.takeover.giver import memory_of
        from qpair.app.takeover.messages import Handover

        stack = self.stack
        sockets = await stack.stop_listening()
        controllers: list[ControllerRecord] = []
        try:
            controllers = await stack.vhost.release(quiet_s)
            handover = Handover(snapshot(stack), sockets, controllers, await memory_of(stack))
        except BaseException:
            for record in sockets:
                stack.passed_sockets.inherit(record)
            await stack.vhost.resume(controllers)
            await self._resume(stack)
            raise
        if self._watching is not None:
            self._watching.cancel()
        try:
            await stack.rest(REST_MS)
        except BaseException:
            await self.rebuild(handover)
            raise
        return handover

    async def rebuild(self, handover: Handover) -> None:
        """Go on after all."""
        from qpair.app.takeover.taker import adopt

        await self.stack.stop()
        try:
            self.stack = stack = self._new_stack(self.stack.cores, self.stack.vhost_dir)
            await self._start_reactors(stack)
            await load_startup(stack, parse(msgspec.json.encode(handover.config), source="the configuration before the takeover"))
            await stack.start_subsystems()
            await adopt(stack, handover)
            await self._resume(stack)
        except Exception as error:
            logger.critical("cannot go on after a takeover that failed: %s", error, exc_info=not isinstance(error, QpairError))
            self._exit_code = 1
            self._stopping.set()

    def gone(self, pid: int) -> None:
        """The successor has it all."""
        logger.log(25, "taken over by process %d: ending", pid)
        self._successor = pid
        self._stopping.set()

    # -- parts ------------------------------------------------------------------------------------

    async def _listen(self, stack: Stack) -> None:
        self._server = await stack.listen(self._options.address)
        if (http := self._options.http) is not None:
            served = await stack.listen_http(http.address, http.user, http.password, certificate=http.certificate)
            self._addresses = f"{self._server.bound}, {'https' if http.certificate else 'http'}://{served.bound}"
        else:
            self._addresses = self._server.bound

    async def _started(self, stack: Stack) -> bool:
        """Whether the subsystems started before somebody asked to stop."""
        ready, stop = asyncio.ensure_future(stack.wait_ready()), asyncio.ensure_future(self._stopping.wait())
        done, pending = await asyncio.wait((ready, stop), return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return ready in done

    def _announce(self, stack: Stack) -> None:
        if self._options.pid_file is not None:
            with open(self._options.pid_file, "w", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
        cores = ",".join(str(core) for core in stack.cores)
        if passed := stack.passed_sockets.paths():
            logger.log(25, "the service manager listens on %s", ", ".join(passed))
        self._tell_ready(
            f"qpair {VERSION}: {stack.engine.driver} reactors on cores {cores}; RPC on {self._addresses}; vhost sockets in {stack.vhost_dir}"
        )
        _say("ready")

    def _tell_ready(self, line: str) -> None:
        _say(line)
        self._manager.tell(READY=1, STATUS=line, MAINPID=os.getpid())

    def _remove_pid_file(self) -> None:
        if self._options.pid_file is not None:
            with contextlib.suppress(OSError, ValueError):
                with open(self._options.pid_file, encoding="ascii") as file:
                    ours = int(file.read(20)) == os.getpid()
                if ours:
                    os.unlink(self._options.pid_file)

    def _request(self, why: str) -> None:
        logger.log(25, "%s: stopping", why)
        self._stopping.set()

    def _signal(self, number: signal.Signals) -> None:
        if not self._stopping.is_set():
            self._request(number.name)
            return
        logger.error("%s again: ending now", number.name)
        path: Any = self._server.address if self._server is not None else None
        for leftover in (path, f"{path}.lock"):
            if path is not None and "/" in path:
                with contextlib.suppress(OSError):
                    os.unlink(leftover)
        os._exit(128 + number)


def _say(*lines: str) -> None:
    """On standard output, seen at once; a closed one is no reason to stop."""
    with contextlib.suppress(BrokenPipeError):
        print(*lines, sep="\n", flush=True)


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
