"""A bdev cut into parts of one size, named after it: ``diskp0``, ``diskp1`` and so on.

How it works: one claim of the base, one declaration for all parts. The base may come later; when it goes, its parts go, and, as in SPDK, the split is
forgotten: a base of that name that comes later is whole.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from qpair.bdev.control import BdevSubsystem, Record
from qpair.bdev.derive import part_uuid
from qpair.bdev.model import BdevInfo, BdevModule
from qpair.bdev.modules.answers import BadParameters, said_as
from qpair.errors import AlreadyExists, InvalidArgument, NoSuchFile
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U32, U64

if TYPE_CHECKING:
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry

__all__ = ["Splits", "make"]

logger = logging.getLogger("qpair.bdev")
PARTS_MAX = 1 << 16


class Split(msgspec.Struct):
    """One base's. ``parts``: their names, once it was made."""

    base: str
    count: int
    size_mb: int
    parts: list[str] = msgspec.field(default_factory=list)


class Splits:
    """The splits of one stack."""

    name = "split"
    product_name = "Split Disk"

    def __init__(self, room: BdevSubsystem) -> None:
        self._room = room
        self._splits: dict[str, Split] = {}

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """Where on its base a part begins."""
        record = self._room.records.get(info.name)
        return {"split": record.shown} if record is not None else {}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """One call a base, also for one that is not there yet."""
        return [
            {"method": "bdev_split_create", "params": {"base_bdev": split.base, "split_count": split.count, "split_size_mb": split.size_mb}}
            for split in self._splits.values()
            if not self._ended(split)
        ]

    def _ended(self, split: Split) -> bool:
        """Its base was there, and went."""
        return bool(split.parts) and not any(self._room.exists(part) for part in split.parts)

    async def create(self, base: str, count: int, size_mb: int = 0) -> list[str]:
        """Cut ``base`` into ``count`` parts of ``size_mb`` MiB (0: as large as fits); their names, or none yet if the base is not there."""
        if not 0 < count <= PARTS_MAX:
            raise InvalidArgument(f"split_count {count}: 1 to {PARTS_MAX}")
        if (known := self._splits.get(base)) is not None:
            if not self._ended(known):
                raise AlreadyExists(f"bdev {base!r} is split already")
            self._forget(known)
        split = Split(base, count, size_mb)

        async def make_it() -> None:
            if split.parts:
                self._forget(split)
            else:
                await self._make(split)

        self._splits[base] = split
        try:
            await self._room.examiner.declare(self._key(split), base, make_it)
        except BaseException:
            self._splits.pop(base, None)
            raise
        return list(split.parts)

    async def delete(self, base: str) -> None:
        """Remove all parts of ``base``."""
        if (split := self._splits.get(base)) is None or self._ended(split):
            raise NoSuchFile(f"bdev {base!r} is not split")
        self._forget(split)
        standing = [part for part in split.parts if self._room.exists(part)]
        await asyncio.gather(*(self._room.delete(part, module="split") for part in standing))

    def _forget(self, split: Split) -> None:
        self._splits.pop(split.base, None)
        self._room.examiner.forget(self._key(split))

    def _key(self, split: Split) -> str:
        """What the declaration is known by: if the first part is there, all are."""
        return f"{split.base}p0"

    async def _make(self, split: Split) -> None:
        below = self._room.info(split.base)
        size = _blocks(split, below)
        count = below.num_blocks // size
        if split.count > count:
            logger.warning("%s: %d parts of %d blocks do not fit; there will be %d", below.name, split.count, size, count)
        else:
            count = split.count
        names = [f"{split.base}p{number}" for number in range(count)]
        offsets = [number * size for number in range(count)]
        parts = [(name, offset, size, part_uuid(below.uuid, offset, size)) for name, offset in zip(names, offsets, strict=True)]
        await self._room.call("bdev_parts_create", below.name, "split", parts)
        for name, offset in zip(names, offsets, strict=True):
            self._room.record(name, Record("bdev_split_create", {}, {"base_bdev": below.name, "offset_blocks": offset}))
        split.parts = names


def _blocks(split: Split, below: BdevInfo) -> int:
    """A part's size."""
    if split.size_mb == 0:
        if split.count > below.num_blocks:
            raise InvalidArgument(f"split_count {split.count}: bdev {below.name!r} has {below.num_blocks} blocks")
        return below.num_blocks // split.count
    blocks, rest = divmod(split.size_mb << 20, below.block_size)
    if rest:
        raise InvalidArgument(f"split_size_mb {split.size_mb}: no multiple of the block size {below.block_size}")
    if blocks > below.num_blocks:
        raise InvalidArgument(f"split_size_mb {split.size_mb}: bdev {below.name!r} has {below.size_bytes} bytes")
    return blocks


def make(room: BdevSubsystem) -> BdevModule:
    """The splits of a stack."""
    return Splits(room)


def _splits(stack: Stack) -> Splits:
    module = stack.bdevs.module_named("split")
    assert isinstance(module, Splits)
    return module


class SplitCreate(Params):
    """``split_size_mb`` in MiB; absent or 0: the base's size divided by ``split_count``."""

    base_bdev: str
    split_count: U32
    split_size_mb: U64 | None = None


@method("bdev_split_create", params=SplitCreate)
async def bdev_split_create(stack: Stack, params: SplitCreate) -> list[str]:
    """Cut a bdev into parts of one size; the answer is their names."""
    with said_as(BadParameters, f"Failed to create {params.split_count} split bdevs from '{params.base_bdev}': "):
        return await _splits(stack).create(params.base_bdev, params.split_count, params.split_size_mb or 0)


class SplitDelete(Params):
    """By the base."""

    base_bdev: str


@method("bdev_split_delete", params=SplitDelete)
async def bdev_split_delete(stack: Stack, params: SplitDelete) -> bool:
    """Remove all parts of a bdev; it is whole again."""
    with said_as(BadParameters):
        await _splits(stack).delete(params.base_bdev)
    return True
