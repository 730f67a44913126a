"""What a user configures: a virtio controller, one remote device that is one bdev here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry
    from qpair.bdev.model import BdevInfo
    from qpair.virtio.control import VirtioSubsystem

__all__ = ["VirtioController", "VirtioModule", "options"]


@dataclass(frozen=True, slots=True)
class VirtioController:
    """A virtio-user controller. Its bdev has its name. ``queue_size`` in entries; ``loss_timeout_s``: how long I/O waits for a target that left, None: for ever."""

    name: str
    socket: str
    num_queues: int
    queue_size: int
    loss_timeout_s: float | None = None

    def config(self) -> ConfigEntry:
        """The call that makes it again."""
        params = {
            "name": self.name,
            "dev_type": "blk",
            "trtype": "user",
            "traddr": self.socket,
            "vq_count": self.num_queues,
            "vq_size": self.queue_size,
        }
        return {"method": "bdev_virtio_attach_controller", "params": params}


class VirtioModule:
    """How a virtio bdev shows itself among bdevs (`qpair.bdev.model.BdevModule`)."""

    name = "virtio"
    product_name = "VirtioBlk Disk"

    def __init__(self, room: VirtioSubsystem) -> None:
        self._room = room

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """``{"virtio": {"type": "user", "socket": path}}``."""
        found = self._room.find(info.name)
        return {"virtio": {"type": "user", "socket": found.socket}} if found is not None else {}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """One call a controller, and one before each that has another limit than the one before."""
        entries: list[ConfigEntry] = []
        limit: float | None = None
        for controller in self._room.controllers():
            if controller.loss_timeout_s != limit:
                limit = controller.loss_timeout_s
                entries.append(options(limit))
            entries.append(controller.config())
        if self._room.loss_timeout_s != limit:
            entries.append(options(self._room.loss_timeout_s))
        return entries


def options(loss_timeout_s: float | None) -> ConfigEntry:
    """The call that sets what controllers attached later have."""
    return {"method": "qpair_virtio_set_options", "params": {"ctrlr_loss_timeout_sec": -1 if loss_timeout_s is None else loss_timeout_s}}
