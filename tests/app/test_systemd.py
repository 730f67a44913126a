"""What a server tells its service manager, and the sockets that it takes over from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hostile.process import CORE, PROGRAM, Serve, until
from qpair.app.passed import PassedSockets
from qpair.app.systemd import Manager
from qpair.cli.unit import UNITS, unit
from qpair.errors import InvalidArgument


class Reactors:
    """A stack of which only its reactors are asked."""

    def __init__(self) -> None:
        self.hung: set[int] = set()

    async def reactors(self) -> list[dict[str, Any]]:
        return [{"lcore": core, "responsive": core not in self.hung} for core in (0, 1)]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The manager's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        yield sock


def told(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(65536).decode().split("\n"))


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_without_a_manager_nothing_is_told_and_nothing_watched() -> None:
    nobody = Manager.of_environment({})
    assert not nobody.tell(READY=1)
    asyncio.run(asyncio.wait_for(nobody.watch(Reactors()), 1))  # type: ignore[arg-type]
    assert nobody.sockets.paths() == []


def test_variables_are_taken_out_of_the_environment_and_those_of_another_process_ignored() -> None:
    environment = {
        "WATCHDOG_USEC": "5000000",
        "WATCHDOG_PID": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDS": "3",
        "NOTIFY_SOCKET": "@x",
        "HOME": "/",
    }
    manager = Manager.of_environment(environment)
    assert environment == {"HOME": "/"}
    assert manager.watchdog_s is None
    assert manager.sockets.paths() == []


@pytest.mark.parametrize("period", ["0", "soon", "-1", "1.5"])
def test_a_watchdog_period_that_is_none_is_refused_by_name(period: str) -> None:
    with pytest.raises(InvalidArgument, match="WATCHDOG_USEC"):
        Manager.of_environment({"WATCHDOG_USEC": period})


def test_a_manager_that_is_gone_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not Manager(str(tmp_path / "nobody")).tell(READY=1)
    assert "was not told READY" in caplog.text


async def test_the_watchdog_is_told_only_while_every_reactor_answers(manager: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    manager.setblocking(False)
    stack = Reactors()
    server = Manager(manager.getsockname(), 0.04)
    watching = asyncio.create_task(server.watch(stack))  # type: ignore[arg-type]
    await asyncio.sleep(0.1)
    assert told(manager) == {"WATCHDOG": "1"}
    stack.hung.add(1)
    await asyncio.sleep(0.05)
    with contextlib.suppress(BlockingIOError):
        while True:
            told(manager)
    await asyncio.sleep(0.1)
    with pytest.raises(BlockingIOError):
        told(manager)
    assert "reactors on cores [1] do not answer" in caplog.text
    stack.hung.clear()
    await asyncio.sleep(0.1)
    assert told(manager) == {"WATCHDOG": "1"}
    watching.cancel()


def test_what_is_no_listening_stream_socket_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sockets = PassedSockets()
    deaf = socket.socket(socket.AF_UNIX)
    deaf.bind(str(tmp_path / "deaf"))
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(str(tmp_path / "datagrams"))
    tcp = socket.create_server(("127.0.0.1", 0))
    pipe, other = os.pipe()
    descriptors = [deaf.detach(), datagrams.detach(), tcp.detach(), pipe]
    for descriptor in descriptors:
        sockets.add(descriptor)
    os.close(other)
    assert sockets.paths() == []
    assert len(caplog.records) == len(descriptors)
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_socket_is_lent_again_and_its_file_stays(tmp_path: Path) -> None:
    sockets = PassedSockets()
    sockets.add(listening(tmp_path / "s").detach())
    for _ in range(2):
        passed = sockets.borrow(str(tmp_path / "s")) or pytest.fail("it was passed")
        assert not passed.owned
        with passed.sock as lent, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            lent.accept()[0].close()
    assert sockets.borrow(str(tmp_path / "other")) is None
    sockets.close()
    assert (tmp_path / "s").exists()
    assert sockets.borrow(str(tmp_path / "s")) is None


def test_a_server_says_when_it_is_ready_that_it_lives_and_that_it_stops(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    with Serve(tmp_path) as server:
        messages = []
        while len([message for message in messages if "WATCHDOG" in message]) < 5:
            messages.append(told(manager))
        (ready,) = [message for message in messages if "READY" in message]
        assert ready["MAINPID"] == str(server.pid)
        assert str(server.socket) in ready["STATUS"]
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "STOPPING" in told(manager), "the end is told")
        assert server.process.wait(20) == 0


def test_a_server_that_hangs_tells_its_watchdog_nothing(manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    with Serve(tmp_path) as server:
        until(lambda: "WATCHDOG" in told(manager), "it lives")
        server.process.send_signal(signal.SIGSTOP)
        manager.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            told(manager)  # what was sent before
            told(manager)
        with pytest.raises(TimeoutError):
            told(manager)
        server.process.send_signal(signal.SIGCONT)
        manager.settimeout(20)
        until(lambda: "WATCHDOG" in told(manager), "it lives again")


def test_sockets_that_were_passed_are_served_and_left(tmp_path: Path) -> None:
    """One for RPC and one for a controller that is made, deleted and made again; systemd's own tool passes them."""
    rpc, disk = tmp_path / "rpc.sock", tmp_path / "disk0"
    command = ["systemd-socket-activate", "-l", str(rpc), "-l", str(disk)]
    command += [PROGRAM, "serve", "-r", str(rpc), "-m", f"[{CORE}]", "--no-pin", "-S", str(tmp_path)]

    def output_of(*words: str) -> str:
        return subprocess.run([PROGRAM, *words], check=True, capture_output=True, text=True, timeout=30).stdout

    def call(*words: str) -> str:
        return output_of("rpc", "-r", str(rpc), *words)

    with ExitStack() as running:
        process = running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        running.callback(process.terminate)
        until(rpc.exists, "systemd-socket-activate listens")
        # The first to come starts the server.
        assert "version" in call("spdk_get_version")
        call("bdev_malloc_create", "--name", "m0", "--num-blocks", "2048", "--block-size", "512")
        identity = disk.stat().st_ino
        for _ in range(2):
            call("vhost_create_blk_controller", "--ctrlr", "disk0", "--dev-name", "m0")
            output_of("perf", f"vhost:{disk}", "--time", "0.3", "--json")
            call("vhost_delete_controller", "--ctrlr", "disk0")
        assert disk.stat().st_ino == identity
        process.terminate()
        out, error = process.communicate(timeout=20)
        assert process.returncode == 0, error
        assert "ready" in out
        assert f"the service manager listens on {rpc}, {disk}" in error
        assert rpc.exists()
        assert disk.exists()


@pytest.mark.parametrize("kind", UNITS)
def test_units_are_printed_for_the_program_that_prints_them(kind: str) -> None:
    printed = subprocess.run([PROGRAM, "serve", "--print-unit", kind], check=True, capture_output=True, text=True).stdout
    assert "{" not in printed
    assert printed.count(PROGRAM) == (1 if kind == "service" else 0)
    assert "/run/qpair/rpc.sock" in printed
    assert unit(kind).splitlines()[0] == printed.splitlines()[0]
