"""QEMU's control protocol, as much of it as a migration needs. One command at a time, blocking."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def migrating(self, uri: str, timeout_s: float = 120) -> Iterator[None]:
        """Has the guest moved there. What is done inside happens after all of its memory was copied once, and before the guest stops here."""
        end = time.monotonic() + timeout_s
        self.command("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=1)
        self.command("migrate", uri=uri)
        while self._migration(end).get("ram", {}).get("dirty-sync-count", 0) < 2:
            time.sleep(0.01)
        # So slow that what the guest dirties meanwhile keeps it here.
        self.command("migrate-set-parameters", max_bandwidth=100_000)
        assert self._migration(end)["status"] == "active"
        yield
        assert self._migration(end)["status"] == "active", "the guest was gone already"
        self.command("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=5000)
        while self._migration(end)["status"] != "completed":
            time.sleep(0.05)

    def _migration(self, end: float) -> dict[str, Any]:
        told = dict(self.command("query-migrate"))
        assert told.get("status") not in ("failed", "cancelled"), told
        assert time.monotonic() < end, told
        return told
