"""The virtio controllers of one stack: attaching to targets, detaching, and what happens when a target leaves.

How it works: `VirtioSubsystem.attach` does the handshake of `qpair.virtio.client`, over memory that the engine has laid out, and makes the bdev. The connection stays
open as long as the bdev lives. When the target closes it, that is an event (`qpair.bdev.events.Failed`) and the bdev is unregistered: what is in flight fails after `LOST_DEADLINE_MS`, nothing hangs. When
the bdev goes for another reason, the connection is closed.

Errors: `AlreadyExists`, `NoSuchController`, `InvalidArgument` (number and size of queues), `Unsupported` (transports other than ``user``), and
those of `qpair.virtio.client`.

Limits: queues of 2 to 32768 entries, a power of two; at most as many queues as the target has, and never more than 256.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpair.app.subsystems import Subsystem
from qpair.bdev.events import Failed
from qpair.errors import AlreadyExists, InvalidArgument, NoSuchController, NoSuchDevice, QpairError, from_engine
from qpair.vhost.transport import close_all
from qpair.virtio.model import VirtioController, VirtioModule

if TYPE_CHECKING:
    from qpair._engine import BdevEvent
    from qpair.app.stack import Stack
    from qpair.virtio.client import Device, FrontEnd, Memory, Queue

__all__ = ["VirtioSubsystem"]

QUEUES_MAX = 256
QUEUE_SIZE_MAX = 32768
LOST_DEADLINE_MS = 100

logger = logging.getLogger("qpair.virtio")


@dataclass(slots=True)
class _Attached:
    controller: VirtioController
    front: FrontEnd
    memory: Any
    """Kept: the engine's own mapping outlives it, the target's too; its descriptor is wanted until the end of the handshake only."""


def _engine_memory(*, num_queues: int, queue_size: int) -> Memory:
    from qpair._engine import VirtioMemory

    return VirtioMemory(num_queues=num_queues, queue_size=queue_size)


class VirtioSubsystem(Subsystem):
    """``stack.virtio``."""

    name = "qpair_virtio"
    depends_on = ("bdev",)

    def __init__(self, *, memory_factory: Callable[..., Memory] = _engine_memory) -> None:
        self._stack: Stack | None = None
        self._attached: dict[str, _Attached] = {}
        self._busy_names: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._memory_factory = memory_factory

    # -- life -------------------------------------------------------------------------------------

    async def start(self, stack: Stack) -> None:
        """Make virtio bdevs known to the bdev room, and listen to their events."""
        self._stack = stack
        stack.bdevs.register_module(VirtioModule(self))
        stack.bridge.subscribe_bdev(self._on_bdev)

    async def stop(self, stack: Stack, deadline_ms: int) -> None:
        """Detach from every target, all at once."""
        names = list(self._attached)
        results = await asyncio.gather(*(self.detach(name, deadline_ms=deadline_ms) for name in names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, BaseException):
                logger.error("virtio %s: not detached cleanly: %s", name, result)
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def stack(self) -> Stack:
        """The stack, once started."""
        if self._stack is None:
            raise NoSuchDevice("the virtio subsystem has not started")
        return self._stack

    def controllers(self) -> list[VirtioController]:
        """All, in order of attaching."""
        return [attached.controller for attached in self._attached.values()]

    def find(self, name: str) -> VirtioController | None:
        """The controller of that name."""
        attached = self._attached.get(name)
        return attached.controller if attached is not None else None

    # -- attaching --------------------------------------------------------------------------------

    async def attach(
        self, name: str, path: str | os.PathLike[str], *, num_queues: int = 1, queue_size: int = 512, timeout_s: float = 10.0
    ) -> VirtioController:
        """Make the target on socket ``path`` the bdev ``name``. ``num_queues`` is lowered to what the target has. ``timeout_s`` is for each answer."""
        if not name:
            raise InvalidArgument("name is empty")
        if not 1 <= num_queues <= QUEUES_MAX:
            raise InvalidArgument(f"vq_count is {num_queues}, must be from 1 to {QUEUES_MAX}")
        if not 2 <= queue_size <= QUEUE_SIZE_MAX or queue_size & (queue_size - 1):
            raise InvalidArgument(f"vq_size is {queue_size}, must be a power of two from 2 to {QUEUE_SIZE_MAX}")
        if name in self._attached or name in self._busy_names:
            raise AlreadyExists(f"a virtio controller is already named {name!r:.256}")
        self._busy_names.add(name)
        try:
            # Only an attached target needs the codecs: a server without one answers its first RPC sooner.
            from qpair.virtio.client import FrontEnd

            front = await FrontEnd.connect(path, timeout_s=timeout_s)
            try:
                attached = await self._hand_over(name, front, num_queues, queue_size)
            except BaseException:
                await front.close()
                raise
        finally:
            self._busy_names.discard(name)
        self._attached[name] = attached
        front.watch(lambda reason: self._on_lost(name, reason))
        return attached.controller

    async def _hand_over(self, name: str, front: FrontEnd, wanted: int, queue_size: int) -> _Attached:
        from qpair.virtio.client import Queue, attach_queues, negotiate

        device = await negotiate(front)
        count = min(wanted, device.num_queues)
        if count < wanted:
            logger.warning("virtio %s: target %s has %d queues, %d were asked", name, front.path, count, wanted)
        try:
            memory = self._memory_factory(num_queues=count, queue_size=queue_size)
        except OSError as error:
            raise from_engine(error) from error
        eventfds: list[int] = []
        try:
            for _ in range(2 * count):
                eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            queues = [Queue(queue_size, kick, call) for kick, call in zip(eventfds[::2], eventfds[1::2], strict=True)]
            await attach_queues(front, memory, queues, device.features)
            await self._make_bdev(name, device, memory, queues)
        finally:
            close_all(eventfds)  # the target and the engine have duplicates
        return _Attached(VirtioController(name, front.path, count, queue_size), front, memory)

    async def _make_bdev(self, name: str, device: Device, memory: Any, queues: list[Queue]) -> None:
        engine, bridge = self.stack.engine, self.stack.bridge
        try:
            token = engine.bdev_virtio_create(
                name,
                features=device.features,
                config=device.config,
                memory=memory,
                queues=[(queue.size, queue.kick, queue.call) for queue in queues],
            )
        except OSError as error:
            raise from_engine(error) from error

        def undo(_: object) -> None:
            bridge.call(engine.bdev_unregister(name))

        await bridge.call(token, unclaimed=undo)

    # -- detaching --------------------------------------------------------------------------------

    async def detach(self, name: str, *, deadline_ms: int = 10_000) -> None:
        """Unregister the bdev (what is in flight drains first), then leave the target."""
        attached = self._attached.pop(name, None)
        if attached is None:
            raise NoSuchController(f"no virtio controller is named {name!r:.256}")
        self._busy_names.add(name)
        try:
            await self._unregister(name, deadline_ms)
            try:
                from qpair.virtio.client import stop_queues

                await stop_queues(attached.front, attached.controller.num_queues)
            except QpairError as error:
                logger.info("virtio %s: while leaving: %s", name, error)
        finally:
            self._busy_names.discard(name)
            await attached.front.close()

    async def _unregister(self, name: str, deadline_ms: int) -> None:
        try:
            await self.stack.bridge.call(self.stack.engine.bdev_unregister(name, deadline_ms=deadline_ms))
        except NoSuchDevice:
            pass
        except OSError as error:
            if isinstance(error, QpairError):
                raise
            mapped = from_engine(error)
            if not isinstance(mapped, NoSuchDevice):
                raise mapped from error

    def _on_lost(self, name: str, reason: QpairError) -> None:
        logger.error("virtio %s: %s; its bdev is removed", name, reason)
        if name in self._attached:
            self.stack.bdevs.events.publish(Failed(bdev=name, reason=f"{reason}; the bdev is removed"))
        self._spawn(self._remove_lost(name))

    async def _remove_lost(self, name: str) -> None:
        attached = self._attached.pop(name, None)
        if attached is None:
            return
        try:
            await self._unregister(name, LOST_DEADLINE_MS)
        except QpairError as error:
            logger.error("virtio %s: its bdev was not removed: %s", name, error)
        finally:
            await attached.front.close()

    def _on_bdev(self, event: BdevEvent) -> None:
        """A bdev that somebody else deleted takes its connection with it."""
        if event.kind == "removed" and (attached := self._attached.pop(event.name, None)) is not None:
            self._spawn(attached.front.close())

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
