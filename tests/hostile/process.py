"""``qpair serve`` as a process that the tests look at from outside: its descriptors, mappings, threads, memory and log."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

PROGRAM = str(Path(sys.executable).with_name("qpair"))
CORE = min(os.sched_getaffinity(0))


def until(there: Callable[[], Any], what: str, timeout_s: float = 15) -> Any:
    """Waits for a true value and returns it."""
    end = time.monotonic() + timeout_s
    while not (value := there()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.01)
    return value


class RpcFailed(Exception):
    """An error answer: its ``code`` and text."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['message']}: {error.get('data', '')}")
        self.code: int = error["code"]


class Serve:
    """``qpair serve`` on one core."""

    def __init__(self, folder: Path, *options: str, name: str = "q", wait: bool = True) -> None:
        self.folder = folder
        self.socket = folder / f"{name}.sock"
        self.log_file = folder / f"{name}.log"
        command = [PROGRAM, "serve", "-r", str(self.socket), "-m", f"[{CORE}]", "--no-pin", "-S", str(folder), *options]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        self.pid = self.process.pid
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        lines = []
        while line := self.process.stdout.readline().decode():
            lines.append(line.rstrip())
            if lines[-1] == "ready":
                return
        raise RuntimeError(f"not ready, status {self.process.wait()}: {lines}\n{self.log()}")

    def rpc(self, method: str, **params: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(self.socket))
            sock.sendall(json.dumps({"id": 1, "method": method, "params": params}).encode())
            answer = json.loads(read_line(sock))
        if "error" in answer:
            raise RpcFailed(answer["error"])
        return answer["result"]

    def malloc(self, name: str, mebibytes: int = 4) -> None:
        self.rpc("bdev_malloc_create", name=name, num_blocks=mebibytes * 2048, block_size=512)

    def export(self, name: str, bdev: str, **options: Any) -> Path:
        self.rpc("vhost_create_blk_controller", ctrlr=name, dev_name=bdev, **options)
        return self.folder / name

    # -- looking at it ----------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def lines(self, pattern: str, since: int = 0) -> list[str]:
        """The log's lines from byte ``since`` on that a regular expression is found in."""
        data = self.log_file.read_bytes()[since:].decode(errors="replace")
        return [line for line in data.splitlines() if re.search(pattern, line)]

    def mark(self) -> int:
        return self.log_file.stat().st_size

    def fds(self) -> list[str]:
        """What its descriptors are."""
        found = []
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{self.pid}/fd/{number}"))
            except FileNotFoundError:
                continue
        return sorted(found)

    def guest_mappings(self) -> list[str]:
        """Its mappings of memory of a `FrontEnd`."""
        return [line for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines() if "hostile-guest" in line]

    def mappings(self) -> int:
        return Path(f"/proc/{self.pid}/maps").read_text().count("\n")

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # -- ending it ----------------------------------------------------------------------------------

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.alive:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def read_line(sock: socket.socket) -> bytes:
    """Up to a newline or the end."""
    data = bytearray()
    while not data.endswith(b"\n"):
        piece = sock.recv(1 << 16)
        if not piece:
            break
        data += piece
    return bytes(data)


class Perf:
    """``qpair perf`` as a process of its own."""

    def __init__(self, target: str, *options: str) -> None:
        command = [PROGRAM, "perf", target, "--json", *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def result(self, timeout_s: float = 60) -> dict[str, Any]:
        """What it measured; its exit code is in ``returncode`` of the process."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        assert out.strip(), err.decode()
        found: dict[str, Any] = json.loads(out)
        return found
