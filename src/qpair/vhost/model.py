"""What a user configures: a vhost-user-blk controller, one bdev behind one socket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from qpair.app.cores import format_mask

if TYPE_CHECKING:
    from qpair.vhost.control import VhostSubsystem

__all__ = ["TRANSPORT", "Coalescing", "VhostBlkController", "describe"]

TRANSPORT = "vhost_user_blk"


@dataclass(frozen=True, slots=True)
class Coalescing:
    """When interrupts are held back, as SPDK has it; a delay of 0: never."""

    delay_base_us: int = 0
    iops_threshold: int = 60_000


@dataclass(slots=True)
class VhostBlkController:
    """A bdev as a virtio block device. ``reactors`` are the lcores whose reactors take its queues, round robin.

    A context manager: ``async with await stack.export("disk0", "disk0.sock"):`` removes it at the end, disconnecting its front end."""

    name: str
    bdev: str
    socket: str
    reactors: tuple[int, ...]
    readonly: bool
    packed_ring: bool
    num_queues: int
    client: bool
    room: VhostSubsystem
    coalescing: Coalescing = Coalescing()

    async def delete(self, *, force: bool = True) -> None:
        """Remove it. With a front end connected: `Busy`, unless ``force`` disconnects it first."""
        await self.room.delete(self.name, force=force)

    async def set_reactors(self, reactors: Iterable[int]) -> None:
        """Move its queues to these lcores' reactors, under whatever I/O there is."""
        await self.room.set_reactors(self.name, reactors=reactors)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.room.has(self.name):
            await self.delete()

    def info(self) -> dict[str, Any]:
        """What the engine says of it now, see ``Engine.vhost_blk_info``."""
        return self.room.engine_info(self.name)

    def config(self) -> list[dict[str, Any]]:
        """The calls that make it again."""
        params: dict[str, Any] = {
            "ctrlr": self.name,
            "dev_name": self.bdev,
            "cpumask": format_mask(self.reactors),
            "readonly": self.readonly,
            "transport": TRANSPORT,
        }
        if self.packed_ring:
            params["packed_ring"] = True
        method = "vhost_create_blk_controller"
        if self.client:
            method = "qpair_vhost_create_blk_controller"
            params |= {"client": True, "num_queues": self.num_queues}
        calls = [{"method": method, "params": params}]
        if self.coalescing.delay_base_us:
            limits = {"delay_base_us": self.coalescing.delay_base_us, "iops_threshold": self.coalescing.iops_threshold}
            calls.append({"method": "vhost_controller_set_coalescing", "params": {"ctrlr": self.name, **limits}})
        return calls


def describe(controller: VhostBlkController, info: Mapping[str, Any]) -> dict[str, Any]:
    """One element of vhost_get_controllers. ``info``: the engine's dict of this controller."""
    sessions: Sequence[Mapping[str, Any]] = info["sessions"]
    described = {
        "ctrlr": controller.name,
        "cpumask": f"0x{format_mask(controller.reactors)}",
        "delay_base_us": controller.coalescing.delay_base_us,
        "iops_threshold": controller.coalescing.iops_threshold,
        "socket": controller.socket,
        "sessions": [_describe_session(controller.name, index, session) for index, session in enumerate(sessions)],
        "backend_specific": {"block": {"readonly": controller.readonly, "bdev": info["bdev"] or None, "transport": TRANSPORT}},
    }
    if controller.client:
        described["qpair"] = {"client": True, "not_connected": controller.room.connection(controller.name)}
    return described


def _describe_session(name: str, index: int, session: Mapping[str, Any]) -> dict[str, Any]:
    queues = session["queues"]
    return {
        "vid": session["id"],
        "id": index,
        "name": f"{name}s{session['id']}",
        "started": any(queue["state"] == "running" for queue in queues),
        "max_queues": len(queues),
        "inflight_task_cnt": sum(queue["inflight"] for queue in queues),
        "queues": [dict(queue) for queue in queues],
    }
