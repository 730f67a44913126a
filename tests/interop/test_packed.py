"""Packed rings between processes: our initiator on our target, both over a socket, and what QEMU's clients make of a target that offers them."""

from pathlib import Path

from interop.peers import QemuIo, QpairServer
from linux_guest import Guest, vhost_user_blk_args

DISK_BYTES = 32 << 20


def positions(server: QpairServer, controller: str) -> list[int]:
    """Where the rings of a controller's only session take next. Of a packed ring's first lap the wrap counter, bit 15, is 1."""
    [found] = server.rpc("vhost_get_controllers", name=controller)
    [session] = found["sessions"]
    return [int(queue["avail_idx"]) for queue in session["queues"] if queue["state"] == "running"]


def test_bytes_cross_our_initiator_and_our_target_by_packed_rings(qpair_server: QpairServer, qemu_io: QemuIo, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"\x17" * DISK_BYTES)
    qpair_server.rpc("bdev_aio_create", name="disk0", filename=str(image), block_size=512, fallocate=True)
    for name, packed in (("packed", True), ("split", False)):
        far = qpair_server.export_disk(name, "disk0", packed_ring=packed)
        params = {"name": f"Far-{name}", "trtype": "user", "traddr": str(far), "dev_type": "blk", "vq_count": 1, "vq_size": 128}
        [bdev] = qpair_server.rpc("bdev_virtio_attach_controller", **params)
        again = qpair_server.export_disk(f"again-{name}", bdev, packed_ring=packed)
        value = 0xC3 if packed else 0x3C
        qemu_io.commands(again, "read 0 1M", f"write -P {value} 1536 70144", f"read -P {value} 1536 70144", "flush")
        stored = image.read_bytes()
        assert (stored[:1536], stored[1536:71680]) == (b"\x17" * 1536, bytes([value]) * 70144)
        [position] = positions(qpair_server, name)
        assert position > 0
        assert position >> 15 == int(packed), f"{position:#x}"


def test_a_guest_has_packed_rings_of_a_size_that_its_firmware_cannot_use(guest: Guest, qpair_server: QpairServer) -> None:
    """Firmware comes first, with a split ring of its own; QEMU has had the inflight region made for rings of 100."""
    qpair_server.rpc("bdev_malloc_create", name="disk0", num_blocks=65536, block_size=512)
    arguments = vhost_user_blk_args(qpair_server.export_disk("vhost.0", "disk0", packed_ring=True), queue_size=100, packed=True)
    identity = Path(__file__).parent / "jobs" / "identity.sh"
    outcome = guest.run([identity], qemu_args=arguments, variables={"DISK": "vdb"}, timeout_s=120)
    assert (outcome.rc, outcome.values.get("identity:packed")) == (0, "1"), outcome.console
    assert "WARNING" not in qpair_server.log.read_text()
