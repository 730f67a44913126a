"""A stalled interpreter delays nobody's I/O."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hostile.front_end import READ_IN, FrontEnd
from hostile.process import CORE, Perf, until

# A process with a stack, whose one thread of Python then holds the GIL for five seconds in a C call that does not release it.
HOLDER = """
import asyncio, ctypes, sys, time
import qpair

async def main():
    async with qpair.Stack(cores=CORE, pin=False, vhost_dir=sys.argv[1]) as stack:
        for name in ("a", "b"):
            await stack.malloc(name, "16MiB")
            await stack.export(name, name)
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        begin = time.monotonic()
        if sys.argv[2] == "hold":
            ctypes.PyDLL(None).sleep(5)
        else:
            await asyncio.sleep(5)
        print(time.monotonic() - begin, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)

asyncio.run(main())
"""


def under_load(folder: Path, mode: str) -> tuple[dict[str, Any], float, int]:
    """What ``qpair perf`` measures while the interpreter of the server holds, or sleeps; the longest answer that a second disk's front end saw,
    and how many."""
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER.replace("CORE", str(CORE)), str(folder), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "ready\n"
            with FrontEnd(folder / "b").ready() as front_end:
                perf = Perf(f"vhost:{folder / 'a'}", "--depth", "4", "--time", "7", "--pattern", "randrw", "--verify")
                # The load has attached, which takes the interpreter of the server, and runs.
                until(lambda: (folder / "a").exists() and _started(front_end), "the load")
                time.sleep(1.5)
                holder.stdin.write("\n")
                holder.stdin.flush()
                longest, ios, end = 0.0, 0, time.monotonic() + 4.5
                while time.monotonic() < end:
                    before = time.monotonic()
                    assert front_end.io(front_end.queues[0], READ_IN, ios % 1000, 512, timeout_s=4)[0] == 0
                    longest, ios = max(longest, time.monotonic() - before), ios + 1
                    time.sleep(0.001)
                held = float(holder.stdout.readline())
                assert held >= 5
                return perf.result(), longest, ios
        finally:
            holder.stdin.write("\n")
            holder.stdin.flush()
            holder.wait(20)


def _started(front_end: FrontEnd) -> bool:
    return front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0


@pytest.mark.timeout(120)
def test_a_gil_held_for_five_seconds_leaves_no_gap_in_completions(tmp_path: Path) -> None:
    control, _, _ = under_load(tmp_path / "control", "sleep")
    result, longest, ios = under_load(tmp_path / "held", "hold")
    told = json.dumps({"held": result["max_gap_ns"], "control": control["max_gap_ns"], "longest_s": longest, "ios": ios})
    assert (result["errors"], result["verify_errors"]) == (0, 0)
    assert result["ios"] > 1000
    assert result["max_gap_ns"] < 1_000_000_000, told
    assert result["elapsed_s"] > 6.5
    assert longest < 1, told
    assert ios > 100, told
