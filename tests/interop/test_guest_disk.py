"""A Linux guest on a vhost-user-blk disk: what it sees, and whether every byte comes back.

Each server is booted against once; the tests look at what the jobs said. The same jobs run against QEMU's storage daemon, so that a
failure of both speaks of the job and a failure of one of the server.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from interop.peers import QpairServer, StorageDaemon
from linux_guest import Guest, Outcome, vhost_user_blk_args

JOBS = Path(__file__).parent / "jobs"
DISK_BYTES = 96 << 20
BOOT = ("identity.sh", "filesystem.sh", "verify.sh", "zeroes.sh", "queues.sh")


@dataclass
class Boot:
    server: str
    """storage-daemon, qpair or qpair-packed."""
    outcome: Outcome
    queues: list[dict[str, Any]] = field(default_factory=list)
    """What qpair says each ring did, asked while the guest paused in queues.sh."""

    def said(self, job: str) -> dict[str, str]:
        """What one job said, after a look at how it ended."""
        assert self.outcome.job_rc.get(job) == 0, self.outcome.console
        return {key.removeprefix(f"{job}:"): value for key, value in self.outcome.values.items() if key.startswith(f"{job}:")}


@pytest.fixture(scope="module", params=["storage-daemon", "qpair", "qpair-packed"])
def boot(request: pytest.FixtureRequest, guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    folder = tmp_path_factory.mktemp("disk")
    image = folder / "disk.img"
    with image.open("wb") as handle:
        handle.truncate(DISK_BYTES)
    with ExitStack() as running:
        ours, packed = request.param.startswith("qpair"), request.param == "qpair-packed"
        if ours:
            server = running.enter_context(QpairServer(folder))
            server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
            socket = server.export_disk("vhost.0", "disk0", packed_ring=packed)
        else:
            socket = running.enter_context(StorageDaemon(guest, folder, image)).socket
        machine = running.enter_context(
            guest.start(
                [JOBS / job for job in BOOT],
                qemu_args=vhost_user_blk_args(socket, packed=packed),
                variables={"DISK": "vdb"},
                timeout_s=240,
            )
        )
        machine.wait_for("GUEST-PAUSED", timeout_s=240)
        [controller] = server.rpc("vhost_get_controllers", name="vhost.0") if ours else [None]
        machine.resume()
        result = Boot(request.param, machine.wait())
    if controller:
        result.queues = queues_of(controller)
    return result


def queues_of(controller: dict[str, Any]) -> list[dict[str, Any]]:
    """The rings of a controller's only session, as vhost_get_controllers tells them."""
    [session] = controller["sessions"]
    return list(session["queues"])


def test_the_guest_runs_every_job_and_powers_off(boot: Boot) -> None:
    assert boot.outcome.rc == 0, boot.outcome.console
    assert boot.outcome.job_rc == {job.removesuffix(".sh"): 0 for job in BOOT}
    assert not boot.outcome.timed_out


def test_linux_sees_the_geometry_and_the_features(boot: Boot) -> None:
    said = boot.said("identity")
    assert said["bytes"] == str(DISK_BYTES)
    assert said["logical_block_size"] == "512"
    assert said["read_only"] == "0"
    assert said["discard"] == "yes"
    assert said["write_zeroes"] == "yes"
    assert said["queues"] == "2"


def test_linux_drives_packed_rings_where_they_are_offered(boot: Boot) -> None:
    assert boot.said("identity")["packed"] == ("1" if boot.server == "qpair-packed" else "0")


def test_linux_is_told_to_flush(boot: Boot) -> None:
    # QEMU's daemon reports its cache as off although it takes flushes, and Linux then sends none.
    assert boot.said("identity")["write_cache"] == ("write through" if boot.server == "storage-daemon" else "write back")


def test_get_id_names_the_disk(boot: Boot) -> None:
    assert boot.said("identity")["serial"] == ("vhost_user_blk" if boot.server == "storage-daemon" else "disk0")


def test_a_file_system_survives_unmount_and_dropped_caches(boot: Boot) -> None:
    said = boot.said("filesystem")
    assert len(said["before"]) == 64
    assert said["before"] == said["after"]
    assert said["fsck"] == "clean"


@pytest.mark.parametrize("engine", ["aio", "uring", "flush"])
def test_fio_finds_its_checksums_again(boot: Boot, engine: str) -> None:
    assert boot.said("verify")[engine] == "0"


def test_write_zeroes_clears_its_range_and_nothing_beside_it(boot: Boot) -> None:
    said = boot.said("zeroes")
    assert said["written"] == "ab"
    assert (said["before_zeroed"], said["zeroed"], said["after_zeroed"]) == ("ab", "00", "ab")


def test_discard_leaves_what_is_beside_its_range(boot: Boot) -> None:
    said = boot.said("zeroes")
    assert (said["before_discarded"], said["after_discarded"]) == ("ab", "ab")
    # Discarded blocks may read as they were or as zeros, never as anything else.
    assert said["discarded_reads"] in ("00", "ab")
    assert said["whole_discard"] == "ok"


def test_each_guest_processor_has_a_queue_and_both_do_io(boot: Boot) -> None:
    said = boot.said("queues")
    assert (said["cpus_of_queue0"], said["cpus_of_queue1"]) == ("0", "1")
    assert (said["errors_cpu0"], said["errors_cpu1"]) == ("0", "0")
    if boot.server != "storage-daemon":
        busy = [queue for queue in boot.queues if queue["requests"] >= 4000]
        assert len(busy) == 2, json.dumps(boot.queues)
        assert len({queue["lcore"] for queue in busy}) == 2, f"both queues are on one reactor: {json.dumps(boot.queues)}"


@pytest.fixture(params=["storage-daemon", "qpair"])
def read_only_disk(request: pytest.FixtureRequest, guest: Guest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(socket, image) of a disk that a server exports read-only."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(range(256)) * 4096)
    with ExitStack() as running:
        if request.param == "qpair":
            server = running.enter_context(QpairServer(tmp_path))
            server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
            yield server.export_disk("vhost.ro", "disk0", readonly=True), image
        else:
            yield running.enter_context(StorageDaemon(guest, tmp_path, image, writable=False)).socket, image


def test_a_read_only_disk_is_read_and_never_written(guest: Guest, read_only_disk: tuple[Path, Path]) -> None:
    socket, image = read_only_disk
    before = image.read_bytes()
    outcome = guest.run([JOBS / "readonly.sh"], qemu_args=vhost_user_blk_args(socket), variables={"DISK": "vdb"}, timeout_s=120)
    assert outcome.rc == 0, outcome.console
    assert outcome.values["readonly:read_only"] == "1"
    assert outcome.values["readonly:write"] == "refused"
    assert outcome.values["readonly:first_block"] == hashlib.sha256(before[:4096]).hexdigest()
    assert image.read_bytes() == before
