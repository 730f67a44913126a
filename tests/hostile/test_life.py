"""Stacks in unusual lives: forked, dropped, two at once, in threads, at the interpreter's end, interrupted. Each in a process of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile.process import CORE, PROGRAM

HEAD = f"""
import asyncio, gc, os, sys, threading, time, warnings
import qpair
CORE = {CORE}
def make(**options):
    return qpair.Stack(cores=CORE, pin=False, vhost_dir=sys.argv[1], **options)
"""

LIVES: dict[str, tuple[str, str]] = {
    "forked with a load on": (
        """
async def main():
    async with make() as stack:
        disk = await stack.malloc("d", "4MiB")
        run = await stack.perf("d", seconds=2)
        pid = os.fork()
        if pid == 0:
            try:
                stack.engine
            except qpair.errors.ForkedStack as error:
                print("child:", "is a fork" in str(error) or str(error), flush=True)
            await stack.stop()
            del stack
            gc.collect()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        result = await run.result()
        print(result.errors, result.ios > 100)
asyncio.run(main())
""",
        "child: True\n7\n0 True\n",
    ),
    "forked by another thread, and the child exits as Python does": (
        """
ready, stop = threading.Event(), threading.Event()
def work():
    async def main():
        async with make() as stack:
            await stack.malloc("d", "4MiB")
            run = await stack.perf("d", seconds=2)
            ready.set()
            print((await run.result()).errors)
    asyncio.run(main())
thread = threading.Thread(target=work)
thread.start()
ready.wait()
if (pid := os.fork()) == 0:
    gc.collect()
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
thread.join()
""",
        "3\n0\n",
    ),
    "forked, and the child starts a stack of its own": (
        """
async def main():
    async with make() as stack:
        await stack.malloc("d", "4MiB")
        if (pid := os.fork()) == 0:
            asyncio.events._set_running_loop(None)
            async def other():
                async with make() as own:
                    disk = await own.malloc("mine", "1MiB")
                    await disk.write(0, b"x" * 512)
                    assert await disk.read(0, 512) == b"x" * 512
            asyncio.new_event_loop().run_until_complete(other())
            os._exit(5)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print((await stack.measure("d", seconds=0.2)).errors)
asyncio.run(main())
""",
        "5\n0\n",
    ),
    "dropped without stop": (
        """
warnings.simplefilter("ignore")
async def main():
    for number in range(10):
        stack = make()
        await stack.start()
        await stack.malloc("d", "4MiB")
        await stack.perf("d", seconds=60)
        await stack.export("d", f"d{number}")
        del stack
        gc.collect()
asyncio.run(main())
print("end")
""",
        "end\n",
    ),
    "two at once": (
        """
async def main():
    async with make() as one, make() as two:
        for stack, name in ((one, "one"), (two, "two")):
            await stack.malloc("same", "4MiB")
            await stack.export("same", name)
        results = await asyncio.gather(one.measure("same", seconds=0.5, verify=True, pattern="randrw"), two.measure("same", seconds=0.5, verify=True, pattern="randrw"))
        print([result.errors + result.verify_errors for result in results])
        await two.rpc("bdev_virtio_attach_controller", name="far", trtype="user", traddr=os.path.join(sys.argv[1], "one"), dev_type="blk")
        print((await two.measure("far", seconds=0.5, depth=4, verify=True, pattern="randrw")).verify_errors)
asyncio.run(main())
""",
        "[0, 0]\n0\n",
    ),
    "in threads, one each": (
        """
def work(number):
    async def main():
        async with make() as stack:
            await stack.malloc("d", "4MiB")
            assert (await stack.measure("d", seconds=0.3, depth=4)).errors == 0
    asyncio.run(main())
    os.write(1, b"done\\n")  # whole lines: print writes its end apart
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
""",
        "done\n" * 4,
    ),
    "the interpreter ends with a stack at work": (
        """
warnings.simplefilter("ignore")
loop = asyncio.new_event_loop()
async def main():
    global stack, run
    stack = make()
    await stack.start()
    await stack.malloc("d", "4MiB")
    await stack.export("d", "d")
    run = await stack.perf("d", seconds=60)
loop.run_until_complete(main())
print("end")
""",
        "end\n",
    ),
    "the interpreter ends with an exception and a stack at work": (
        """
async def main():
    async with make() as stack:
        await stack.malloc("d", "4MiB")
        await stack.perf("d", seconds=60)
        raise SystemExit(0)
asyncio.run(main())
""",
        "",
    ),
    "the interpreter ends while a daemon thread has a stack": (
        """
warnings.simplefilter("ignore")
ready = threading.Event()
def work():
    async def main():
        async with make() as stack:
            await stack.malloc("d", "4MiB")
            await stack.perf("d", seconds=60)
            ready.set()
            await asyncio.sleep(60)
    asyncio.run(main())
threading.Thread(target=work, daemon=True).start()
ready.wait()
print("end")
""",
        "end\n",
    ),
    "started and stopped a hundred times": (
        """
async def main():
    def look():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for number in range(100):
        async with make() as stack:
            disk = await stack.malloc("d", "1MiB")
            await stack.export("d", "d")
            await disk.write(0, b"x" * 512)
        if number == 10:
            gc.collect()
            before = look()
    await asyncio.sleep(0.3)
    gc.collect()  # a stack and its parts refer to each other
    after = look()
    print(after[0] <= before[0] + 1, after[1] <= before[1] + 1)
asyncio.run(main())
""",
        "True True\n",
    ),
    "stopped twice at once, and used afterwards": (
        """
async def main():
    stack = make()
    await stack.start()
    disk = await stack.malloc("d", "1MiB")
    await asyncio.gather(stack.stop(), stack.stop())
    try:
        await disk.read(0, 512)
    except qpair.errors.StackStopped as error:
        print(type(error).__name__)
asyncio.run(main())
""",
        "StackStopped\n",
    ),
}


@pytest.mark.parametrize("what", LIVES)
def test_a_stack_lives_through(what: str, tmp_path: Path) -> None:
    script, told = LIVES[what]
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", HEAD + script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == told, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Fatal" not in done.stderr, done.stderr


@pytest.mark.parametrize("target", ["malloc:16MiB", "null:1GiB"])
@pytest.mark.parametrize("after_s", [0.05, 0.3, 1.0, 2.0])
def test_an_interrupted_perf_ends_at_once_without_a_traceback(target: str, after_s: float) -> None:
    with subprocess.Popen([PROGRAM, "perf", target, "--time", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < 8
    if after_s >= 2.0:
        assert process.returncode == 130, (out, err)
        assert "IOPS" in out
        assert "Traceback" not in err, err
    else:  # Python itself may be starting
        assert process.returncode in (130, -signal.SIGINT, 1), (out, err)


def _shown(terminal: int, seconds: float) -> bytes:
    """What a terminal gets in that time."""
    shown, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            shown += os.read(terminal, 1 << 16)
    return shown


def test_an_interrupted_perf_leaves_the_terminal_as_it_was() -> None:
    leader, follower = pty.openpty()
    try:
        with subprocess.Popen([PROGRAM, "perf", "null:1GiB", "--time", "60"], stdin=follower, stdout=follower, stderr=follower) as process:
            shown = _shown(leader, 2.5)
            process.send_signal(signal.SIGINT)
            shown += _shown(leader, 3)
            assert process.wait(20) == 130
        assert shown.rfind(b"\x1b[?25h") >= shown.rfind(b"\x1b[?25l"), "the cursor is hidden"
        assert b"Traceback" not in shown
    finally:
        os.close(leader)
        os.close(follower)
