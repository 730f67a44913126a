"""A bdev that is another one by another name: the smallest that stands on a base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpair.bdev.control import BdevSubsystem, Record, SimpleModule, new_uuid
from qpair.bdev.model import BdevModule
from qpair.rpc.registry import Params, method
from qpair.rpc.types import Uuid

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["create", "make"]


def make(room: BdevSubsystem) -> BdevModule:
    """How passthrus show themselves and are saved: by their records."""
    return SimpleModule(room, "passthru", "passthru", shows="passthru")


async def create(room: BdevSubsystem, name: str, base: str, uuid: str | None = None) -> None:
    """Have ``name`` stand on ``base``, also if that comes later, or goes and comes back."""
    unique = uuid or new_uuid()

    async def make_it() -> None:
        below = room.info(base).name
        await room.call("bdev_passthru_create", name, below, uuid=unique)
        params = {"base_bdev_name": below, "name": name, "uuid": unique}
        room.record(name, Record("bdev_passthru_create", params, {"name": name, "base_bdev_name": below}))

    await room.examiner.declare(name, base, make_it)


class PassthruCreate(Params):
    """``base_bdev_name`` may appear later."""

    name: str
    base_bdev_name: str
    uuid: Uuid | None = None


@method("bdev_passthru_create", params=PassthruCreate)
async def bdev_passthru_create(stack: Stack, params: PassthruCreate) -> str:
    """A bdev that passes everything on to its base; the answer is its name."""
    await create(stack.bdevs, params.name, params.base_bdev_name, params.uuid)
    return params.name


class PassthruDelete(Params):
    """One passthru by name."""

    name: str


@method("bdev_passthru_delete", params=PassthruDelete)
async def bdev_passthru_delete(stack: Stack, params: PassthruDelete) -> bool:
    """Remove a passthru; its base is free again."""
    await stack.bdevs.delete(params.name, module="passthru")
    return True
