"""The blocking twin does what the stack does, without a loop of the caller's."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qpair import Bdev, BdevHandle, BlockingStack, OpenBdev, Stack
from qpair.app.blocking import BlockingDisk, BlockingEvents, BlockingObject, BlockingOpenBdev, BlockingPerfRun
from qpair.bdev.events import EventReader
from qpair.bdev.perf import PerfRun
from qpair.errors import Busy, ForkedStack, InvalidArgument, NoSuchBdev, StackStopped

CORE = min(os.sched_getaffinity(0))


@pytest.fixture
def blocking(engine_factory: Callable[..., Any], tmp_path: Path) -> Iterator[BlockingStack]:
    with BlockingStack(cores=CORE, pin=False, vhost_dir=tmp_path, engine_factory=engine_factory) as stack:
        yield stack


# What is of the loop itself, and has no meaning elsewhere.
NOT_TWINNED = {Stack: {"engine", "bridge", "rest", "stop_listening"}}  # what qpair serve does with a stack


def public(of: type) -> dict[str, Any]:
    return {name: getattr(of, name) for name in dir(of) if not name.startswith("_")} | {
        name: getattr(of, name) for name in ("__next__", "__enter__") if hasattr(of, name)
    }


@pytest.mark.parametrize(
    ("real", "twin"),
    [
        (Stack, BlockingStack),
        (BdevHandle, BlockingDisk),
        (OpenBdev, BlockingOpenBdev),
        (PerfRun, BlockingPerfRun),
        (EventReader, BlockingEvents),
    ],
)
def test_whatever_the_async_api_offers_has_its_blocking_twin(real: type, twin: type) -> None:
    offered = {name: value for name, value in public(real).items() if name not in NOT_TWINNED.get(real, set())}
    # what the bus calls is no API of its readers
    offered.pop("put", None)
    assert sorted(set(offered) - set(public(twin))) == [], f"{twin.__name__} lacks these of {real.__name__}"
    for name, value in offered.items():
        made = getattr(twin, name)
        assert not inspect.iscoroutinefunction(made), name
        assert not inspect.isasyncgenfunction(made), name
        if not callable(value):
            continue
        wanted, given = (inspect.signature(function).parameters for function in (value, made))
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in given.values())
        for parameter in wanted.values():
            assert parameter.name in given or takes_any, f"{twin.__name__}.{name} lacks parameter {parameter.name}"
            if parameter.name in given:
                assert given[parameter.name].default == parameter.default, f"{twin.__name__}.{name}: another default of {parameter.name}"
    for name in ("__aenter__", "__aexit__", "__aiter__", "__anext__"):
        if hasattr(real, name):
            assert hasattr(twin, "__" + name[3:]), name


def test_rooms_of_the_stack_have_their_twins(blocking: BlockingStack) -> None:
    rooms = {name for name, kind in inspect.get_annotations(Stack).items() if str(kind).endswith("Subsystem")}
    assert {"bdevs", "vhost", "virtio"} <= rooms
    for name in rooms:
        assert isinstance(getattr(blocking, name), BlockingObject)
    disk = blocking.bdevs.create_null("n0", "1MiB")
    assert isinstance(disk, BlockingDisk)
    assert [info.name for info in blocking.bdevs.infos()] == ["n0"]
    assert blocking.bdevs.info("n0").num_blocks == 2048
    with pytest.raises(NoSuchBdev, match="no bdev is named 'x'"):
        blocking.bdevs.info("x")
    assert "create_malloc" in dir(blocking.bdevs)


def test_a_disk_is_written_read_measured_and_deleted(blocking: BlockingStack, tmp_path: Path) -> None:
    disk = blocking.malloc("m0", "1MiB")
    assert disk.size_bytes == 1 << 20
    disk.write(512, b"x" * 1024)
    disk.flush()
    assert disk.read(512, 1024) == b"x" * 1024
    disk.write_zeroes(512, 512)
    assert disk.read(512, 512) == bytes(512)
    disk.close()
    assert blocking.measure(disk, ios=100, depth=4).ios >= 100
    assert blocking.rpc("bdev_get_bdevs", name="m0")[0]["num_blocks"] == 2048
    blocking.save_config(tmp_path / "c.json")
    blocking.delete(disk)
    with pytest.raises(NoSuchBdev):
        _ = disk.info
    blocking.load_config(tmp_path / "c.json")
    assert blocking.rpc("bdev_get_bdevs")[0]["name"] == "m0"
    assert [call["method"] for call in blocking.config("bdev")] == ["bdev_malloc_create", "bdev_wait_for_examine"]


def test_descriptors_of_ones_own_are_closed_by_with(blocking: BlockingStack) -> None:
    disk = blocking.malloc("m0", "1MiB")
    blocking.rpc("bdev_wait_for_examine")  # who looks for partitions has it open meanwhile
    with disk.open() as opened, blocking.open("m0", write=False) as other:
        opened.write(0, b"y" * 512)
        assert other.read(0, 512) == b"y" * 512
        assert opened.block_size == 512
        assert disk.info.open_count == 2
    assert disk.info.open_count == 0
    with pytest.raises(StackStopped, match="this descriptor is closed"):
        opened.read(0, 512)


def test_a_disk_is_deleted_with_the_descriptor_it_keeps(blocking: BlockingStack) -> None:
    for delete in (blocking.delete, lambda disk: disk.delete()):
        disk = blocking.malloc("m0", "1MiB")
        disk.write(0, bytes(512))
        began = time.monotonic()
        delete(disk)
        assert time.monotonic() - began < 5, "its own descriptor held it up"
        with pytest.raises(NoSuchBdev):
            blocking.disk("m0")


def test_threads_share_one_descriptor_of_a_disk(blocking: BlockingStack) -> None:
    disk = blocking.malloc("m0", "1MiB")
    threads = [threading.Thread(target=disk.write, args=(number * 512, bytes([number]) * 512)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert disk.read(0, 4096) == b"".join(bytes([number]) * 512 for number in range(8))
    assert disk.info.open_count == 1


def test_events_are_iterated_from_the_call_on(blocking: BlockingStack) -> None:
    blocking.null("before", "1MiB")
    events = blocking.events(timeout_s=0.2)
    blocking.null("n0", "1MiB")
    disk = blocking.disk("n0")
    disk.resize("2MiB")
    disk.delete()
    assert [(event.kind, event.bdev) for event in events] == [("appeared", "n0"), ("resized", "n0"), ("vanished", "n0")]
    blocking.null("n1", "1MiB")
    assert next(events).bdev == "n1", "a time-out loses nothing"
    events.close()
    assert list(events) == []


def test_iteration_ends_with_the_stack_after_what_was_told(engine_factory: Callable[..., Any]) -> None:
    with BlockingStack(cores=CORE, pin=False, engine_factory=engine_factory) as stack:
        seen: list[str] = []
        watcher = threading.Thread(target=lambda: seen.extend(event.kind for event in stack.events()))
        watcher.start()
        unread = stack.events()
        stack.null("n0", "1MiB")
        while not seen:
            time.sleep(0.01)
    watcher.join(10)
    assert not watcher.is_alive()
    assert seen == ["appeared"]
    assert [event.kind for event in unread] == ["appeared"]
    assert list(unread) == []


def test_a_run_is_watched_and_stopped(blocking: BlockingStack) -> None:
    run = blocking.perf(blocking.null("n0", "1GiB"), seconds=30, depth=4)
    seen = []
    for snapshot in run.progress(0.05):
        seen.append(snapshot.ios)
        if len(seen) == 3:
            run.stop()
    assert seen == sorted(seen)
    assert run.result().ios >= seen[-1] > 0


def test_an_export_is_a_context_manager(blocking: BlockingStack, tmp_path: Path) -> None:
    blocking.malloc("m0", "1MiB")
    with blocking.export("m0", "m0.sock") as controller:
        assert controller.socket == str(tmp_path / "m0.sock")
        assert (tmp_path / "m0.sock").is_socket()
        assert controller.info()["bdev"] == "m0"
        blocking.virtio.attach("v0", controller.socket)
        blocking.disk("v0").write(0, b"z" * 512)
        blocking.virtio.detach("v0")
    assert not (tmp_path / "m0.sock").exists()
    assert blocking.disk("m0").read(0, 512) == b"z" * 512


def test_the_stack_answers_json_rpc(blocking: BlockingStack, socket_path: str) -> None:
    from qpair.rpc.client import RpcClient

    server = blocking.listen(socket_path)
    with RpcClient(socket_path) as client:
        client.call("bdev_null_create", name="n0", num_blocks=8, block_size=512)
    assert server.bound == socket_path
    assert [info.name for info in blocking.bdevs.infos()] == ["n0"]
    server.stop()
    assert not os.path.exists(socket_path)


def test_it_waits_for_rpc_as_the_stack_does(engine_factory: Callable[..., Any]) -> None:
    stack = BlockingStack(cores=CORE, pin=False, engine_factory=engine_factory, wait_for_rpc=True).start()
    assert stack.state == "startup"
    stack.start_subsystems()
    stack.wait_ready()
    assert stack.state == "runtime"
    assert stack.cores == [CORE]
    assert [reactor["lcore"] for reactor in stack.reactors()] == [CORE]
    stack.stop()
    stack.stop()
    assert stack.state == "stopped"


def test_errors_are_the_same(blocking: BlockingStack) -> None:
    with pytest.raises(InvalidArgument, match="no multiple of block_size"):
        blocking.malloc("m0", 1000)


def test_outside_of_with_it_is_stopped_and_no_thread_stays(engine_factory: Callable[..., Any]) -> None:
    before = threading.active_count()
    stack = BlockingStack(cores="1023")
    with pytest.raises(InvalidArgument, match="core 1023 is not usable"):
        stack.__enter__()
    assert threading.active_count() == before
    with pytest.raises(StackStopped, match="use it inside 'with', or call start"):
        stack.malloc("m0", "1MiB")
    with BlockingStack(cores=CORE, pin=False, engine_factory=engine_factory) as used:
        disk = used.null("n0", "1MiB")
        with pytest.raises(StackStopped, match="a stack starts once; this one is runtime"):
            used.start()
    assert threading.active_count() == before
    with pytest.raises(StackStopped, match="the stack is stopped"):
        disk.read(0, 512)
    with pytest.raises(StackStopped, match="a stack starts once; this one is stopped"):
        used.start()


async def test_it_works_beside_a_running_loop(engine_factory: Callable[..., Any]) -> None:
    """As in a notebook, whose cells run inside a loop."""
    assert asyncio.get_running_loop().is_running()
    stack = BlockingStack(cores=CORE, pin=False, engine_factory=engine_factory).start()
    disk = stack.malloc("m0", "1MiB")
    disk.write(0, b"n" * 512)
    assert disk.read(0, 512) == b"n" * 512
    stack.stop()


class Asking(Bdev):
    """Its read asks its own stack, blockingly."""

    def __init__(self) -> None:
        super().__init__("p0", "1MiB")
        self.stack: BlockingStack | None = None
        self.refusal: BaseException | None = None

    def read(self, requests: Any) -> None:
        assert self.stack is not None
        try:
            self.stack.rpc("bdev_get_bdevs")
        except Busy as error:
            self.refusal = error


def test_a_blocking_call_on_the_control_thread_is_refused(blocking: BlockingStack) -> None:
    bdev = Asking()
    bdev.stack = blocking
    assert blocking.add(bdev).read(0, 512) == bytes(512)
    assert "would wait for itself" in str(bdev.refusal)


def test_a_forked_child_is_told_by_name(blocking: BlockingStack) -> None:
    disk = blocking.null("n0", "1MiB")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            disk.read(0, 512)
        except ForkedStack as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read().decode() == f"this stack belongs to process {os.getpid()}, of which this one is a fork; start a new stack"
    os.waitpid(child, 0)


def test_a_dropped_stack_warns_and_is_stopped_without_waiting(engine_factory: Callable[..., Any]) -> None:
    before = threading.active_count()
    stack = BlockingStack(cores=CORE, pin=False, engine_factory=engine_factory).start()
    real = stack._real
    held = [stack]
    del stack
    with pytest.warns(ResourceWarning, match="was dropped while running; use 'with' or stop"):
        held.clear()
    for _ in range(500):
        if threading.active_count() == before and real.state == "stopped":
            break
        time.sleep(0.02)
    assert (threading.active_count(), real.state) == (before, "stopped")


def test_a_disk_keeps_its_stack(engine_factory: Callable[..., Any]) -> None:
    def made() -> BlockingDisk:
        return BlockingStack(cores=CORE, pin=False, engine_factory=engine_factory).start().malloc("m0", "1MiB")

    disk = made()
    gc.collect()
    disk.write(0, bytes(512))
    disk._owner.stop()


def script(body: str) -> subprocess.Popen[str]:
    """``body`` as a program, with BlockingStack on the engine under test."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-W", "default", "-c", f"import qpair\nCORE = {CORE}\n" + body],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def test_ctrl_c_ends_a_call_that_waits_and_leaves_cleanly() -> None:
    body = """
with qpair.BlockingStack(cores=CORE, pin=False) as stack:
    disk = stack.null("n0", "1GiB")
    print("measuring", flush=True)
    try:
        stack.measure(disk, seconds=600)
    except KeyboardInterrupt:
        print("interrupted, and", disk.size_bytes, "bytes are still there")
print("stopped:", stack.state)
"""
    process = script(body)
    assert process.stdout is not None
    assert process.stdout.readline() == "measuring\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "interrupted, and 1073741824 bytes are still there\nstopped: stopped\n"), err


def test_a_script_that_forgets_to_stop_ends_all_the_same() -> None:
    process = script("stack = qpair.BlockingStack(cores=CORE, pin=False).start()\nprint(stack.malloc('m0', '1MiB').size_bytes)")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "1048576\n"), err
