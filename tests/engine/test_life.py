"""The engine's life: start, events, stop, and what a fork or a crash of order does to it."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from qpair import _engine as native

START_SECONDS_MAX = 0.05


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def threads() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        # A thread may end between the listing and the look: then it is gone, which is what is asked.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{task}/comm") as comm:
            names.append(comm.read().strip())
    return [name for name in names if name.startswith("reactor_")]


def until_threads(expected: list[str]) -> None:
    """A thread that ends by itself is gone a moment after it said so."""
    end = time.monotonic() + 10
    while threads() != expected:
        assert time.monotonic() < end, f"threads left: {threads()}"
        time.sleep(0.01)


def test_an_engine_starts_fast(start: Callable[..., Any]) -> None:
    took = []
    for _ in range(5):
        before = time.perf_counter()
        start()
        took.append(time.perf_counter() - before)
    assert min(took) < START_SECONDS_MAX


def test_a_reactor_is_a_thread_of_its_core(start: Callable[..., Any]) -> None:
    core = sorted(os.sched_getaffinity(0))[-1]
    engine = start(cores=[core], pin=True).engine
    (reactor,) = engine.reactors()
    assert reactor["lcore"] == core
    assert os.sched_getaffinity(reactor["tid"]) == {core}
    assert reactor["driver"] == engine.driver
    assert reactor["responsive"] is True
    assert reactor["turns"] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cores": []}, "Invalid argument: cores of 0 entries: 1 to 1024 entries"),
        ({"cores": [0, 0]}, "Invalid argument: cores 0: each core once"),
        ({"cores": [-1]}, "Invalid argument: cores -1: 0 to 1023"),
        ({"cores": [2**200]}, f"Invalid argument: cores {2**127 - 1}: 0 to 1023"),
        ({"driver": "aio"}, "Invalid argument: driver aio: auto, io_uring or epoll"),
        ({"spin_us": 2_000_000}, "Invalid argument: spin_us 2000000: 0 to 1000000"),
        ({"ios_per_reactor": 1}, "Invalid argument: ios_per_reactor 1: 256 to 1048576"),
    ],
)
def test_impossible_options_are_refused_by_name_and_limit(options: dict[str, Any], text: str) -> None:
    with pytest.raises(native.EngineError) as caught:
        native.Engine(**options)
    assert (caught.value.errno, caught.value.strerror) == (errno.EINVAL, text)


def test_a_core_that_does_not_exist_is_refused_and_leaves_no_thread() -> None:
    before = threads()
    with pytest.raises(native.EngineError) as caught:
        native.Engine(cores=[0, 1023], pin=True)
    assert caught.value.strerror.startswith("reactor 1023: core 1023: ")
    until_threads(before)


def test_the_descriptor_is_readable_exactly_while_events_wait(start: Callable[..., Any]) -> None:
    driver = start()
    engine = driver.engine
    while driver.drain():
        pass
    assert not readable(engine.event_fd)
    tokens = [engine.bdev_null_create(f"n{i}", num_blocks=8, block_size=512) for i in range(3)]
    seen = []
    while readable(engine.event_fd):
        (event,) = engine.events(1)
        seen.append(event)
    assert [event.token for event in seen if isinstance(event, native.Reply)] == tokens
    assert [event.name for event in seen if isinstance(event, native.BdevEvent)] == ["n0", "n1", "n2"]
    assert engine.events() == []


def test_stop_answers_every_token_exactly_once(driver: Any) -> None:
    engine = driver.engine
    ring = engine.bdev_python_create("slow", num_blocks=64, block_size=512)
    descriptor = driver.open("slow")
    memory = driver.open(driver.malloc())
    tokens = [engine.bdev_io(descriptor, "read", i, 1) for i in range(20)]
    tokens += [engine.bdev_io(memory, "read", i, 1) for i in range(20)]
    tokens += [engine.bdev_iostat(), engine.bdev_unregister("slow", deadline_ms=60_000), engine.bdev_resize("m0", 128)]
    engine.stop(3000)
    while driver.drain():
        pass
    assert sorted(driver.replies) == sorted(set(driver.replies) | set(tokens))
    assert {token: len(driver.replies[token]) for token in tokens} == dict.fromkeys(tokens, 1)
    del ring


def test_stop_is_idempotent_and_ends_the_threads(start: Callable[..., Any]) -> None:
    before = threads()
    driver = start()
    assert len(threads()) == len(before) + 1
    others = [threading.Thread(target=driver.engine.stop) for _ in range(4)]
    for thread in others:
        thread.start()
    driver.engine.stop()
    for thread in others:
        thread.join()
    assert threads() == before
    driver.engine.stop()


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.bdev_info(),
        lambda engine: engine.bdev_iostat(),
        lambda engine: engine.reactors(),
        lambda engine: engine.bdev_open("m0"),
        lambda engine: engine.bdev_null_create("n", num_blocks=8, block_size=512),
        lambda engine: engine.bdev_claim("m0", "me"),
    ],
)
def test_a_stopped_engine_refuses_calls(start: Callable[..., Any], call: Callable[[Any], Any]) -> None:
    driver = start()
    driver.engine.stop()
    with pytest.raises(native.EngineError) as caught:
        call(driver.engine)
    assert (caught.value.errno, caught.value.strerror) == (errno.ESHUTDOWN, "the engine is stopped")


def test_an_engine_that_is_dropped_stops_by_itself() -> None:
    before = threads()
    engine = native.Engine(cores=[0], pin=False)
    engine.bdev_malloc_create("m0", num_blocks=8, block_size=512)
    del engine
    gc.collect()
    until_threads(before)


def test_fifty_engines_leave_no_descriptor_and_no_thread() -> None:
    def once() -> None:
        engine = native.Engine(cores=[0], pin=False)
        engine.bdev_malloc_create("m0", num_blocks=8, block_size=512)
        descriptor = engine.bdev_open("m0")
        engine.bdev_io(descriptor, "write", 0, 1, bytes(512))
        engine.stop()

    once()
    gc.collect()
    descriptors, running = len(os.listdir("/proc/self/fd")), len(threads())
    for _ in range(50):
        once()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), len(threads())) == (descriptors, running)


FORK = """
import errno, gc, os, sys
from qpair import _engine
engine = _engine.Engine(cores=[0], pin=False)
engine.bdev_malloc_create("m0", num_blocks=8, block_size=512)
ring = engine.bdev_python_create("p0", num_blocks=8, block_size=512)
parent = os.getpid()
child = os.fork()
if child == 0:
    refused = 0
    for call in (engine.events, engine.bdev_info, engine.stop, engine.reactors, lambda: engine.bdev_open("m0"), ring.fetch, ring.close):
        try:
            call()
        except _engine.EngineError as error:
            assert error.errno == errno.ESHUTDOWN, error
            assert f"process {parent}" in error.strerror and "fork" in error.strerror, error
            refused += 1
    del engine, ring
    gc.collect()
    os._exit(0 if refused == 7 else 1)
_, status = os.waitpid(child, 0)
names = [info["name"] for info in engine.bdev_info()]
engine.stop()
sys.exit(0 if os.waitstatus_to_exitcode(status) == 0 and names == ["m0", "p0"] else 1)
"""


def test_a_forked_child_is_refused_by_name_and_harms_nothing() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=30, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interpreter_may_end_with_an_engine_running() -> None:
    code = "from qpair import _engine; e = _engine.Engine(cores=[0], pin=False); e.bdev_null_create('n', num_blocks=8, block_size=512)"
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_classes_of_events_cannot_be_made_or_changed(start: Callable[..., Any]) -> None:
    driver = start()
    token = driver.engine.bdev_null_create("n", num_blocks=8, block_size=512)
    reply = driver.reply(token)
    with pytest.raises(TypeError):
        native.Reply()
    with pytest.raises(AttributeError):
        reply.token = 7
    assert isinstance(reply, native.Event)
