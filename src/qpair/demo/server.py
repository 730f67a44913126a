"""A ``qpair serve`` for the length of a demonstration, and the commands given to it, shown as they are run.

Errors: `DemoFailed` with what the command printed. Leaving the ``with`` block ends the server and removes its folder.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["DemoFailed", "DemoServer", "heading"]

READY_S = 10.0
STOP_S = 15.0


class DemoFailed(Exception):
    """A command of the demonstration failed."""


def heading(text: str) -> None:
    """A line that says what comes next."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{text}{plain}", flush=True)


def show(words: list[str], *, behind: str = "") -> None:
    """A command line, as one would type it."""
    print("  $ " + " ".join(shlex.quote(word) for word in words) + behind, flush=True)


class DemoServer:
    """``with DemoServer(cores="0") as server:`` a running server in a folder of its own."""

    def __init__(self, *, cores: str) -> None:
        self._cores = cores
        self._folder = tempfile.TemporaryDirectory(prefix="qpair-demo-")
        self.folder = Path(self._folder.name)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def rpc_socket(self) -> Path:
        return self.folder / "qpair.sock"

    def __enter__(self) -> Self:
        words = ["serve", "-m", f"[{self._cores}]", "-r", str(self.rpc_socket), "-S", str(self.folder)]
        show(["qpair", *words], behind=" &")
        self._log = (self.folder / "serve.log").open("wb")
        self._process = subprocess.Popen([sys.executable, "-m", "qpair.cli", *words], stdout=self._log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + READY_S
        while not self.rpc_socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self.log()
                self.__exit__(None, None, None)
                raise DemoFailed(f"the server did not come up:\n{said}")
            time.sleep(0.02)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def log(self) -> str:
        """What the server printed."""
        return (self.folder / "serve.log").read_text(errors="replace")

    def rpc(self, method: str, **params: object) -> None:
        """One JSON-RPC method by the command line."""
        words = ["rpc", "-s", str(self.rpc_socket), method]
        for name, value in params.items():
            words += [f"--{name}", str(value)]
        show(["qpair", *words])
        done = subprocess.run([sys.executable, "-m", "qpair.cli", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise DemoFailed(f"{method}: {done.stderr.strip() or done.stdout.strip()}\nthe server said:\n{self.log()}")

    def perf(self, *words: str) -> None:
        """``qpair perf``, with its own progress and table."""
        show(["qpair", "perf", *words])
        done = subprocess.run([sys.executable, "-m", "qpair.cli", "perf", *words], check=False)
        if done.returncode:
            raise DemoFailed(f"qpair perf ended with {done.returncode}; the server said:\n{self.log()}")
