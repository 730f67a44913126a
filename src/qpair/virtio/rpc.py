"""JSON-RPC methods of virtio bdevs; names, parameters and results are SPDK's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from qpair.errors import Unsupported
from qpair.rpc import Params, method
from qpair.rpc.types import U32

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__: list[str] = []

QUEUE_SIZE_DEFAULT = 512
FOREVER = -1


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


class SetOptions(Params):
    """qpair_virtio_set_options."""

    ctrlr_loss_timeout_sec: float = FOREVER


@method("qpair_virtio_set_options", params=SetOptions)
async def qpair_virtio_set_options(stack: Stack, params: SetOptions) -> bool:
    """How long I/O of controllers attached from now on waits for a target that left: -1 for ever, 0 not at all."""
    limit = params.ctrlr_loss_timeout_sec
    stack.virtio.set_options(loss_timeout_s=None if limit == FOREVER else limit)
    return True


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
        num_queues=params.vq_count or None,
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
