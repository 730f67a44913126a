"""A zoned bdev on a plain one. What its zones hold is remembered as long as it is there; when it is made, all of them are full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpair.bdev.control import BdevSubsystem, Record, SimpleModule
from qpair.bdev.derive import zone_block_uuid
from qpair.bdev.model import BdevModule
from qpair.bdev.modules.answers import InternalError, said_as
from qpair.errors import AlreadyExists, InvalidArgument
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U64

if TYPE_CHECKING:
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry

__all__ = ["ZoneBlocks", "make"]


class ZoneBlocks(SimpleModule):
    """The zone_block bdevs of one stack."""

    def __init__(self, room: BdevSubsystem) -> None:
        super().__init__(room, "bdev_zoned_block", "zone_block", shows="zoned_block")
        self._bases: dict[str, str] = {}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """One call a bdev."""
        records = self._room.records.values()
        return [{"method": record.method, "params": record.params} for record in records if record.method == "bdev_zone_block_create"]

    async def create(self, name: str, base: str, zone_capacity: int, optimal_open_zones: int) -> None:
        """Have ``name`` stand on ``base``, also if that comes later. ``zone_capacity`` in blocks."""
        for field, value in (("zone_capacity", zone_capacity), ("optimal_open_zones", optimal_open_zones)):
            if value == 0:
                raise InvalidArgument(f"{field} 0: at least 1")
        self._bases = {known: below for known, below in self._bases.items() if self._room.examiner.is_declared(known)}
        if base in self._bases.values():
            raise AlreadyExists(f"bdev {base!r} is claimed by a zone_block already")

        async def make_it() -> None:
            below = self._room.info(base)
            await self._room.call(
                "bdev_zone_block_create",
                name,
                below.name,
                zone_capacity=zone_capacity,
                optimal_open_zones=optimal_open_zones,
                uuid=zone_block_uuid(below.uuid),
            )
            shown = {"name": name, "base_bdev": below.name, "zone_capacity": zone_capacity, "optimal_open_zones": optimal_open_zones}
            params = {"base_bdev": below.name, "name": name, "zone_capacity": zone_capacity, "optimal_open_zones": optimal_open_zones}
            self._room.record(name, Record("bdev_zone_block_create", params, shown))

        await self._room.examiner.declare(name, base, make_it)
        self._bases[name] = base


def make(room: BdevSubsystem) -> BdevModule:
    """The zone_block bdevs of a stack."""
    return ZoneBlocks(room)


class ZoneBlockCreate(Params):
    """``zone_capacity`` in blocks; a zone is that rounded up to a power of two. ``base_bdev`` may appear later."""

    name: str
    base_bdev: str
    zone_capacity: U64
    optimal_open_zones: U64


@method("bdev_zone_block_create", params=ZoneBlockCreate)
async def bdev_zone_block_create(stack: Stack, params: ZoneBlockCreate) -> str:
    """A zoned bdev on a plain one; the answer is its name."""
    module = stack.bdevs.module_named("bdev_zoned_block")
    assert isinstance(module, ZoneBlocks)
    with said_as(InternalError, "Failed to create block zoned vbdev: "):
        await module.create(params.name, params.base_bdev, params.zone_capacity, params.optimal_open_zones)
    return params.name


class ZoneBlockDelete(Params):
    """One zone_block bdev by name."""

    name: str


@method("bdev_zone_block_delete", params=ZoneBlockDelete)
async def bdev_zone_block_delete(stack: Stack, params: ZoneBlockDelete) -> bool:
    """Remove a zone_block bdev; its base is free again."""
    await stack.bdevs.delete(params.name, module="bdev_zoned_block")
    return True
