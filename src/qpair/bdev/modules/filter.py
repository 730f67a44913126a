"""Filters on any bdev: how they are put there, and how they show themselves. They are objects of this process, so no configuration brings them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpair.app.subsystems import ConfigEntry
from qpair.bdev.control import BdevSubsystem, checked_name, new_uuid
from qpair.bdev.filter import Filter
from qpair.bdev.model import BdevInfo, BdevModule
from qpair.bdev.python import PythonBdevRunner
from qpair.errors import from_engine

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["add", "make"]


class FilterModule:
    """See the module."""

    name = "filter"
    product_name = "Python filter"

    def __init__(self, room: BdevSubsystem) -> None:
        self._room = room

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """What it stands on, and what it is shown."""
        server = self._room.server(info.name)
        if not isinstance(server, PythonBdevRunner) or not isinstance(server.target, Filter):
            return {}
        before, after, ranges = server.target.shows
        shown = {"base_bdev_name": info.bases[0], "class": type(server.target).__qualname__, "before": before, "after": after}
        return {"filter": {**shown, "ranges": None if ranges is None else [list(range_) for range_ in ranges]}}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """Nothing: see the module."""
        return []


def make(room: BdevSubsystem) -> BdevModule:
    """The module of one stack."""
    return FilterModule(room)


async def add(room: BdevSubsystem, base: str, filter_: Filter) -> str:
    """A bdev on ``base`` whose I/O ``filter_`` is shown; served on this loop."""
    stack, below = room.stack, room.info(base)
    before, after, ranges = filter_.shows
    try:
        ring = stack.engine.bdev_filter_create(
            checked_name(filter_.name),
            below.name,
            before=before,
            after=after,
            ranges=filter_.blocks(ranges, below.block_size),
            depth=filter_.depth,
            max_io_bytes=filter_.max_io_bytes,
            uuid=new_uuid(),
        )
    except OSError as error:
        raise from_engine(error) from error
    filter_.bind(ring, below.block_size)
    room.serve(filter_.name, PythonBdevRunner(filter_.name, ring, filter_, lambda wake: stack.bridge.subscribe_work(ring.id, wake)))
    return filter_.name
