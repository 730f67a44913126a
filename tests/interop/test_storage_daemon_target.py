"""QEMU's storage daemon as the target of our initiator: a foreign disk becomes a bdev, and can be served again."""

from collections.abc import Callable
from pathlib import Path

import pytest
from spdk.rpc.client import JSONRPCException

from interop.peers import QemuIo, QpairServer, StorageDaemon

DISK_BYTES = 32 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "foreign.img"
    path.write_bytes(b"\x17" * DISK_BYTES)
    return path


def attach(server: QpairServer, socket: Path) -> str:
    [name] = server.rpc(
        "bdev_virtio_attach_controller", name="Foreign0", trtype="user", traddr=str(socket), dev_type="blk", vq_count=2, vq_size=128
    )
    return str(name)


def test_the_foreign_disk_becomes_a_bdev_with_its_geometry(
    qpair_server: QpairServer, storage_daemon: Callable[..., StorageDaemon], image: Path
) -> None:
    name = attach(qpair_server, storage_daemon(image, block_size=4096).socket)
    [bdev] = qpair_server.rpc("bdev_get_bdevs", name=name)
    assert (bdev["block_size"], bdev["num_blocks"]) == (4096, DISK_BYTES // 4096)


def test_bytes_cross_two_vhost_user_devices_and_arrive_in_the_file(
    qpair_server: QpairServer, storage_daemon: Callable[..., StorageDaemon], qemu_io: QemuIo, image: Path
) -> None:
    name = attach(qpair_server, storage_daemon(image).socket)
    socket = qpair_server.export_disk("again", name)
    qemu_io.commands(socket, "read -P 0x17 0 1M", "write -P 0xc3 1536 70144", f"write -P 0x3c {DISK_BYTES - 512} 512", "flush")
    stored = image.read_bytes()
    assert stored[:1536] == b"\x17" * 1536
    assert stored[1536 : 1536 + 70144] == b"\xc3" * 70144
    assert stored[1536 + 70144 : -512] == b"\x17" * (DISK_BYTES - 512 - 1536 - 70144)
    assert stored[-512:] == b"\x3c" * 512


def test_a_target_that_dies_fails_its_bdev_where_nobody_waits_and_nothing_else(
    qpair_server: QpairServer, storage_daemon: Callable[..., StorageDaemon], qemu_io: QemuIo, image: Path
) -> None:
    daemon = storage_daemon(image)
    qpair_server.rpc("qpair_virtio_set_options", ctrlr_loss_timeout_sec=0)
    name = attach(qpair_server, daemon.socket)
    qpair_server.rpc("bdev_malloc_create", name="other", num_blocks=2048, block_size=512)
    other = qpair_server.export_disk("other.sock", "other")
    again = qpair_server.export_disk("again", name)
    qemu_io.commands(again, "read -P 0x17 0 4096")
    daemon.stop()
    done = qemu_io.run("--image-opts", f"driver=virtio-blk-vhost-user,path={again},cache.direct=on", "-c", "read 0 4096", timeout_s=30)
    assert done.returncode == 1
    qemu_io.commands(other, "write -P 9 0 4096", "read -P 9 0 4096")


def test_attaching_to_no_socket_names_it(qpair_server: QpairServer, tmp_path: Path) -> None:
    with pytest.raises(JSONRPCException, match=r"No such file or directory"):
        attach(qpair_server, tmp_path / "nobody.sock")
    assert qpair_server.rpc("bdev_get_bdevs") == []
