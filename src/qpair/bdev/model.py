"""What the engine says about a bdev, as typed objects, and as SPDK's JSON shows it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry

__all__ = ["BdevInfo", "BdevModule", "describe", "iostat"]

# SPDK's names in SPDK's order; the engine names those that it knows alike.
IO_TYPES = (
    "read",
    "write",
    "unmap",
    "flush",
    "reset",
    "nvme_admin",
    "nvme_io",
    "nvme_io_md",
    "write_zeroes",
    "zcopy",
    "get_zone_info",
    "zone_management",
    "zone_append",
    "compare",
    "compare_and_write",
    "abort",
    "seek_hole",
    "seek_data",
    "copy",
    "nvme_iov_md",
    "nvme_nssr",
    "write_uncorrectable",
)
HINTS = (
    "preferred_write_alignment",
    "preferred_write_granularity",
    "optimal_write_size",
    "preferred_unmap_alignment",
    "preferred_unmap_granularity",
)
QOS_LIMITS = ("rw_ios_per_sec", "rw_mbytes_per_sec", "r_mbytes_per_sec", "w_mbytes_per_sec")


class BdevInfo(msgspec.Struct, frozen=True):
    """A snapshot of one bdev. Sizes in bytes unless named otherwise."""

    name: str
    module: str
    uuid: str
    aliases: tuple[str, ...]
    block_size: int
    num_blocks: int
    physical_block_size: int
    optimal_io_boundary: int
    readonly: bool
    claimed_by: str | None
    removing: bool
    open_count: int
    supported: Mapping[str, bool]
    path: str | None
    version: int
    bases: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """``num_blocks * block_size``."""
        return self.num_blocks * self.block_size

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> BdevInfo:
        """From one dict of ``Engine.bdev_info``."""
        aliases = tuple(raw["aliases"])
        uuid = raw["uuid"] or ""
        if uuid and uuid not in aliases:
            aliases = (*aliases, uuid)  # as SPDK: a bdev can be named by its UUID
        return cls(
            name=raw["name"],
            module=raw["module"],
            uuid=uuid,
            aliases=aliases,
            block_size=raw["block_size"],
            num_blocks=raw["num_blocks"],
            physical_block_size=raw["physical_block_size"],
            optimal_io_boundary=raw["optimal_io_boundary"],
            readonly=raw["readonly"],
            claimed_by=raw["claimed_by"] or None,
            removing=raw["removing"],
            open_count=raw["open_count"],
            supported=raw["supported"],
            path=raw["path"] or None,
            version=raw["version"],
            bases=tuple(raw.get("bases", ())),
        )


class BdevModule(Protocol):
    """How one kind of bdev shows itself. ``name`` is the engine's ``module``. A room registers its own with ``stack.bdevs.register_module``.

    One that knows bdevs by their content also has ``async def examine(self, stack: Stack, info: BdevInfo) -> None``, see `qpair.bdev.examine`.
    """

    name: str
    product_name: str

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """The object of that name in bdev_get_bdevs."""
        ...

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """The calls that recreate all bdevs of this kind."""
        ...


@cache
def _io_types(supported: tuple[tuple[str, bool], ...]) -> dict[str, bool]:
    """Kept, for a thousand bdevs of one kind support the same."""
    known = dict(supported)
    return {name: bool(known.get(name, False)) for name in IO_TYPES}


def describe(info: BdevInfo, module: BdevModule | None, hints: Mapping[str, int]) -> dict[str, Any]:
    """One element of bdev_get_bdevs. ``hints``: what its maker said of preferred sizes, in blocks; 0 where nothing was said."""
    shown: dict[str, Any] = {
        "name": info.name,
        "aliases": list(info.aliases),
        "product_name": module.product_name if module is not None else info.module,
        "block_size": info.block_size,
        "num_blocks": info.num_blocks,
        **{name: hints.get(name, 0) for name in HINTS},
        "uuid": info.uuid,
        "assigned_rate_limits": dict.fromkeys(QOS_LIMITS, 0),
        "claimed": info.claimed_by is not None,
    }
    if info.claimed_by is not None:
        shown["claim_type"] = "exclusive_write"
    shown["zoned"] = False
    shown["supported_io_types"] = dict(_io_types(tuple(info.supported.items())))
    shown["driver_specific"] = module.driver_specific(info) if module is not None else {}
    return shown


def iostat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One element of bdev_get_iostat's ``bdevs``, from one dict of ``Engine.bdev_iostat``. Ticks are nanoseconds."""
    return {
        "name": raw["name"],
        "bytes_read": raw["read_bytes"],
        "num_read_ops": raw["read_ios"],
        "bytes_written": raw["write_bytes"],
        "num_write_ops": raw["write_ios"],
        "bytes_unmapped": raw["unmap_bytes"],
        "num_unmap_ops": raw["unmap_ios"],
        "bytes_copied": 0,
        "num_copy_ops": 0,
        "read_latency_ticks": raw["read_ns"],
        "max_read_latency_ticks": raw["max_read_ns"],
        "min_read_latency_ticks": raw["min_read_ns"],
        "write_latency_ticks": raw["write_ns"],
        "max_write_latency_ticks": raw["max_write_ns"],
        "min_write_latency_ticks": raw["min_write_ns"],
        "unmap_latency_ticks": raw["unmap_ns"],
        "max_unmap_latency_ticks": 0,
        "min_unmap_latency_ticks": 0,
        "copy_latency_ticks": 0,
        "max_copy_latency_ticks": 0,
        "min_copy_latency_ticks": 0,
        "io_error": {"failed": raw["errors"]} if raw["errors"] else {},
    }
