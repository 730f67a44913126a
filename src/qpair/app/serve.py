"""The life of a serving process: ``qpair serve``.

How it works: reactors, then the configuration's startup calls, then (unless it waits for framework_start_init) the subsystems and the rest of the
configuration, then the RPC socket and the ready line. SIGTERM, SIGINT and spdk_kill_instance end it cleanly: RPC, front ends, bdevs, reactors, each with a deadline. A
second signal ends it at once.

Exit codes: 0 stopped cleanly; 1 could not start (the reason is on standard error); 128 + signal for the second signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from qpair.app.config import load_runtime, load_startup, read
from qpair.app.cores import parse_mask
from qpair.app.logs import setup
from qpair.app.rooms import load_rpc
from qpair.app.stack import EngineFactory, Stack
from qpair.app.version import VERSION
from qpair.errors import QpairError
from qpair.rpc.server import DEFAULT_ADDRESS, RpcServer

__all__ = ["ServeOptions", "run"]

logger = logging.getLogger("qpair.app")


@dataclass
class ServeOptions:
    """What the command line says."""

    address: str = DEFAULT_ADDRESS
    mask: str = "0x1"
    config: str | None = None
    wait_for_rpc: bool = False
    vhost_dir: str = "."
    busy_poll: bool = False
    driver: Literal["auto", "io_uring", "epoll"] = "auto"
    spin_us: int = 50
    pin: bool = True
    log_flags: list[str] = field(default_factory=list)
    log_level: str = "NOTICE"
    pid_file: str | None = None
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
        return asyncio.run(_Process(options, engine_factory).main())
    except QpairError as error:
        print(f"qpair serve: {error}", file=sys.stderr)
        return 1


class _Process:
    def __init__(self, options: ServeOptions, engine_factory: EngineFactory | None) -> None:
        self._options = options
        self._factory = engine_factory
        self._stopping = asyncio.Event()
        self._server: RpcServer | None = None

    async def main(self) -> int:
        """Start, announce, wait, stop."""
        options = self._options
        _raise_descriptor_limit()
        load_rpc()
        config = read(options.config) if options.config is not None else None
        stack = Stack(
            cores=parse_mask(options.mask),
            driver=options.driver,
            busy_poll=options.busy_poll,
            spin_us=options.spin_us,
            pin=options.pin,
            vhost_dir=options.vhost_dir,
            wait_for_rpc=True,
            engine_factory=self._factory,
        )
        stack.stop_requested = self._request
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal, number)
        try:
            await stack.start()
            if config is not None:
                await load_startup(stack, config)
            if options.wait_for_rpc:
                self._server = await stack.listen(options.address)
                _say(f"qpair {VERSION}: RPC on {self._server.bound}, waiting for framework_start_init")
                if not await self._started(stack):
                    return 0
            else:
                await stack.start_subsystems()
            if config is not None:
                await load_runtime(stack, config)
            if self._server is None:
                self._server = await stack.listen(options.address)
            self._announce(stack)
            await self._stopping.wait()
            return 0
        finally:
            await stack.stop()
            self._remove_pid_file()

    async def _started(self, stack: Stack) -> bool:
        """Whether the subsystems started before somebody asked to stop."""
        ready, stop = asyncio.ensure_future(stack.wait_ready()), asyncio.ensure_future(self._stopping.wait())
        done, pending = await asyncio.wait((ready, stop), return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return ready in done

    def _announce(self, stack: Stack) -> None:
        assert self._server is not None
        if self._options.pid_file is not None:
            with open(self._options.pid_file, "w", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
        cores = ",".join(str(core) for core in stack.cores)
        _say(
            f"qpair {VERSION}: {stack.engine.driver} reactors on cores {cores}; RPC on {self._server.bound}; vhost sockets in {stack.vhost_dir}",
            "ready",
        )

    def _remove_pid_file(self) -> None:
        if self._options.pid_file is not None:
            with contextlib.suppress(OSError):
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
