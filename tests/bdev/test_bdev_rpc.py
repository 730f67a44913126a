"""What the bdev methods answer, member by member."""

from __future__ import annotations

from typing import Any

import pytest

from qpair.errors import NoSuchBdev

UUID = "1c2f2f5e-0c43-4a39-b1c5-6d38a0b9e0d2"


async def test_bdev_get_bdevs_has_spdks_members_in_spdks_order(stack: Any) -> None:
    await stack.rpc("bdev_null_create", name="n0", num_blocks=2048, block_size=512, uuid=UUID, optimal_write_size=8)
    (disk,) = await stack.rpc("bdev_get_bdevs")
    io_types = disk.pop("supported_io_types")
    assert list(disk.items()) == [
        ("name", "n0"),
        ("aliases", [UUID]),
        ("product_name", "Null disk"),
        ("block_size", 512),
        ("num_blocks", 2048),
        ("preferred_write_alignment", 0),
        ("preferred_write_granularity", 0),
        ("optimal_write_size", 8),
        ("preferred_unmap_alignment", 0),
        ("preferred_unmap_granularity", 0),
        ("uuid", UUID),
        ("assigned_rate_limits", {"rw_ios_per_sec": 0, "rw_mbytes_per_sec": 0, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 0}),
        ("claimed", False),
        ("zoned", False),
        ("driver_specific", {}),
        ("qpair", {"bases": [], "claimed_by": None}),
    ]
    assert len(io_types) == 22
    assert [name for name in ("read", "write", "flush", "reset", "nvme_io", "zone_append") if io_types[name]] == [
        "read",
        "write",
        "flush",
        "reset",
    ]


async def test_a_file_shows_its_name_and_its_options(stack: Any, tmp_path: Any) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    await stack.rpc("bdev_aio_create", name="a0", filename=str(path), block_size=4096, readonly=True)
    (disk,) = await stack.rpc("bdev_get_bdevs", name="a0")
    assert disk["driver_specific"] == {
        "aio": {"filename": str(path), "block_size_override": True, "readonly": True, "fallocate": False, "nowait": False}
    }
    assert disk["num_blocks"] == 256
    (call, _) = await stack.rpc("framework_get_config", name="bdev")
    assert call["method"] == "bdev_aio_create"
    assert call["params"]["readonly"] is True
    assert call["params"]["block_size"] == 4096


async def test_iostat_counts_and_resets(stack: Any) -> None:
    disk = await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_wait_for_examine")  # who looks for partitions reads too, and is counted
    await stack.rpc("bdev_reset_iostat")
    await disk.write(0, bytes(4096))
    await disk.read(0, 1024)
    stat = (await stack.rpc("bdev_get_iostat", names=["m0"], reset_mode="all"))["bdevs"][0]
    assert (stat["num_write_ops"], stat["bytes_written"], stat["num_read_ops"], stat["bytes_read"]) == (1, 4096, 1, 1024)
    assert (await stack.rpc("bdev_get_iostat"))["bdevs"][0]["num_read_ops"] == 0
    with pytest.raises(NoSuchBdev):
        await stack.rpc("bdev_get_iostat", names=["m0", "nothing"])


async def test_deleting_by_the_wrong_kind_is_no_such_device(stack: Any) -> None:
    await stack.null("n0", "1MiB")
    for kind in ("malloc", "aio", "uring"):
        with pytest.raises(NoSuchBdev, match=f"bdev 'n0' is of module null, not {kind}"):
            await stack.rpc(f"bdev_{kind}_delete", name="n0")
    assert await stack.rpc("bdev_null_delete", name="n0") is True


async def test_unnamed_malloc_bdevs_are_numbered(stack: Any) -> None:
    names = [await stack.rpc("bdev_malloc_create", num_blocks=8, block_size=512) for _ in range(3)]
    assert names == ["Malloc0", "Malloc1", "Malloc2"]
    await stack.delete("Malloc1")
    assert await stack.rpc("bdev_malloc_create", num_blocks=8, block_size=512) == "Malloc1"


async def test_a_resized_null_bdev_is_saved_at_its_new_size(stack: Any) -> None:
    await stack.null("n0", "1MiB")
    await stack.rpc("bdev_null_resize", name="n0", new_size=2)
    (call, _) = await stack.rpc("framework_get_config", name="bdev")
    assert call["params"]["num_blocks"] == 4096
