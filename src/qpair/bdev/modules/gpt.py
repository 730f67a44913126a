"""Partitions of a GUID partition table as bdevs: ``diskp1``, ``diskp2`` and so on.

How it works: a bdev that appears, and that nobody claimed, is read where a table would be; if there is one, from its primary or else its backup, and it has
partitions to show, they become bdevs and the bdev is claimed. A bdev without such partitions is left alone.

Which partitions: as in SPDK, those of SPDK's own type, and no others, so that a guest's disk does not fall apart because somebody partitioned it inside the guest. Who wants
them all switches ``qpair_gpt_set_options all_partitions`` on; that also looks again at what is there and unclaimed.

Errors: what is wrong with a table or an entry is logged with the bdev's name; the rest goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from uuid import UUID

from qpair.bdev.client import BdevHandle, OpenBdev
from qpair.bdev.control import BdevSubsystem, Record
from qpair.bdev.gpt import OLD_SPDK_TYPE, PRIMARY_LBA, SPDK_TYPE, Entry, GptError, Table, decode_entries, decode_header, is_protective
from qpair.bdev.model import BdevInfo, BdevModule
from qpair.errors import QpairError
from qpair.rpc.registry import Params, method

if TYPE_CHECKING:
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry

__all__ = ["Partitions", "make"]

logger = logging.getLogger("qpair.bdev")
# A primary table, a partition and a backup: on fewer blocks there is none.
BLOCKS_MIN = 7


class Partitions:
    """The partitions of one stack."""

    name = "gpt"
    product_name = "GPT Disk"

    def __init__(self, room: BdevSubsystem) -> None:
        self._room = room
        self.all_partitions = False

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """What its table says of a partition."""
        record = self._room.records.get(info.name)
        return {"gpt": record.shown} if record is not None else {}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """The option; tables are found again by themselves."""
        return [{"method": "qpair_gpt_set_options", "params": {"all_partitions": True}}] if self.all_partitions else []

    async def set_options(self, all_partitions: bool) -> None:
        """Which partitions are shown from now on; those that are there stay."""
        self.all_partitions = all_partitions
        if all_partitions:
            for info in self._room.infos():
                if info.claimed_by is None and not info.removing:
                    await self.examine(self._room.stack, info)

    async def examine(self, stack: Stack, info: BdevInfo) -> None:
        """Look for a table on a bdev that nobody claimed."""
        if info.num_blocks < BLOCKS_MIN or info.zoned is not None or not info.supported.get("read", False):
            return
        async with await BdevHandle(stack, info.name).open(write=False) as disk:
            table = await _find(disk, info)
        if table is None:
            return
        for number, why in table.refused:
            logger.warning("%s: partition %d is refused: %s", info.name, number + 1, why)
        shown = [(number, entry, size) for number, entry in table.entries if (size := self._size(entry)) > 0]
        if shown:
            await self._make(info, table, shown)

    def _size(self, entry: Entry) -> int:
        """In blocks; 0: not shown."""
        if entry.type_guid == OLD_SPDK_TYPE:
            return entry.num_blocks - 1
        return entry.num_blocks if self.all_partitions or entry.type_guid == SPDK_TYPE else 0

    async def _make(self, info: BdevInfo, table: Table, shown: list[tuple[int, Entry, int]]) -> None:
        parts = [(f"{info.name}p{number + 1}", entry.first_lba, size, _uuid(entry)) for number, entry, size in shown]
        await self._room.call("bdev_parts_create", info.name, "gpt", parts)
        for (name, *_), (_, entry, _) in zip(parts, shown, strict=True):
            self._room.record(
                name,
                Record(
                    "",
                    {},
                    {
                        "base_bdev": info.name,
                        "offset_blocks": entry.first_lba,
                        "partition_table_guid": str(table.header.disk_guid),
                        "partition_type_guid": str(entry.type_guid),
                        "unique_partition_guid": str(entry.unique_guid),
                        "partition_name": entry.name,
                    },
                ),
            )


def _uuid(entry: Entry) -> str | None:
    """None, that is a random one, for a GUID that says nothing."""
    return str(entry.unique_guid) if entry.unique_guid != UUID(int=0) else None


async def _find(disk: OpenBdev, info: BdevInfo) -> Table | None:
    """The table of a disk, if it has one that can be believed."""
    size = info.block_size
    try:
        if not is_protective(await disk.read(0, size)):
            return None
        try:
            return await _read(disk, info, PRIMARY_LBA)
        except GptError as error:
            logger.warning("%s: its primary partition table is refused: %s", info.name, error)
        table = await _read(disk, info, info.num_blocks - 1)
    except GptError as error:
        logger.warning("%s: its backup partition table is refused too: %s", info.name, error)
        return None
    except QpairError as error:
        logger.warning("%s: its partition table cannot be read: %s", info.name, error)
        return None
    logger.warning("%s: its backup partition table is used", info.name)
    return table


async def _read(disk: OpenBdev, info: BdevInfo, lba: int) -> Table:
    size = info.block_size
    header = decode_header(await disk.read(lba * size, size), lba=lba, block_size=size, num_blocks=info.num_blocks)
    start, blocks = header.array(size)
    return decode_entries(header, await disk.read(start * size, blocks * size))


def make(room: BdevSubsystem) -> BdevModule:
    """The partitions of a stack."""
    return Partitions(room)


class GptSetOptions(Params):
    """``all_partitions``: of every type, instead of SPDK's own alone."""

    all_partitions: bool


@method("qpair_gpt_set_options", params=GptSetOptions)
async def qpair_gpt_set_options(stack: Stack, params: GptSetOptions) -> bool:
    """Which partitions of GUID partition tables become bdevs."""
    module = stack.bdevs.module_named("gpt")
    assert isinstance(module, Partitions)
    await module.set_options(params.all_partitions)
    return True
