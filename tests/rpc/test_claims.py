"""What bdev_get_bdevs says of claims: SPDK's members as SPDK has them, and beside them ours, which name the bases and the owner."""

from __future__ import annotations

from typing import Any

import pytest

# SPDK's members in SPDK's order, of a bdev that is neither zoned nor has metadata.
MEMBERS = [
    "name",
    "aliases",
    "product_name",
    "block_size",
    "num_blocks",
    "preferred_write_alignment",
    "preferred_write_granularity",
    "optimal_write_size",
    "preferred_unmap_alignment",
    "preferred_unmap_granularity",
    "uuid",
    "assigned_rate_limits",
    "claimed",
    "zoned",
    "supported_io_types",
    "driver_specific",
]

# method, parameters, what appears, what it stands on, what the claim is called
KINDS = [
    ("bdev_passthru_create", {"name": "top", "base_bdev_name": "m0"}, ["top"], ["m0"], "passthru"),
    ("bdev_split_create", {"base_bdev": "m0", "split_count": 2}, ["m0p0", "m0p1"], ["m0"], "split"),
    (
        "bdev_delay_create",
        {
            "name": "top",
            "base_bdev_name": "m0",
            "avg_read_latency": 1,
            "p99_read_latency": 1,
            "avg_write_latency": 1,
            "p99_write_latency": 1,
        },
        ["top"],
        ["m0"],
        "delay",
    ),
    ("bdev_error_create", {"base_name": "m0"}, ["EE_m0"], ["m0"], "error"),
    (
        "bdev_zone_block_create",
        {"name": "top", "base_bdev": "m0", "zone_capacity": 64, "optimal_open_zones": 1},
        ["top"],
        ["m0"],
        "bdev_zoned_block",
    ),
    (
        "bdev_raid_create",
        {"name": "top", "raid_level": "raid0", "strip_size_kb": 4, "base_bdevs": ["m0", "m1"]},
        ["top"],
        ["m0", "m1"],
        "raid",
    ),
]


@pytest.mark.parametrize(("method", "params", "made", "bases", "module"), KINDS, ids=[kind[4] for kind in KINDS])
async def test_each_kind_says_what_it_stands_on_and_its_bases_who_claimed_them(
    stack: Any, method: str, params: dict[str, Any], made: list[str], bases: list[str], module: str
) -> None:
    for name in ("m0", "m1", "alone"):
        await stack.malloc(name, "4MiB")
    await stack.rpc(method, **params)
    shown = {disk["name"]: disk for disk in await stack.rpc("bdev_get_bdevs")}
    for name in made:
        assert shown[name]["qpair"] == {"bases": bases, "claimed_by": None}
        assert (shown[name]["claimed"], "claim_type" in shown[name]) == (False, False)
    for name in bases:
        assert shown[name]["qpair"] == {"bases": [], "claimed_by": module}
        assert (shown[name]["claimed"], shown[name]["claim_type"]) == (True, "exclusive_write")
    assert shown["alone"]["qpair"] == {"bases": [], "claimed_by": None}
    assert list(shown["alone"]) == [*MEMBERS, "qpair"]
    assert list(shown["m0"]) == [*MEMBERS[: MEMBERS.index("zoned")], "claim_type", *MEMBERS[MEMBERS.index("zoned") :], "qpair"]


async def test_a_claim_that_is_given_back_is_no_longer_shown(stack: Any) -> None:
    await stack.malloc("m0", "4MiB")
    await stack.rpc("bdev_passthru_create", name="top", base_bdev_name="m0")
    await stack.rpc("bdev_passthru_delete", name="top")
    (shown,) = await stack.rpc("bdev_get_bdevs")
    assert (shown["claimed"], shown["qpair"], "claim_type" in shown) == (False, {"bases": [], "claimed_by": None}, False)
