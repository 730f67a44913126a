"""JSON-RPC methods of virtio bdevs; names, parameters and results are SPDK's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from qpair.errors import Unsupported
from qpair.rpc import Params, method
from qpair.rpc.types import U32

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__: list[str] = []

NUM_QUEUES_DEFAULT = 1
QUEUE_SIZE_DEFAULT = 512


class AttachController(Params):
    """bdev_virtio_attach_controller."""

    name: str
    trtype: Literal["pci", "user", "vfio-user"]
    traddr: str
    dev_type: Literal["blk", "scsi"]
    vq_count: U32 = 0
    vq_size: U32 = 0


class DetachController(Params):
    """bdev_virtio_detach_controller."""

    name: str


@method("bdev_virtio_attach_controller", params=AttachController)
async def bdev_virtio_attach_controller(stack: Stack, params: AttachController) -> list[str]:
    """Make a vhost-user-blk target a bdev; its name alone is the result."""
    if params.trtype != "user":
        raise Unsupported(f"trtype is {params.trtype!r}, the only one supported is 'user'")
    if params.dev_type != "blk":
        raise Unsupported(f"dev_type is {params.dev_type!r}, the only one supported is 'blk'")
    controller = await stack.virtio.attach(
        params.name,
        params.traddr,
        num_queues=params.vq_count or NUM_QUEUES_DEFAULT,
        queue_size=params.vq_size or QUEUE_SIZE_DEFAULT,
    )
    return [controller.name]


@method("bdev_virtio_detach_controller", params=DetachController)
async def bdev_virtio_detach_controller(stack: Stack, params: DetachController) -> bool:
    """Remove a virtio bdev and leave its target."""
    await stack.virtio.detach(params.name)
    return True


@method("bdev_virtio_scsi_get_devices")
async def bdev_virtio_scsi_get_devices(stack: Stack, params: None) -> list[Any]:
    """None: virtio-scsi targets are not attached to."""
    return []
