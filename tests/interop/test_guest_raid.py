"""A Linux guest on a mirror whose legs fail, are rebuilt and go, with fio's checksums throughout."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interop.peers import QpairServer
from linux_guest import Guest, vhost_user_blk_args

JOBS = Path(__file__).parent / "jobs"
LEG_BYTES = 33 << 20


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def array(server: QpairServer) -> dict[str, Any]:
    [found] = server.rpc("bdev_raid_get_bdevs", category="online")
    return dict(found)


def writes(server: QpairServer, bdev: str) -> int:
    [figures] = server.rpc("bdev_get_iostat", names=[bdev])["bdevs"]
    return int(figures["num_write_ops"])


def test_a_guest_notices_nothing_of_a_leg_that_fails_and_one_that_is_rebuilt(
    guest: Guest, qpair_server: QpairServer, tmp_path: Path
) -> None:
    server = qpair_server
    for number in range(3):
        image = tmp_path / f"leg{number}.img"
        with image.open("wb") as handle:
            handle.truncate(LEG_BYTES)
        server.rpc("bdev_aio_create", name=f"a{number}", filename=str(image), block_size=512)
    # What stands on the first leg fails it when it is told to.
    server.rpc("bdev_error_create", base_name="a0")
    server.spdk_rpc("bdev_raid_set_options", "-w", "128", "-b", "4")
    server.spdk_rpc("bdev_raid_create", "-n", "mirror", "-r", "1", "-b", "EE_a0 a1", "-s")
    socket = server.export_disk("vhost.raid", "mirror")
    machine = guest.start([JOBS / "raid.sh"], qemu_args=vhost_user_blk_args(socket), variables={"DISK": "vdb"}, timeout_s=300)
    with machine:
        machine.wait_for("GUEST-PAUSED", timeout_s=240)
        begun = writes(server, "mirror")
        wait_until("fio writes", lambda: writes(server, "mirror") > begun + 100)
        server.rpc("bdev_error_inject_error", name="EE_a0", io_type="write", error_type="failure", num=1000000)
        wait_until("the failed leg leaves", lambda: array(server)["num_base_bdevs_operational"] == 1)
        assert [base["name"] for base in array(server)["base_bdevs_list"]] == [None, "a1"]
        degraded = writes(server, "mirror")
        wait_until("fio goes on with one leg", lambda: writes(server, "mirror") > degraded + 100)
        server.spdk_rpc("bdev_raid_add_base_bdev", "mirror", "a2")
        assert array(server)["process"]["target"] == "a2"
        rebuilding = writes(server, "mirror")
        wait_until("the rebuild ends", lambda: "process" not in array(server))
        assert writes(server, "mirror") > rebuilding + 100, "fio wrote while the leg was rebuilt"
        assert array(server)["num_base_bdevs_operational"] == 2
        server.spdk_rpc("bdev_raid_remove_base_bdev", "a1")
        alone = writes(server, "mirror")
        wait_until("fio goes on with the rebuilt leg", lambda: writes(server, "mirror") > alone + 100)
        machine.resume()
        outcome = machine.wait()
    assert outcome.job_rc == {"raid": 0}, outcome.console
    assert int(outcome.values["raid:rounds"]) > 0
    assert outcome.values["raid:last"] == "0"
    assert [base["name"] for base in array(server)["base_bdevs_list"]] == ["a2", None]
