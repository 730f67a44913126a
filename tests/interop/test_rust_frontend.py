"""rust-vmm's vhost-user front end as a client: the example `frontend` of crates/vhost connects, verifies every byte, and comes again.

Its own documentation says what it does in a run. Its last run against QEMU's storage daemon shows that what it expects is the protocol's.
"""

import json
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from spdk.rpc.client import JSONRPCException

from interop.peers import QpairServer, StorageDaemon
from missing import missing

ROOT = Path(__file__).parents[2]
# As in the Makefile's CARGO_TEST: the same packages have the same features, so after `cargo test` nothing is compiled again.
BUILD = ("cargo", "build", "--locked", "--workspace", "--exclude", "qpair-python", "--example", "frontend", "--message-format=json")
AREA_SECTORS = 8192
DISK_BYTES = AREA_SECTORS * 512
RING_SIZES = [64, 1, 2, 16, 256, 32768]
# What a run leaves: each 8-byte word is its sector's number plus one.
PATTERN = b"".join(struct.pack("<Q", sector + 1) * 64 for sector in range(AREA_SECTORS))


@dataclass(frozen=True)
class Frontend:
    program: Path

    def start(self, socket: Path, *words: str) -> "subprocess.Popen[str]":
        command = [str(self.program), str(socket), *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, socket: Path, *words: str) -> tuple[int, str]:
        """(exit status, what it said)."""
        command = [str(self.program), str(socket), *words]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
        )
        return done.returncode, done.stdout

    def verifies(self, socket: Path, *words: str) -> list[str]:
        """The lines of a run that found everything right."""
        status, said = self.run(socket, *words)
        assert status == 0, said
        lines = said.splitlines()
        assert lines[-1].startswith("ok "), said
        return lines


@pytest.fixture(scope="session")
def frontend() -> Frontend:
    if shutil.which("cargo") is None:
        missing("rust-vmm's front end", "no cargo to build it with")
    built = subprocess.run(BUILD, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=540, check=False)
    assert built.returncode == 0, built.stderr
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    [program] = [message["executable"] for message in messages if message.get("target", {}).get("name") == "frontend"]
    return Frontend(Path(program))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as handle:
        handle.truncate(DISK_BYTES)
    return path


@dataclass(frozen=True)
class Disk:
    socket: Path
    block_size: int
    name: str
    words: tuple[str, ...] = ()
    image: Path | None = None


@pytest.fixture(params=["storage-daemon", "qpair-aio", "qpair-uring-4096", "qpair-malloc", "qpair-packed"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, image: Path) -> Iterator[Disk]:
    if request.param == "storage-daemon":
        with StorageDaemon(request.getfixturevalue("guest"), tmp_path, image) as daemon:
            yield Disk(daemon.socket, 512, "vhost_user_blk", ("plain",), image)
        return
    server: QpairServer = request.getfixturevalue("qpair_server")
    if request.param == "qpair-packed":
        server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
        yield Disk(server.export_disk("vhost.0", "disk0", packed_ring=True), 512, "disk0", ("packed",), image)
    elif request.param == "qpair-malloc":
        server.rpc("bdev_malloc_create", name="disk0", num_blocks=AREA_SECTORS, block_size=512)
        yield Disk(server.export_disk("vhost.0", "disk0"), 512, "disk0")
    elif request.param == "qpair-aio":
        server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
        yield Disk(server.export_disk("vhost.0", "disk0"), 512, "disk0", (), image)
    else:
        server.rpc("bdev_uring_create", name="disk0", filename=str(image), block_size=4096)
        yield Disk(server.export_disk("vhost.0", "disk0"), 4096, "disk0", (), image)


def test_every_byte_comes_back_through_six_connections_with_rings_of_all_sizes(frontend: Frontend, disk: Disk) -> None:
    said = frontend.verifies(disk.socket, *disk.words)
    assert said[0] == f"sectors={AREA_SECTORS} block={disk.block_size} queues=2 writable=true"
    assert [line.partition(" ")[0] for line in said[1:-2]] == [f"ring={entries}" for entries in RING_SIZES]
    assert said[-2] == f"id={disk.name}"
    if disk.image:
        assert disk.image.read_bytes() == PATTERN


def test_the_next_front_end_finds_what_the_last_one_left(frontend: Frontend, disk: Disk) -> None:
    first = frontend.verifies(disk.socket, *disk.words)
    for _ in range(2):
        again = frontend.verifies(disk.socket, "filled", *disk.words)
        assert again[:-1] == first[:-1]


def test_the_next_server_has_what_a_front_end_gave_the_last_one(frontend: Frontend, tmp_path: Path, image: Path) -> None:
    for words in ((), ("filled",)):
        with QpairServer(tmp_path) as server:
            server.rpc("bdev_uring_create", name="disk0", filename=str(image), block_size=512)
            frontend.verifies(server.export_disk("vhost.0", "disk0"), *words)


def test_two_rings_are_served_by_two_reactors(frontend: Frontend, qpair_server: QpairServer) -> None:
    qpair_server.rpc("bdev_malloc_create", name="disk0", num_blocks=AREA_SECTORS, block_size=512)
    running = frontend.start(qpair_server.export_disk("vhost.0", "disk0"))
    seen = set()
    while running.poll() is None:
        [controller] = qpair_server.rpc("vhost_get_controllers", name="vhost.0")
        for session in controller["sessions"]:
            seen.add(tuple(queue["lcore"] for queue in session["queues"] if queue["state"] == "running" and queue["requests"] > 0))
    said, _ = running.communicate()
    assert running.returncode == 0, said
    assert {lcore for lcores in seen if len(lcores) == 2 for lcore in lcores} == {0, 1}, seen


@pytest.mark.parametrize("server", ["storage-daemon", "qpair"])
def test_a_read_only_disk_is_read_and_refuses_all_else(
    request: pytest.FixtureRequest, frontend: Frontend, tmp_path: Path, image: Path, server: str
) -> None:
    image.write_bytes(PATTERN)
    if server == "storage-daemon":
        with StorageDaemon(request.getfixturevalue("guest"), tmp_path, image, writable=False) as daemon:
            said = frontend.verifies(daemon.socket, "filled", "plain")
    else:
        ours: QpairServer = request.getfixturevalue("qpair_server")
        ours.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
        said = frontend.verifies(ours.export_disk("vhost.ro", "disk0", readonly=True), "filled")
    assert said[0] == f"sectors={AREA_SECTORS} block=512 queues=2 writable=false"
    assert image.read_bytes() == PATTERN


def test_a_disk_that_forgets_is_found_out(frontend: Frontend, qpair_server: QpairServer) -> None:
    qpair_server.rpc("bdev_null_create", name="disk0", num_blocks=AREA_SECTORS, block_size=512)
    status, said = frontend.run(qpair_server.export_disk("vhost.0", "disk0"))
    assert status == 1
    assert "type 0, sector 0, 8192 bytes: sector 0, byte 0: read" in said


def test_two_front_ends_at_once_on_two_disks_do_not_meet(frontend: Frontend, qpair_server: QpairServer) -> None:
    running = []
    for name in ("disk0", "disk1"):
        qpair_server.rpc("bdev_malloc_create", name=name, num_blocks=AREA_SECTORS, block_size=512)
        running.append(frontend.start(qpair_server.export_disk(f"vhost.{name}", name)))
    for name, client in zip(("disk0", "disk1"), running, strict=True):
        said, _ = client.communicate(timeout=120)
        assert client.returncode == 0, said
        assert f"id={name}\nok " in said


def test_a_controller_in_use_is_not_deleted_and_its_front_end_does_not_notice(frontend: Frontend, qpair_server: QpairServer) -> None:
    qpair_server.rpc("bdev_malloc_create", name="disk0", num_blocks=AREA_SECTORS, block_size=512)
    running = frontend.start(qpair_server.export_disk("vhost.0", "disk0"))
    running.send_signal(signal.SIGSTOP)
    while not qpair_server.rpc("vhost_get_controllers", name="vhost.0")[0]["sessions"]:
        running.send_signal(signal.SIGCONT)
        assert running.poll() is None, running.communicate()[0]
        running.send_signal(signal.SIGSTOP)
    # The front end stands still, so that it is connected for sure.
    with pytest.raises(JSONRPCException, match=r"vhost controller 'vhost\.0': a front end is connected"):
        qpair_server.rpc("vhost_delete_controller", ctrlr="vhost.0")
    running.send_signal(signal.SIGCONT)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
