"""Python bdevs in processes of their own: what such a process does, or does not, is that bdev's affair alone."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qpair
from qpair.errors import AlreadyExists, InvalidArgument, NoSuchBdev, QpairError

DISKS = '''
import asyncio, ctypes, mmap, os, signal, sys, time
import qpair

class Ram(qpair.Bdev):
    """What block it reads first says how it misbehaves: the store is a file, so that a successor finds it."""

    def __init__(self, name, size="1MiB", store=None, **options):
        super().__init__(name, size, **options)
        file = os.open(store, os.O_RDWR | os.O_CREAT, 0o600) if store else os.memfd_create(name)
        os.ftruncate(file, self.size_bytes)
        self.store = mmap.mmap(file, self.size_bytes)
        self.kept = []

    def read(self, requests):
        for request in requests:
            request.data[:] = self.store[request.offset : request.end]

    def write(self, requests):
        for request in requests:
            self.store[request.offset : request.end] = request.data
            self.obey(bytes(request.data[:8]).rstrip(b"\\0"), request)

    def obey(self, order, request):
        if order == b"exit":
            os._exit(3)
        elif order == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif order == b"hang":
            time.sleep(3600)
        elif order == b"raise":
            raise RuntimeError("a defect")
        elif order == b"rubbish":
            # Whatever the engine reads of this process: every shared page that may be written.
            with open("/proc/self/maps") as maps:
                for line in maps:
                    if "qpair-worker" in line:
                        start, end = (int(part, 16) for part in line.split()[0].split("-"))
                        ctypes.memset(start, 0xA5, end - start)
            time.sleep(0.05)
        elif order == b"keep":
            self.kept.append(request.data[:])

class Slow(Ram):
    async def open(self):
        await asyncio.sleep(0.01)

    async def read(self, requests):
        await asyncio.sleep(0.01)
        super().read(requests)

class Grows(Ram):
    def __init__(self, name, store):
        super().__init__(name, 1 << 20 if not os.path.exists(store) else 2 << 20, store=store)

class Broken(qpair.Bdev):
    def __init__(self, name):
        raise ValueError("no such backend")

class Dies(qpair.Bdev):
    def __init__(self, name):
        os._exit(7)

class Odd(qpair.Bdev):
    def __init__(self, name):
        super().__init__(name, 1000)

class Second(Ram):
    """Made once, never again."""
    def __init__(self, name, flag):
        if os.path.exists(flag):
            raise RuntimeError("not twice")
        open(flag, "w").close()
        super().__init__(name)
'''


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "worker_disks.py").write_text(DISKS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


async def create(stack: Any, name: str = "w0", kind: str = "Ram", **params: Any) -> Any:
    assert await stack.rpc("qpair_python_create", name=name, **{"class": f"worker_disks:{kind}"}, **params) == name
    return await stack.open(name)


async def described(stack: Any, name: str = "w0") -> dict[str, Any]:
    (found,) = await stack.rpc("qpair_python_get_bdevs", name=name)
    result: dict[str, Any] = found
    return result


async def until(condition: Callable[[], Any], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        await asyncio.sleep(0.01)


def order(word: str) -> bytes:
    return word.encode().ljust(512, b"\0")


async def test_a_worker_keeps_what_was_written_and_ends_with_its_bdev(stack: Any, disks: Path) -> None:
    disk = await create(stack, size="2MiB", options={"block_size": 4096, "depth": 7, "max_io_bytes": 65536})
    data = random.Random(1).randbytes(2 << 20)
    await disk.write(0, data)
    assert await disk.read(0, 2 << 20) == data
    await disk.flush()
    with pytest.raises(QpairError) as refused:
        await disk.write_zeroes(0, 4096)
    assert refused.value.errno == errno.EOPNOTSUPP
    info = await described(stack)
    pid = info["pid"]
    assert (info["class"], info["state"], info["restarts"], info["last_failure"]) == ("worker_disks:Ram", "running", 0, None)
    assert pid not in (None, os.getpid())
    (shown,) = await stack.rpc("bdev_get_bdevs", name="w0")
    assert shown["driver_specific"]["python"] == {"class": "worker_disks:Ram", "state": "running", "pid": pid}
    await disk.close()
    assert await stack.rpc("qpair_python_delete", name="w0") is True
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert await stack.rpc("qpair_python_get_bdevs") == []
    with pytest.raises(NoSuchBdev):
        await stack.rpc("qpair_python_get_bdevs", name="w0")


async def test_io_waits_for_the_first_worker_even_where_it_is_to_fail_without_one(stack: Any, disks: Path) -> None:
    for number in range(5):
        disk = await create(stack, f"w{number}", while_down="fail")
        assert await disk.read(0, 512) == bytes(512)
        await disk.close()


async def test_an_async_class_serves_many_requests_at_once(stack: Any, disks: Path) -> None:
    disk = await create(stack, kind="Slow")
    before = time.monotonic()
    assert all(answer == bytes(512) for answer in await asyncio.gather(*(disk.read(512 * number, 512) for number in range(100))))
    assert time.monotonic() - before < 1
    await disk.close()


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("exit", "the worker exited with 3"),
        ("kill", "the worker was killed by SIGKILL"),
        ("hang", "the worker has not answered for 200 ms"),
        ("rubbish", "the worker broke the ring: "),
    ],
)
async def test_a_worker_that_fails_fails_alone_and_comes_back(stack: Any, disks: Path, word: str, why: str) -> None:
    """What it had fails with EIO, once; what comes meanwhile waits for the next worker; another bdev notices nothing."""
    disk = await create(stack, options={"store": str(disks / "store")}, timeout_ms=200, backoff_ms=10)
    other = await create(stack, "w1")
    await disk.write(4096, b"k" * 512)
    first = (await described(stack))["pid"]
    fatal = asyncio.ensure_future(disk.write(0, order(word)))
    await asyncio.sleep(0.02)
    assert await asyncio.wait_for(other.read(0, 512), 1) == bytes(512)
    with pytest.raises(QpairError) as failed:
        await asyncio.wait_for(fatal, 20)
    assert failed.value.errno == errno.EIO
    assert await asyncio.wait_for(disk.read(4096, 512), 20) == b"k" * 512
    info = await described(stack)
    assert (info["state"], info["restarts"]) == ("running", 1)
    assert info["last_failure"].startswith(why)
    assert info["pid"] != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert (await described(stack, "w1"))["restarts"] == 0
    await disk.close()
    await other.close()


async def test_a_method_that_raises_fails_its_requests_and_the_worker_goes_on(stack: Any, disks: Path) -> None:
    disk = await create(stack)
    with pytest.raises(QpairError) as failed:
        await disk.write(0, order("raise"))
    assert failed.value.errno == errno.EIO
    assert await disk.read(512, 512) == bytes(512)
    assert (await described(stack))["restarts"] == 0
    await disk.close()


async def test_a_view_kept_in_a_worker_is_never_written_again(stack: Any, disks: Path) -> None:
    disk = await create(stack, options={"depth": 1})
    for _ in range(3):
        await disk.write(0, order("keep"))
    for number in range(20):
        await disk.write(0, bytes([number]) * 512)
    assert await disk.read(0, 512) == b"\x13" * 512
    assert (await described(stack))["restarts"] == 0
    await disk.close()


async def test_what_is_not_to_wait_fails_while_there_is_no_worker(stack: Any, disks: Path) -> None:
    disk = await create(stack, while_down="fail", backoff_ms=60_000, backoff_max_ms=60_000)
    with pytest.raises(QpairError):
        await disk.write(0, order("exit"))
    with pytest.raises(QpairError) as failed:
        await asyncio.wait_for(disk.read(0, 512), 5)
    assert failed.value.errno == errno.EIO
    await disk.close()
    await asyncio.wait_for(stack.delete("w0"), 5)


async def test_with_no_restart_all_fails_until_it_is_deleted(stack: Any, disks: Path) -> None:
    disk = await create(stack, restart="never")
    with pytest.raises(QpairError):
        await disk.write(0, order("kill"))
    with pytest.raises(QpairError) as failed:
        await asyncio.wait_for(disk.read(0, 512), 5)
    assert failed.value.errno == errno.EIO
    assert [(await described(stack))[field] for field in ("state", "pid", "last_failure")] == [
        "failed",
        None,
        "the worker was killed by SIGKILL",
    ]
    await disk.close()
    await stack.delete("w0")
    await (await create(stack)).close()


async def test_restarts_end_at_their_maximum_and_what_waited_fails(stack: Any, disks: Path) -> None:
    disk = await create(stack, kind="Second", options={"flag": str(disks / "flag")}, restart_max=2, backoff_ms=10)
    with pytest.raises(QpairError):
        await disk.write(0, order("exit"))
    with pytest.raises(QpairError) as failed:
        await asyncio.wait_for(disk.read(0, 512), 30)
    assert failed.value.errno == errno.EIO
    info = await described(stack)
    assert (info["state"], info["restarts"]) == ("failed", 0)
    assert info["last_failure"] == "the worker could not be started again: bdev 'w0': RuntimeError: not twice"
    await disk.close()


async def test_a_worker_that_comes_back_with_another_size_is_refused(stack: Any, disks: Path) -> None:
    disk = await create(stack, kind="Grows", options={"store": str(disks / "store")}, backoff_ms=10)
    with pytest.raises(QpairError):
        await disk.write(0, order("exit"))
    with pytest.raises(QpairError):
        await asyncio.wait_for(disk.read(0, 512), 20)
    info = await described(stack)
    assert info["state"] == "failed"
    assert "came back as Geometry(size_bytes=2097152" in info["last_failure"]
    await disk.close()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("worker_disks:Broken", "bdev 'w0': ValueError: no such backend"),
        ("worker_disks:Dies", "bdev 'w0': the worker exited with 7 before it was ready"),
        ("worker_disks:Odd", "bdev 'w0': size 1000 is no multiple of block_size 512"),
        ("worker_disks:Nobody", "bdev 'w0': AttributeError: module 'worker_disks' has no attribute 'Nobody'"),
        ("no_such_module:Ram", "bdev 'w0': ModuleNotFoundError: No module named 'no_such_module'"),
        ("worker_disks", "bdev 'w0': LookupError: class 'worker_disks': it must be module:Class"),
        ("os:getpid", "bdev 'w0': TypeError: os:getpid is no subclass of qpair.Bdev"),
    ],
)
async def test_what_cannot_be_made_is_refused_in_its_own_words(stack: Any, disks: Path, target: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await stack.rpc("qpair_python_create", name="w0", **{"class": target})
    assert str(refused.value) == text
    assert stack.bdevs.infos() == []
    await (await create(stack)).close()


async def test_a_name_in_use_and_parameters_past_their_limits_are_refused(stack: Any, disks: Path) -> None:
    await stack.malloc("w0", "1MiB")
    with pytest.raises(AlreadyExists):
        await create(stack)
    with pytest.raises(InvalidArgument, match="parameter 'restart_max': 1000001 is past 1000000"):
        await create(stack, "w1", restart_max=1_000_001)
    with pytest.raises(InvalidArgument, match="parameter 'options': 'name' is a parameter of its own"):
        await create(stack, "w1", options={"name": "x"})


async def test_the_configuration_brings_it_back(make_stack: Any, disks: Path, tmp_path: Path) -> None:
    options = {"store": str(disks / "store")}
    async with make_stack() as first:
        disk = await create(first, size="2MiB", options=options, timeout_ms=1234, restart_max=3)
        await disk.write(0, b"s" * 512)
        await disk.close()
        before = first.bdevs.info("w0")
        first.save_config(tmp_path / "config.json")
    (entry,) = [
        call
        for subsystem in json.loads((tmp_path / "config.json").read_text())["subsystems"]
        for call in subsystem["config"] or []
        if call["method"] == "qpair_python_create"
    ]
    assert (entry["params"]["timeout_ms"], entry["params"]["restart_max"]) == (1234, 3)
    async with make_stack() as second:
        await second.load_config(tmp_path / "config.json")
        async with await second.open("w0") as disk:
            assert await disk.read(0, 512) == b"s" * 512
        after = second.bdevs.info("w0")
        assert (after.uuid, after.num_blocks) == (before.uuid, before.num_blocks)


async def test_the_api_takes_a_class(stack: Any, disks: Path) -> None:
    import worker_disks  # type: ignore[import-not-found]

    handle = await stack.add(worker_disks.Ram, process=True, name="w0", size="3MiB", timeout_ms=500)
    assert handle.size_bytes == 3 << 20
    assert (await described(stack))["timeout_ms"] == 500
    with pytest.raises(InvalidArgument, match=r"stack\.add takes the class"):
        await stack.add(qpair.Bdev("w1", "1MiB"), process=True)
    with pytest.raises(InvalidArgument, match=r"stack\.add takes an object"):
        await stack.add(worker_disks.Ram)

    class Local(worker_disks.Ram):  # type: ignore[misc]
        pass

    with pytest.raises(InvalidArgument, match="it must be at the top of a module"):
        await stack.add(Local, process=True, name="w1")


async def test_a_stack_stops_with_a_worker_that_hangs(make_stack: Any, disks: Path, caplog: pytest.LogCaptureFixture) -> None:
    stack = make_stack(stop_deadline_ms=2000)
    await stack.start()
    disk = await create(stack)
    pid = (await described(stack))["pid"]
    hanging = asyncio.ensure_future(disk.write(0, order("hang")))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(stack.stop(), 20)
    with pytest.raises(QpairError):
        await asyncio.wait_for(hanging, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert "abandoned" not in caplog.text, "there was time to end it"


async def test_a_load_goes_through_deaths_and_each_io_ends(stack: Any, disks: Path) -> None:
    disk = await create(stack, options={"store": str(disks / "store")}, backoff_ms=1, backoff_max_ms=5, restart_max=1000)
    run = await stack.perf("w0", depth=64, seconds=2)
    for _ in range(4):
        await asyncio.sleep(0.3)
        if (pid := (await described(stack))["pid"]) is not None:
            os.kill(pid, signal.SIGKILL)
    result = await asyncio.wait_for(run.result(), 20)
    assert result.ios > result.errors > 0
    assert (await described(stack))["restarts"] >= 2
    await disk.close()


async def test_under_serve_a_worker_dies_with_its_server(disks: Path, tmp_path: Path, qpair_command: list[str], client: Any) -> None:
    """The server is killed while its worker hangs in a method: nothing of it is left."""
    address = str(tmp_path / "rpc.sock")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    server = await asyncio.create_subprocess_exec(
        *qpair_command,
        "serve",
        "-r",
        address,
        "-m",
        "0x1",
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await until(lambda: Path(address).exists(), "the server")
        call = [*qpair_command, "rpc", "-r", address]
        code, _, error = await client(*call, "qpair_python_create", "--name", "w0", "--class", "worker_disks:Ram", "--size", "1MiB")
        assert code == 0, error
        code, out, error = await client(*call, "qpair_python_get_bdevs")
        assert code == 0, error
        pid = json.loads(out)[0]["pid"]
        os.kill(pid, signal.SIGSTOP)
    finally:
        server.kill()
        await server.wait()

    def is_gone() -> bool:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True

    await until(is_gone, "the worker's end")
