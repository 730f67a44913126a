"""Which measurements of a shared machine count.

A virtual core may be one of two threads of a physical core. When the other one is busy, be it a stranger or this machine's own second
core, it runs at half its speed, for seconds or minutes. A probe says so in 20 ms: a loop that fills the execution units (``pace``). A value
counts if the probe found all cores at their full pace right before it and right after it; others are measured again, up to a limit, and
those kept in spite of it are counted.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: A pace below this part of the best one seen is a disturbance.
FULL = 0.93
#: How long to wait for quiet moments in a whole run, and how often to measure one value.
PATIENCE_S = 180.0
TRIES = 6


class Quiet:
    """The probe, the best pace it has seen, and what became of the measurements."""

    def __init__(self, cores: list[int]) -> None:
        self.cores = [str(core) for core in dict.fromkeys(cores)]
        self.best = 0.0
        self.patience_s = PATIENCE_S
        self.measured = 0
        self.repeated = 0
        self.disturbed = 0
        subprocess.run(
            ["cargo", "build", "--quiet", "--release", "-p", "qpair-reactor", "--example", "pace"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        for _ in range(20):
            self.now()

    def now(self) -> bool:
        """Whether all cores run at their full pace just now."""
        done = subprocess.run([ROOT / "target/release/examples/pace", *self.cores], stdout=subprocess.PIPE, check=True)
        paces: list[float] = json.loads(done.stdout)["pace"]
        self.best = max(self.best, *paces)
        return min(paces) >= FULL * self.best

    def wait(self) -> bool:
        """Waits for a quiet moment; False: none came."""
        start = time.monotonic()
        while not self.now():
            if time.monotonic() - start > self.patience_s:
                self.patience_s = 0.0
                return False
            time.sleep(0.1)
        self.patience_s -= time.monotonic() - start
        return True

    def measure(self, source: Callable[[], float]) -> float:
        """One value, undisturbed if that can be had."""
        self.measured += 1
        for _ in range(TRIES):
            quiet = self.wait()
            value = source()
            if quiet and self.now():
                return value
            self.repeated += 1
            if not quiet:
                break
        self.disturbed += 1
        return value

    def pair(self, source: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """As :meth:`measure`, of two values that are compared: both count or none."""
        found: list[tuple[float, float]] = []

        def once() -> float:
            found.append(source())
            return 0.0

        self.measure(once)
        return found[-1]

    def summary(self) -> str:
        return f"{self.measured} values measured; {self.repeated} measurements were disturbed, {self.disturbed} of them count all the same"
