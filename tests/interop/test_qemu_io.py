"""qemu-io and qemu-img (libblkio) as vhost-user-blk clients, without a guest: patterns at edges, odd sizes, discard, flush."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop.peers import QemuImg, QemuIo, QpairServer, StorageDaemon, image_options
from linux_guest import Guest

DISK_BYTES = 64 << 20
LAST = DISK_BYTES - 4096


@pytest.fixture(scope="module", params=["storage-daemon", "qpair-file", "qpair-malloc"])
def disk(request: pytest.FixtureRequest, guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a writable 64 MiB disk with 512-byte blocks."""
    folder = tmp_path_factory.mktemp("disk")
    image = folder / "disk.img"
    with image.open("wb") as handle:
        handle.truncate(DISK_BYTES)
    with ExitStack() as running:
        if request.param == "storage-daemon":
            yield running.enter_context(StorageDaemon(guest, folder, image)).socket
            return
        server = running.enter_context(QpairServer(folder))
        if request.param == "qpair-file":
            server.rpc("bdev_uring_create", name="disk0", filename=str(image), block_size=512)
        else:
            server.rpc("bdev_malloc_create", name="disk0", num_blocks=DISK_BYTES // 512, block_size=512)
        yield server.export_disk("vhost.0", "disk0")


def test_the_first_and_the_last_block_keep_their_patterns(qemu_io: QemuIo, disk: Path) -> None:
    qemu_io.commands(disk, "write -P 0x11 0 4096", f"write -P 0x22 {LAST} 4096", "read -P 0x11 0 4096", f"read -P 0x22 {LAST} 4096")


def test_patterns_are_still_there_for_the_next_client(qemu_io: QemuIo, disk: Path) -> None:
    qemu_io.commands(disk, "write -P 0x5a 1M 1M", "flush")
    qemu_io.commands(disk, "read -P 0x5a 1M 1M")


@pytest.mark.parametrize("length", [512, 1536, 4608, 65024, 131584, 1048576, 5 << 20])
def test_odd_lengths_at_odd_offsets_touch_only_their_range(qemu_io: QemuIo, disk: Path, length: int) -> None:
    start = (8 << 20) + 512
    qemu_io.commands(
        disk,
        f"write -P 0xee {start - 512} {length + 1024}",
        f"write -P 0x77 {start} {length}",
        f"read -P 0xee {start - 512} 512",
        f"read -P 0x77 {start} {length}",
        f"read -P 0xee {start + length} 512",
    )


@pytest.mark.parametrize(("offset", "length"), [(1, 4096), (513, 1000), (4095, 2)])
def test_bytes_that_are_no_blocks_are_read_modified_and_written_by_the_client(
    qemu_io: QemuIo, disk: Path, offset: int, length: int
) -> None:
    base = 16 << 20
    start = base + offset
    qemu_io.commands(
        disk,
        f"write -P 0x31 {base} 16384",
        f"write -P 0x32 {start} {length}",
        f"read -P 0x31 {base} {offset}",
        f"read -P 0x32 {start} {length}",
        f"read -P 0x31 {start + length} 512",
    )


def test_many_requests_in_flight_keep_their_places(qemu_io: QemuIo, disk: Path) -> None:
    starts = [(24 << 20) + index * 8192 for index in range(128)]
    writes = [f"aio_write -P {index + 1} {start} 8192" for index, start in enumerate(starts)]
    reads = [f"read -P {index + 1} {start} 8192" for index, start in enumerate(starts)]
    qemu_io.commands(disk, *writes, "aio_flush", *reads)


def test_a_vector_of_odd_buffers_arrives_in_order(qemu_io: QemuIo, disk: Path) -> None:
    output = qemu_io.commands(disk, "writev -P 0x44 33M 512 1024 4096 512 65536", "readv -P 0x44 33M 65536 512 4096 1024 512")
    assert "wrote 71680/71680" in output
    assert "read 71680/71680" in output


def test_discarded_and_zeroed_ranges_leave_their_neighbours(qemu_io: QemuIo, disk: Path) -> None:
    base = 40 << 20
    qemu_io.commands(
        disk,
        f"write -P 0x66 {base} 4M",
        f"discard {base + (1 << 20)} 1M",
        f"write -z {base + (2 << 20)} 64k",
        f"write -z -u {base + (3 << 20)} 64k",
        f"read -P 0x66 {base} 1M",
        f"read -P 0 {base + (2 << 20)} 64k",
        f"read -P 0x66 {base + (2 << 20) + 65536} {(1 << 20) - 65536}",
        f"read -P 0 {base + (3 << 20)} 64k",
        f"read -P 0x66 {base + (3 << 20) + 65536} 64k",
        "flush",
    )


def test_a_forced_unit_access_write_succeeds(qemu_io: QemuIo, disk: Path) -> None:
    qemu_io.commands(disk, "write -f -P 0x99 48M 64k", "read -P 0x99 48M 64k")


def test_the_end_of_the_disk_is_the_end(qemu_io: QemuIo, disk: Path) -> None:
    done = qemu_io.run("--image-opts", image_options(disk), "-c", f"write -P 1 {DISK_BYTES} 512")
    assert done.returncode == 1
    assert "Input/output error" in done.stdout


@pytest.mark.parametrize(("write", "depth", "size_bytes"), [(False, 1, 512), (False, 32, 4096), (True, 64, 4096), (True, 8, 131072)])
def test_a_bench_run_completes_every_request(qemu_img: QemuImg, disk: Path, write: bool, depth: int, size_bytes: int) -> None:
    output = qemu_img.bench(disk, count=4000, depth=depth, size_bytes=size_bytes, write=write)
    assert "Run completed in" in output


def test_the_size_is_what_the_server_exports(qemu_img: QemuImg, disk: Path) -> None:
    done = qemu_img.run("info", "--output=json", "--image-opts", image_options(disk))
    assert done.returncode == 0, done.stdout
    assert f'"virtual-size": {DISK_BYTES}' in done.stdout


@pytest.fixture(params=["storage-daemon", "qpair"])
def read_only_disk(request: pytest.FixtureRequest, guest: Guest, tmp_path: Path) -> Iterator[Path]:
    """The socket of a disk full of 0x42 that is exported read-only."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"\x42" * (1 << 20))
    with ExitStack() as running:
        if request.param == "storage-daemon":
            yield running.enter_context(StorageDaemon(guest, tmp_path, image, writable=False)).socket
            return
        server = running.enter_context(QpairServer(tmp_path))
        server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
        yield server.export_disk("vhost.ro", "disk0", readonly=True)


def test_a_read_only_disk_is_readable_and_refuses_writes(qemu_io: QemuIo, read_only_disk: Path) -> None:
    qemu_io.commands(read_only_disk, "read -P 0x42 0 1M", read_only=True)
    done = qemu_io.run("--image-opts", image_options(read_only_disk), "-c", "write 0 512")
    assert done.returncode == 1
    assert "read-only" in done.stdout.lower()
