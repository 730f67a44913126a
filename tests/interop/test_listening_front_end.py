"""QEMU listens (``-chardev socket,server=on``) and the server connects to it, whoever starts first and whoever starts again."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop.peers import QpairServer
from linux_guest import Guest, RunningGuest, vhost_user_blk_args

JOBS = Path(__file__).parent / "jobs"


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(folder: Path) -> QpairServer:
    server = QpairServer(folder)
    server.rpc("bdev_malloc_create", name="disk0", num_blocks=1 << 15, block_size=512)
    server.rpc("qpair_vhost_create_blk_controller", ctrlr="qemu.sock", dev_name="disk0", client=True)
    return server


def boot(guest: Guest, folder: Path, running: ExitStack) -> RunningGuest:
    args = vhost_user_blk_args(folder / "qemu.sock", server=True)
    return running.enter_context(guest.start([JOBS / "identity.sh"], qemu_args=args, variables={"DISK": "vdb"}, timeout_s=120))


def check(machine: RunningGuest) -> None:
    outcome = machine.wait()
    assert outcome.rc == 0, outcome.console
    assert (outcome.values["identity:serial"], outcome.values["identity:bytes"]) == ("disk0", str(16 << 20))


def test_the_server_is_first_and_serves_one_machine_after_the_other(guest: Guest, tmp_path: Path, running: ExitStack) -> None:
    server = running.enter_context(serve(tmp_path))
    [told] = server.rpc("vhost_get_controllers")
    assert told["qpair"] == {"client": True, "not_connected": "No such file or directory"}
    for _ in range(2):
        check(boot(guest, tmp_path, running))
    [told] = server.rpc("vhost_get_controllers")
    assert told["qpair"]["not_connected"] is not None


def test_the_machine_is_first_and_waits_for_the_server(guest: Guest, tmp_path: Path, running: ExitStack) -> None:
    machine = boot(guest, tmp_path, running)
    # QEMU says where it waits, and starts nothing before.
    machine.wait_for("waiting for connection", timeout_s=60)
    running.enter_context(serve(tmp_path))
    check(machine)
