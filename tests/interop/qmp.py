"""QEMU's control protocol, as much of it as a migration needs. One command at a time, blocking."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any, Self


class Qmp:
    """A connection to ``-qmp unix:PATH,server=on,wait=off``; waits until QEMU listens."""

    def __init__(self, path: Path, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(timeout_s)
        while True:
            try:
                self._sock.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._lines = self._sock.makefile("rb")
        self._read()
        self.command("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._sock.close()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU closed its control socket"
        return dict(json.loads(line))

    def command(self, name: str, **arguments: Any) -> Any:
        """Its result. Underscores in arguments' names become hyphens."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._sock.sendall(json.dumps({"execute": name, "arguments": given}).encode())
        while True:
            answer = self._read()
            assert "error" not in answer, f"{name}: {answer}"
            if "return" in answer:
                return answer["return"]

    def migrate(self, uri: str, timeout_s: float = 120) -> dict[str, Any]:
        """Moves the guest there, and waits until it is; what QEMU counted."""
        self.command("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=2000)
        self.command("migrate", uri=uri)
        deadline = time.monotonic() + timeout_s
        while True:
            told = dict(self.command("query-migrate"))
            assert told.get("status") not in ("failed", "cancelled"), told
            if told.get("status") == "completed":
                return told
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
