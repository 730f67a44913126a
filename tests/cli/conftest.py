"""``qpair serve`` as a process, and terminals, for the tests of the command line."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

CORE = str(min(os.sched_getaffinity(0)))


class Server:
    """A ``qpair serve`` process under test."""

    def __init__(self, process: asyncio.subprocess.Process, path: str) -> None:
        self.process, self.path = process, path

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 20)).decode().rstrip()

    async def ready(self) -> None:
        while (line := await self.line()) != "ready":
            assert line, "it ended before it was ready"

    async def end(self, number: int | None = signal.SIGTERM) -> tuple[int, str]:
        if number is not None:
            self.process.send_signal(number)
        _, err = await asyncio.wait_for(self.process.communicate(), 20)
        assert self.process.returncode is not None
        return self.process.returncode, err.decode()


@pytest.fixture
async def serve(qpair_command: list[str], socket_path: str, tmp_path: Path) -> AsyncIterator[Any]:
    running: list[Server] = []

    async def start(*flags: str) -> Server:
        process = await asyncio.create_subprocess_exec(
            *qpair_command, "serve", "-r", socket_path, "-m", f"[{CORE}]", "-S", str(tmp_path), "--no-pin", *flags,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        running.append(Server(process, socket_path))
        return running[-1]

    yield start
    for server in running:
        if server.process.returncode is None:
            server.process.kill()
            await server.process.wait()


class Shell:
    """The ``qpair`` command with the socket of the server under test."""

    def __init__(self, command: list[str], client: Callable[..., Awaitable[tuple[int, str, str]]], path: str) -> None:
        self._command, self._client, self.path = command, client, path

    async def __call__(self, name: str, *arguments: str, **options: Any) -> tuple[int, str, str]:
        """``(exit code, standard output, standard error)`` of ``qpair NAME -r SOCKET ARGUMENTS``."""
        return await self._client(*self._command, name, "-r", self.path, *arguments, **options)

    async def rpc(self, method: str, **params: Any) -> Any:
        """A method's result."""
        code, out, err = await self("rpc", "--json", method, "--json", json.dumps(params))
        assert code == 0, err + out
        return json.loads(out)


@pytest.fixture
async def shell(serve: Any, qpair_command: list[str], client: Any, socket_path: str) -> Shell:
    """On a running server."""
    await (await serve()).ready()
    return Shell(qpair_command, client, socket_path)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *command: str, columns: int = 80, env: dict[str, str] | None = None) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            # given whole: readline sets COLUMNS behind the back of os.environ
            given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            os.execvpe(command[0], command, given | {"TERM": "xterm-256color"} | (env or {}))
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.shown = ""

    def until(self, pattern: str) -> None:
        """Read until ``pattern`` was shown, colours aside."""
        deadline = time.monotonic() + 30
        while re.search(pattern, plain(self.shown[-8192:])) is None:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(self._pid, signal.SIGKILL)
                raise AssertionError(f"{pattern!r} is not in {plain(self.shown)[-500:]!r}")
            self.shown += os.read(self._fd, 1 << 16).decode(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self._fd, b"\x03")

    def end(self) -> int:
        """Read to its end; the exit code."""
        while True:
            try:
                part = os.read(self._fd, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            self.shown += part.decode(errors="replace")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def lines(self) -> list[str]:
        """What was shown, without colours and movements."""
        return [line.rstrip() for line in plain(self.shown).splitlines()]


def plain(shown: str) -> str:
    """Without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "")
