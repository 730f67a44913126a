"""What the engine says about a bdev, as typed objects, and as SPDK's JSON shows it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry

__all__ = ["BdevInfo", "BdevModule", "Limits", "describe"]

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
MIB = 1 << 20
QOS_LIMITS = ("rw_ios_per_sec", "rw_mbytes_per_sec", "r_mbytes_per_sec", "w_mbytes_per_sec")


class Limits(msgspec.Struct, frozen=True):
    """Rates a second; 0: no limit."""

    rw_ios: int = 0
    rw_bytes: int = 0
    r_bytes: int = 0
    w_bytes: int = 0


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
    zoned: Mapping[str, int] | None = None
    bases: tuple[str, ...] = ()
    limits: Limits = Limits()
    qos_group: str | None = None
    metadata_bytes: int = 0

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
            zoned=raw.get("zoned"),
            bases=tuple(raw.get("bases", ())),
            limits=Limits(*raw.get("limits", ())),
            qos_group=raw.get("qos_group"),
            metadata_bytes=raw.get("metadata_bytes", 0),
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
    """One element of bdev_get_bdevs. ``hints``: what its maker said of preferred sizes, in blocks; 0 where nothing was said.

    Beside SPDK's members stands ``qpair``: ``bases``, the names of the bdevs right below, and ``claimed_by``, the module that has claimed it, or null.
    """
    shown: dict[str, Any] = {
        "name": info.name,
        "aliases": list(info.aliases),
        "product_name": module.product_name if module is not None else info.module,
        "block_size": info.block_size,
        "num_blocks": info.num_blocks,
        **{name: hints.get(name, 0) for name in HINTS},
        "uuid": info.uuid,
        **({"md_size": info.metadata_bytes, "md_interleave": False, "dif_type": 0} if info.metadata_bytes else {}),
        "assigned_rate_limits": assigned(info.limits),
        "claimed": info.claimed_by is not None,
    }
    if info.claimed_by is not None:
        shown["claim_type"] = "exclusive_write"
    shown["zoned"] = info.zoned is not None
    if info.zoned is not None:
        shown.update({name: info.zoned[name] for name in ("zone_size", "max_open_zones", "optimal_open_zones")})
    shown["supported_io_types"] = dict(_io_types(tuple(info.supported.items())))
    shown["driver_specific"] = module.driver_specific(info) if module is not None else {}
    shown["qpair"] = {"bases": list(info.bases), "claimed_by": info.claimed_by}
    return shown


def assigned(limits: Limits) -> dict[str, int]:
    """As bdev_get_bdevs shows it: megabytes, rounded up so that a limit never looks like none."""
    return dict(
        zip(QOS_LIMITS, (limits.rw_ios, *(-(-size // MIB) for size in (limits.rw_bytes, limits.r_bytes, limits.w_bytes))), strict=True)
    )
