"""What changes under a guest that goes on working: the size of its disk, its write cache, and the machine it runs on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from interop.peers import QpairServer
from interop.qmp import Qmp
from linux_guest import Guest, vhost_user_blk_args

JOBS = Path(__file__).parent / "jobs"
MIB = 1 << 20


def disk_image(folder: Path, size: int) -> Path:
    image = folder / "disk.img"
    with image.open("wb") as handle:
        handle.truncate(size)
    return image


def test_a_busy_guest_sees_its_disks_grow_and_shrink(guest: Guest, tmp_path: Path, qpair_server: QpairServer) -> None:
    image = disk_image(tmp_path, 32 * MIB)
    qpair_server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512)
    qpair_server.rpc("bdev_null_create", name="disk1", num_blocks=64 * MIB // 512, block_size=512)
    sockets = [qpair_server.export_disk(name, bdev) for name, bdev in (("vhost.0", "disk0"), ("vhost.1", "disk1"))]
    arguments = [word for name, socket in zip(("disk0", "disk1"), sockets, strict=True) for word in vhost_user_blk_args(socket, name=name)]
    variables = {"DISK": "vdb", "OTHER": "vdc", "WANTED": f"{48 * MIB} {16 * MIB}"}
    with guest.start([JOBS / "resize.sh"], qemu_args=arguments, variables=variables, timeout_s=240) as machine:
        machine.wait_for("GUEST-PAUSED", timeout_s=120)
        with image.open("r+b") as handle:
            handle.truncate(48 * MIB)
        qpair_server.rpc("bdev_aio_rescan", name="disk0")
        for size_mib in (128, 16):
            qpair_server.rpc("bdev_null_resize", name="disk1", new_size=size_mib)
        machine.resume()
        outcome = machine.wait()
    assert outcome.rc == 0, outcome.console
    said = {key.removeprefix("resize:"): value for key, value in outcome.values.items()}
    assert said["before"] == f"{32 * MIB} {64 * MIB}"
    assert said["after"] == variables["WANTED"], outcome.console
    assert (said["beyond"], said["errors"]) == ("same", "0")
    assert "WARNING" not in qpair_server.log.read_text()


def test_a_guest_switches_its_write_cache_off_and_on(guest: Guest, tmp_path: Path, qpair_server: QpairServer) -> None:
    image = disk_image(tmp_path, 32 * MIB)
    qpair_server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512)
    socket = qpair_server.export_disk("vhost.0", "disk0")
    outcome = None
    with guest.start([JOBS / "writecache.sh"], qemu_args=vhost_user_blk_args(socket), variables={"DISK": "vdb"}, timeout_s=180) as machine:
        machine.wait_for("GUEST-PAUSED", timeout_s=120)
        machine.resume()
        outcome = machine.wait()
    assert outcome.rc == 0, outcome.console
    said = {key.removeprefix("writecache:"): value for key, value in outcome.values.items()}
    assert said == {
        "at_first": "write back",
        "through": "write through",
        "told": "write through",
        "errors": "0",
        "back": "write back",
    }


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_busy_guest_is_migrated_from_one_server_to_another(guest: Guest, tmp_path: Path, packed: bool) -> None:
    image = disk_image(tmp_path, 64 * MIB)
    incoming = f"unix:{tmp_path}/incoming"
    jobs, variables = [JOBS / "migrate.sh"], {"DISK": "vdb", "SECONDS_BUSY": "30"}

    with ExitStack() as running:
        machines, controls, servers = [], [], []
        for side in ("source", "destination"):
            folder = tmp_path / side
            folder.mkdir()
            server = running.enter_context(QpairServer(folder))
            server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512)
            arguments = vhost_user_blk_args(server.export_disk("vhost.0", "disk0", packed_ring=packed), packed=packed)
            arguments += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
            if side == "destination":
                arguments += ["-incoming", incoming]
            machines.append(
                running.enter_context(
                    # Pages that Linux cleared itself would be copied for that.
                    guest.start(jobs, qemu_args=arguments, variables=variables, memory="512M", append="init_on_alloc=0", timeout_s=300)
                )
            )
            controls.append(running.enter_context(Qmp(folder / "qmp")))
            servers.append(server)
        source, destination = machines
        source.wait_for("GUEST-PAUSED", timeout_s=120)
        with controls[0].migrating(incoming):
            source.resume()
            source.wait_for("GUEST-FILLED")
            source.wait_for("GUEST-FILLED\nGUEST-PAUSED")
        controls[0].command("quit")
        destination.resume()
        destination.wait_for("MOVED dmesg=", timeout_s=200)
        outcome = destination.wait()
        logs = [server.log.read_text() for server in servers]
    for told in ("cache=same", "errors=0", "dmesg=clean"):
        assert f"MOVED {told}" in outcome.console, outcome.console
    assert outcome.job_rc == {"migrate": 0}
    assert outcome.rc == 0
    for log in logs:
        assert "WARNING" not in log, log
