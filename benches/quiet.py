"""Which measurements of a shared machine count.

A virtual core may be one of two threads of a physical core. When the other one is busy, be it a stranger or this machine's own second
core, it runs at half its speed, for seconds or minutes. A probe says so in 20 ms: a loop that fills the execution units (``pace``). A value
counts if the probe found all cores at their full pace right before it and right after it. The first try is made at once; a disturbed one is made
again in the next quiet moment, as long as patience lasts, and of tries that were all disturbed the least disturbed one is kept and counted.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parent.parent
#: A pace below this part of the best one seen is a disturbance.
FULL = 0.93
#: How much longer than undisturbed a whole run may take; and one of its figures, which many values may make up.
PATIENCE_S = 600.0
FIGURE_PATIENCE_S = 90.0
#: How long to wait for a quiet moment before a value is measured again, and how often it is.
WAIT_S = 3.0
TRIES = 6


Value = TypeVar("Value")


class Quiet:
    """The probe, the best pace it has seen, and what became of the measurements."""

    def __init__(self, cores: list[int]) -> None:
        self.cores = [str(core) for core in dict.fromkeys(cores)]
        self.best = 0.0
        self.patience_s = PATIENCE_S
        self.figure_s = FIGURE_PATIENCE_S
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
            self.pace()

    def pace(self) -> float:
        """The slowest core's pace just now, as a part of the best pace seen."""
        done = subprocess.run([ROOT / "target/release/examples/pace", *self.cores], stdout=subprocess.PIPE, check=True)
        paces: list[float] = json.loads(done.stdout)["pace"]
        self.best = max(self.best, *paces)
        return min(paces) / self.best

    def figure(self) -> None:
        """The next figure begins: what the ones before it left of their patience is not its own."""
        self.figure_s = FIGURE_PATIENCE_S

    def wait(self) -> float:
        """Waits for a quiet moment, a while; the pace then."""
        give_up = time.monotonic() + WAIT_S
        while (pace := self.pace()) < FULL and time.monotonic() < give_up:
            time.sleep(0.1)
        return pace

    def measure(self, source: Callable[[], Value]) -> Value:
        """One value, undisturbed if that can be had."""
        self.measured += 1
        before = self.pace()
        value = source()
        kept, best = value, min(before, self.pace())
        for _ in range(TRIES - 1):
            if best >= FULL or min(self.patience_s, self.figure_s) <= 0:
                break
            self.repeated += 1
            start = time.monotonic()
            before = self.wait()
            value = source()
            pace = min(before, self.pace())
            if pace > best:
                kept, best = value, pace
            spent = time.monotonic() - start
            self.patience_s -= spent
            self.figure_s -= spent
        self.disturbed += best < FULL
        return kept

    def summary(self) -> str:
        return f"{self.measured} values measured; {self.repeated} tries were disturbed and made again, {self.disturbed} values count although all their tries were"
