"""JSON-RPC methods of vhost; names, parameters and results are SPDK's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpair.rpc import Params, method
from qpair.rpc.types import U32
from qpair.vhost.model import TRANSPORT, describe

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__: list[str] = []


class CreateBlkController(Params):
    """vhost_create_blk_controller."""

    ctrlr: str
    dev_name: str
    readonly: bool = False
    packed_ring: bool = False
    cpumask: str | None = None
    transport: str = TRANSPORT


class DeleteController(Params):
    """vhost_delete_controller."""

    ctrlr: str


class GetControllers(Params):
    """vhost_get_controllers."""

    name: str | None = None


class SetCoalescing(Params):
    """vhost_controller_set_coalescing."""

    ctrlr: str
    delay_base_us: U32
    iops_threshold: U32


@method("vhost_create_blk_controller", params=CreateBlkController)
async def vhost_create_blk_controller(stack: Stack, params: CreateBlkController) -> bool:
    """Export a bdev as a virtio block device on a vhost-user socket."""
    await stack.vhost.create(
        params.ctrlr,
        params.dev_name,
        cpumask=params.cpumask,
        readonly=params.readonly,
        packed_ring=params.packed_ring,
        transport=params.transport,
    )
    return True


@method("vhost_delete_controller", params=DeleteController)
async def vhost_delete_controller(stack: Stack, params: DeleteController) -> bool:
    """Remove a controller to which no front end is connected."""
    await stack.vhost.delete(params.ctrlr)
    return True


@method("vhost_get_controllers", params=GetControllers)
async def vhost_get_controllers(stack: Stack, params: GetControllers) -> list[dict[str, Any]]:
    """All controllers, or the one named."""
    room = stack.vhost
    controllers = room.controllers() if params.name is None else [room.controller(params.name)]
    return [describe(controller, controller.info()) for controller in controllers]


@method("vhost_controller_set_coalescing", params=SetCoalescing)
async def vhost_controller_set_coalescing(stack: Stack, params: SetCoalescing) -> bool:
    """Accepted and remembered, without effect: the engine interrupts once a batch."""
    stack.vhost.set_coalescing(params.ctrlr, params.delay_base_us, params.iops_threshold)
    return True
