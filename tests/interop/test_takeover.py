"""A Linux guest whose server another takes the place of, again and again, with fio's checksums throughout: no error, and no longer a wait than that of a busy machine."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from interop.peers import QpairServer
from linux_guest import Guest, vhost_user_blk_args

JOBS = Path(__file__).parent / "jobs"
TAKEOVERS = 3
UNDISTURBED_S = 10
GAP_US = 100_000
"""What a takeover may add to the longest wait of a run without one."""


def until(what: str, condition: Callable[[], Any], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def requests(server: QpairServer) -> int:
    [controller] = server.rpc("vhost_get_controllers", name="vhost.0")
    return sum(queue["requests"] for session in controller["sessions"] for queue in session["queues"])


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_does_not_notice_that_its_server_is_another(guest: Guest, tmp_path: Path, packed: bool) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as handle:
        handle.truncate(64 << 20)
    with ExitStack() as running:
        server = running.enter_context(QpairServer(tmp_path))
        server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512)
        socket = server.export_disk("vhost.0", "disk0", packed_ring=packed)
        arguments = vhost_user_blk_args(socket, packed=packed)
        machine = running.enter_context(guest.start([JOBS / "takeover.sh"], qemu_args=arguments, variables={"DISK": "vdb"}, timeout_s=300))
        machine.wait_for("GUEST-PAUSED", timeout_s=240)
        time.sleep(UNDISTURBED_S)
        machine.resume()
        machine.wait_for("TAKE-OVER-NOW", timeout_s=120)
        for number in range(TAKEOVERS):
            begun = requests(server)
            until("fio goes on", lambda: requests(server) > begun + 300)  # noqa: B023
            successor = running.enter_context(QpairServer(tmp_path, "--takeover", log=f"successor{number}.log"))
            assert server.process.wait(20) == 0, server.log.read_text()
            server = successor
            until("fio goes on at the successor", lambda: requests(server) > 300)  # noqa: B023
        machine.resume()
        outcome = machine.wait()
    assert outcome.job_rc == {"takeover": 0}, outcome.console
    waits = {key.partition(":")[2]: int(value) for key, value in outcome.values.items()}
    print(f"longest wait {waits['undisturbed']} us, with {TAKEOVERS} takeovers {waits['disturbed']} us; {waits['rounds']} rounds")
    assert waits["rounds"] > 0
    assert waits["rounds_before"] > 0
    assert waits["disturbed"] < waits["undisturbed"] + GAP_US, waits
