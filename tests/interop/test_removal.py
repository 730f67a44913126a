"""A bdev is removed under clients that use it: they get errors, nobody hangs, and the session stays."""

from pathlib import Path
from typing import Any

import pytest

from interop.peers import QemuIo, QpairServer, image_options
from linux_guest import Guest, vhost_user_blk_args

JOBS = Path(__file__).parent / "jobs"
DISK_BYTES = 32 << 20


@pytest.fixture
def served(qpair_server: QpairServer, tmp_path: Path) -> QpairServer:
    """A server that exports a file as the controller vhost.0."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(DISK_BYTES))
    qpair_server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
    qpair_server.export_disk("vhost.0", "disk0", packed_ring=True)
    return qpair_server


def controller(server: QpairServer) -> tuple[Any, list[int]]:
    """The controller's bdev, and its sessions' numbers."""
    [found] = server.rpc("vhost_get_controllers", name="vhost.0")
    return found["backend_specific"]["block"]["bdev"], [session["vid"] for session in found["sessions"]]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_gets_errors_and_its_session_stays(guest: Guest, served: QpairServer, packed: bool) -> None:
    args = vhost_user_blk_args(served.folder / "vhost.0", packed=packed)
    with guest.start([JOBS / "removal.sh"], qemu_args=args, variables={"DISK": "vdb"}, timeout_s=180) as machine:
        machine.wait_for("GUEST-PAUSED", timeout_s=120)
        bdev, sessions = controller(served)
        assert (bdev, len(sessions)) == ("disk0", 1)
        served.rpc("bdev_aio_delete", name="disk0")
        assert controller(served) == (None, sessions)
        machine.resume()
        outcome = machine.wait()
        assert outcome.rc == 0, outcome.console
        assert int(outcome.values["removal:before"]) > 0
        assert outcome.values["removal:worker"] == "ended with an error"
        assert (outcome.values["removal:read"], outcome.values["removal:write"]) == ("failed", "failed")
        assert outcome.values["removal:rebound"] == "failed", "a driver that begins anew is answered, with errors"
    assert served.rpc("bdev_get_bdevs") == []
    served.rpc("vhost_delete_controller", ctrlr="vhost.0")


def test_a_client_that_comes_after_the_removal_gets_errors(qemu_io: QemuIo, served: QpairServer) -> None:
    socket = served.folder / "vhost.0"
    qemu_io.commands(socket, "write -P 7 0 64k", "read -P 7 0 64k")
    served.rpc("bdev_aio_delete", name="disk0")
    done = qemu_io.run("--image-opts", image_options(socket), "-c", "read 0 4096", "-c", "write 0 4096", timeout_s=30)
    assert done.returncode == 1
    assert done.stdout.count("Input/output error") == 2, done.stdout


def test_a_controller_without_bdev_is_not_saved(served: QpairServer) -> None:
    served.rpc("bdev_aio_delete", name="disk0")
    assert served.rpc("framework_get_config", name="vhost_blk") == []
