"""The virtio controllers of one stack: attaching to targets, detaching, and what happens when a target leaves.

How it works: `VirtioSubsystem.attach` makes an `qpair.virtio.attachment.Attachment`: the handshake, over memory that the engine has laid out, and the bdev. The connection stays open as long as the
bdev lives; when the target closes it, or breaks a rule, that is an event (`qpair.bdev.events.Failed`), I/O waits, and the target is connected to again, for as long as the controller's limit says (for ever, unless
told). After that the bdev is unregistered: what waits fails, nothing hangs. When the bdev goes for another reason, the connection is closed.

A controller has a queue for each reactor, unless told how many, and never more than the target has. A reactor takes a free queue when it first opens the bdev; one that finds none is refused by name.

Errors: `AlreadyExists`, `NoSuchController`, `InvalidArgument` (number and size of queues), `Unsupported` (transports other than ``user``), and
those of `qpair.virtio.client`.

Limits: queues of 2 to 32768 entries, a power of two; at most as many queues as the target has, and never more than 256.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qpair.app.subsystems import Subsystem
from qpair.errors import AlreadyExists, InvalidArgument, NoSuchController, NoSuchDevice, QpairError, from_engine
from qpair.virtio.model import VirtioController, VirtioModule

if TYPE_CHECKING:
    from qpair._engine import BdevEvent
    from qpair.app.stack import Stack
    from qpair.virtio.attachment import Attachment
    from qpair.virtio.client import Memory

__all__ = ["VirtioSubsystem"]

QUEUES_MAX = 256
QUEUE_SIZE_MAX = 32768

logger = logging.getLogger("qpair.virtio")


def _engine_memory(*, num_queues: int, queue_size: int) -> Memory:
    from qpair._engine import VirtioMemory

    return VirtioMemory(num_queues=num_queues, queue_size=queue_size)


def _checked_limit(loss_timeout_s: float | None) -> float | None:
    if loss_timeout_s is not None and not (loss_timeout_s >= 0 and math.isfinite(loss_timeout_s)):
        raise InvalidArgument(f"ctrlr_loss_timeout_sec is {loss_timeout_s:g}, must be -1 (for ever), or at least 0")
    return loss_timeout_s


class VirtioSubsystem(Subsystem):
    """``stack.virtio``."""

    name = "qpair_virtio"
    depends_on = ("bdev",)

    def __init__(self, *, memory_factory: Callable[..., Memory] = _engine_memory) -> None:
        self._stack: Stack | None = None
        self.loss_timeout_s: float | None = None
        """Of controllers attached from now on: how long I/O waits for a target that left."""
        self._attached: dict[str, Attachment] = {}
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

    def set_options(self, *, loss_timeout_s: float | None) -> None:
        """For controllers attached from now on. ``loss_timeout_s``: 0 not at all, None for ever."""
        self.loss_timeout_s = _checked_limit(loss_timeout_s)

    # -- attaching --------------------------------------------------------------------------------

    async def attach(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        num_queues: int | None = None,
        queue_size: int = 512,
        timeout_s: float = 10.0,
        loss_timeout_s: float | None = None,
    ) -> VirtioController:
        """Make the target on socket ``path`` the bdev ``name``. ``num_queues``: one a reactor, unless given; lowered to what the target has. ``timeout_s`` is for each
        answer; ``loss_timeout_s``: how long I/O waits for a target that left, if it is to be less than `set_options` said."""
        wanted = min(len(self.stack.cores), QUEUES_MAX) if num_queues is None else num_queues
        if not name:
            raise InvalidArgument("name is empty")
        if not 1 <= wanted <= QUEUES_MAX:
            raise InvalidArgument(f"vq_count is {wanted}, must be from 1 to {QUEUES_MAX}")
        if not 2 <= queue_size <= QUEUE_SIZE_MAX or queue_size & (queue_size - 1):
            raise InvalidArgument(f"vq_size is {queue_size}, must be a power of two from 2 to {QUEUE_SIZE_MAX}")
        if name in self._attached or name in self._busy_names:
            raise AlreadyExists(f"a virtio controller is already named {name!r:.256}")
        self._busy_names.add(name)
        try:
            # Only an attached target needs the codecs: a server without one answers its first RPC sooner.
            from qpair.virtio.attachment import Attachment

            attachment = Attachment(self.stack, name, os.fspath(path), timeout_s=timeout_s, loss_timeout_s=self._limit(loss_timeout_s))
            await attachment.begin(wanted, queue_size, self._memory_factory, asked=num_queues is not None)
        finally:
            self._busy_names.discard(name)
        self._attached[name] = attachment
        attachment.watch(lambda: self._spawn(self._remove_lost(name)))
        return attachment.controller

    def _limit(self, asked: float | None) -> float | None:
        limits = [limit for limit in (_checked_limit(asked), self.loss_timeout_s) if limit is not None]
        return min(limits, default=None)

    # -- detaching --------------------------------------------------------------------------------

    async def detach(self, name: str, *, deadline_ms: int = 10_000) -> None:
        """Unregister the bdev (what is in flight drains first, unless there is no target), then leave the target."""
        attachment = self._attached.pop(name, None)
        if attachment is None:
            raise NoSuchController(f"no virtio controller is named {name!r:.256}")
        self._busy_names.add(name)
        try:
            await self._unregister(name, deadline_ms if attachment.is_connected else 0)
        finally:
            self._busy_names.discard(name)
            await attachment.end(polite=True)

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

    async def _remove_lost(self, name: str) -> None:
        attachment = self._attached.pop(name, None)
        if attachment is None:
            return
        try:
            await self._unregister(name, 0)
        except QpairError as error:
            logger.error("virtio %s: its bdev was not removed: %s", name, error)
        finally:
            await attachment.end(polite=False)

    def _on_bdev(self, event: BdevEvent) -> None:
        """A bdev that somebody else deleted takes its connection with it."""
        if event.kind == "removed" and (attachment := self._attached.pop(event.name, None)) is not None:
            self._spawn(attachment.end(polite=False))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
