"""JSON-RPC methods of vhost; names, parameters and results are SPDK's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpair.errors import AlreadyExists, InvalidArgument, NoSuchDevice
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


class QpairCreateBlkController(CreateBlkController):
    """qpair_vhost_create_blk_controller."""

    num_queues: U32 = 16
    client: bool = False


class SetCpumask(Params):
    """qpair_vhost_set_cpumask."""

    ctrlr: str
    cpumask: str


class CreateTransport(Params):
    """virtio_blk_create_transport."""

    name: str


class GetTransports(Params):
    """virtio_blk_get_transports."""

    name: str | None = None


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


async def _create(stack: Stack, params: CreateBlkController, **more: Any) -> bool:
    await stack.vhost.create(
        params.ctrlr,
        params.dev_name,
        cpumask=params.cpumask,
        readonly=params.readonly,
        packed_ring=params.packed_ring,
        transport=params.transport,
        **more,
    )
    return True


@method("vhost_create_blk_controller", params=CreateBlkController)
async def vhost_create_blk_controller(stack: Stack, params: CreateBlkController) -> bool:
    """Export a bdev as a virtio block device on a vhost-user socket."""
    return await _create(stack, params)


@method("qpair_vhost_create_blk_controller", params=QpairCreateBlkController)
async def qpair_vhost_create_blk_controller(stack: Stack, params: QpairCreateBlkController) -> bool:
    """As vhost_create_blk_controller, with what only qpair has: the number of queues, and a socket on which the front end listens (``client``)."""
    return await _create(stack, params, num_queues=params.num_queues, client=params.client)


@method("qpair_vhost_set_cpumask", params=SetCpumask)
async def qpair_vhost_set_cpumask(stack: Stack, params: SetCpumask) -> bool:
    """Move a controller's queues to other reactors, under whatever I/O there is."""
    await stack.vhost.set_reactors(params.ctrlr, cpumask=params.cpumask)
    return True


@method("virtio_blk_create_transport", params=CreateTransport)
async def virtio_blk_create_transport(stack: Stack, params: CreateTransport) -> bool:
    """There is one, vhost_user_blk, from the start; as with SPDK it cannot be made twice."""
    name = stack.vhost.transport(params.name)
    raise AlreadyExists(f"transport {name!r} is always there")


@method("virtio_blk_get_transports", params=GetTransports)
async def virtio_blk_get_transports(stack: Stack, params: GetTransports) -> list[dict[str, Any]]:
    """All transports, or the one named."""
    room = stack.vhost
    if params.name is None:
        return [{"name": name} for name in room.transports()]
    try:
        return [{"name": room.transport(params.name)}]
    except InvalidArgument as error:
        raise NoSuchDevice(str(error)) from error


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
    """Hold a controller's interrupts back while there are many of them."""
    await stack.vhost.set_coalescing(params.ctrlr, params.delay_base_us, params.iops_threshold)
    return True
