"""The zones of a zoned bdev: what they are, appending to them, and managing them. Use ``disk.zones`` of an open one.

Positions and lengths are bytes, as in `qpair.bdev.client`. A descriptor on the wire is NVMe's (Zoned Namespace Command Set 1.1, 3.1.3).

Errors: `InvalidArgument` for a bdev that is not zoned, or a position where no zone begins; `IoFailed` for what a zone refuses (it is full, it is being reset).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

from qpair.errors import InvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qpair.bdev.client import OpenBdev

__all__ = ["Zone", "ZoneState", "Zones"]

DESCRIPTOR = struct.Struct("<BB6xQQQ32x")
REPORT_MAX = 4096
Action = Literal["append", "report", "open", "close", "finish", "reset"]


class ZoneState(IntEnum):
    """NVMe's zone states."""

    EMPTY = 0x1
    IMPLICITLY_OPEN = 0x2
    EXPLICITLY_OPEN = 0x3
    CLOSED = 0x4
    READ_ONLY = 0xD
    FULL = 0xE
    OFFLINE = 0xF


@dataclass(frozen=True, slots=True)
class Zone:
    """One zone; all in bytes."""

    start: int
    capacity: int
    write_pointer: int
    state: ZoneState


class Zones:
    """Of one open bdev."""

    def __init__(self, disk: OpenBdev) -> None:
        self._disk = disk
        zoned = disk.info.zoned
        if zoned is None:
            raise InvalidArgument(f"bdev {disk.name!r} is not zoned")
        self.size: int = zoned["zone_size"] * disk.block_size
        self.capacity: int = zoned["zone_capacity"] * disk.block_size

    async def report(self, start: int = 0, count: int | None = None) -> list[Zone]:
        """``count`` zones from the one that begins at ``start`` on; None: all that follow."""
        left = (self._disk.info.size_bytes - start) // self.size if count is None else count
        found: list[Zone] = []
        while left > 0:
            step = min(left, REPORT_MAX)
            raw: bytes = await self._do("report", start, step * self.size)
            found.extend(self._zone(*fields) for fields in DESCRIPTOR.iter_unpack(raw))
            start, left = start + step * self.size, left - step
        return found

    def _zone(self, _type: int, state: int, capacity: int, start: int, write_pointer: int) -> Zone:
        size = self._disk.block_size
        return Zone(start * size, capacity * size, write_pointer * size, ZoneState(state >> 4))

    async def append(self, start: int, data: Buffer) -> int:
        """Write ``data`` where the zone's write pointer is; where that was."""
        view = memoryview(data).cast("B")
        block: int = await self._do("append", start, view.nbytes, view)
        return block * self._disk.block_size

    async def open(self, start: int) -> None:
        """Ready for writing until closed."""
        await self._do("open", start, self.size)

    async def close(self, start: int) -> None:
        """Keep what is written, and write later."""
        await self._do("close", start, self.size)

    async def finish(self, start: int) -> None:
        """No more writes until it is reset."""
        await self._do("finish", start, self.size)

    async def reset(self, start: int) -> None:
        """Empty again."""
        await self._do("reset", start, self.size)

    async def _do(self, action: Action, offset: int, length: int, data: Any = None) -> Any:
        return await self._disk.zone_io(action, offset, length, data)
