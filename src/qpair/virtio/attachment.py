"""One virtio controller: its bdev, and its target, connection after connection.

How it works: `Attachment.begin` connects for the first time and makes the bdev; from then on a task watches. When the connection ends, or the engine finds that the target broke a rule of
the rings, the bdev stays, and its I/O waits: the engine is told (``leave``), the target is connected to again, after a pause that doubles up to `PAUSE_MAX_S`, features, memory and
queues are handed over anew, and the engine sends again what was not answered (``rejoin``; why by new rings, and why nothing is lost or done twice: crates/virtio/src/link.rs).
The same task follows a configuration that changes.

A successor has to offer all features that were agreed on, and a configuration that does for I/O under way. Another size is taken over; another block size is refused by name, as any
other failure, and tried again.

Errors: those of `qpair.virtio.client` from `begin`. Later ones are events (`qpair.bdev.events.Failed`) and lines in the log, one for each reason.

Limits: pauses of `PAUSE_MIN_S` to `PAUSE_MAX_S`, but for the first try, which is made at once; a reason is told once in a row.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qpair.bdev.events import Failed
from qpair.errors import NoSuchDevice, QpairError, from_engine
from qpair.vhost.transport import close_all
from qpair.virtio.client import (
    Device,
    FrontEnd,
    Queue,
    TargetRefused,
    attach_queues,
    negotiate,
    read_config,
    stop_queues,
)
from qpair.virtio.model import VirtioController

if TYPE_CHECKING:
    from qpair._engine import VirtioLink
    from qpair.app.stack import Stack
    from qpair.virtio.client import Memory

__all__ = ["Attachment"]

PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 2.0

logger = logging.getLogger("qpair.virtio")


class Attachment:
    """See the module's doc. ``on_gone`` is called when the target is given up; the bdev is to be removed then."""

    def __init__(self, stack: Stack, name: str, path: str, *, timeout_s: float, loss_timeout_s: float | None) -> None:
        self._stack = stack
        self._name = name
        self._path = path
        self._timeout_s = timeout_s
        self._loss_timeout_s = loss_timeout_s
        self._eventfds: list[int] = []
        self._front: FrontEnd | None = None
        self._task: asyncio.Task[None] | None = None
        self.controller: VirtioController
        self._device: Device
        self._queues: list[Queue]
        self._memory: Any
        self._link: VirtioLink
        self._lost: asyncio.Future[QpairError]
        self._broken: asyncio.Future[Any]

    @property
    def is_connected(self) -> bool:
        """There is a target at present."""
        return self._front is not None

    # -- life -------------------------------------------------------------------------------------

    async def begin(self, num_queues: int, queue_size: int, memory_factory: Callable[..., Memory], *, asked: bool) -> None:
        """Connect and make the bdev. ``asked``: somebody wants just so many queues, and is told if there are fewer."""
        front = await FrontEnd.connect(self._path, timeout_s=self._timeout_s)
        try:
            self._device = await negotiate(front)
            count = min(num_queues, self._device.num_queues)
            if asked and count < num_queues:
                logger.warning("virtio %s: target %s has %d queues, %d were asked", self._name, self._path, count, num_queues)
            try:
                self._memory = memory_factory(num_queues=count, queue_size=queue_size)
            except OSError as error:
                raise from_engine(error) from error
            for _ in range(2 * count):
                self._eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._queues = [Queue(queue_size, kick, call) for kick, call in zip(self._eventfds[::2], self._eventfds[1::2], strict=True)]
            await attach_queues(front, self._memory, self._queues, self._device.features)
            self._make_bdev()
        except BaseException:
            self._close_eventfds()
            await front.close()
            raise
        self.controller = VirtioController(self._name, self._path, count, queue_size, self._loss_timeout_s)
        self._adopt(front)

    def _make_bdev(self) -> None:
        queues = [(queue.size, queue.kick, queue.call) for queue in self._queues]
        features, config = self._device.features, self._device.config
        try:
            self._link = self._stack.engine.bdev_virtio_create(
                self._name, features=features, config=config, memory=self._memory, queues=queues
            )
        except OSError as error:
            raise from_engine(error) from error
        self._broken = self._ask(self._link.broken)

    def watch(self, on_gone: Callable[[], None]) -> None:
        """From now on the target is followed; ``on_gone`` is called at most once."""
        self._task = asyncio.create_task(self._watch(on_gone), name=f"virtio {self._name}")

    async def end(self, *, polite: bool) -> None:
        """Let go of the target and of all descriptors. ``polite``: have it stop its queues first. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        front, self._front = self._front, None
        self._broken.cancel()
        try:
            if front is not None and polite:
                await stop_queues(front, self.controller.num_queues)
        except QpairError as error:
            logger.info("virtio %s: while leaving: %s", self._name, error)
        finally:
            if front is not None:
                await front.close()
            self._close_eventfds()

    def _close_eventfds(self) -> None:
        fds, self._eventfds = self._eventfds, []
        close_all(fds)  # the target and the engine have duplicates

    # -- while there is a target ------------------------------------------------------------------

    def _adopt(self, front: FrontEnd) -> None:
        lost: asyncio.Future[QpairError] = asyncio.get_running_loop().create_future()
        self._front, self._lost = front, lost
        front.watch(lambda reason: None if lost.done() else lost.set_result(reason))

    async def _watch(self, on_gone: Callable[[], None]) -> None:
        while await self._recover(await self._loss()):
            pass
        on_gone()

    async def _loss(self) -> str:
        """Follows the target until it is lost; why."""
        front, lost = self._front, self._lost
        while front is not None:
            changed = asyncio.create_task(front.changed.wait())
            try:
                await asyncio.wait({lost, self._broken, changed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            if lost.done():
                return str(lost.result())
            if self._broken.done():
                return f"target {self._path}: {await self._broken}"
            front.changed.clear()
            try:
                await self._configure(await read_config(front))
            except QpairError as error:
                self._tell(f"its configuration changed: {error}")
        return "there is no target"

    async def _configure(self, config: bytes) -> None:
        with contextlib.suppress(NoSuchDevice):  # it is being removed, and keeps its size
            blocks = await self._ask(self._link.configure, config)
            logger.info("virtio %s: target %s has %d blocks", self._name, self._path, blocks)

    # -- when it is lost --------------------------------------------------------------------------

    async def _recover(self, reason: str) -> bool:
        """Wait for a successor. False: there is none within the limit."""
        started = asyncio.get_running_loop().time()
        front, self._front = self._front, None
        if front is not None:
            await front.close()
        await self._ask(self._link.leave)
        limit = self._loss_timeout_s
        if limit == 0:
            self._tell(f"{reason}; the bdev is removed")
            return False
        self._tell(f"{reason}; its I/O waits until the target is back")
        pause_s, told = 0.0, ""
        while True:
            spent = asyncio.get_running_loop().time() - started
            if limit is not None and spent + pause_s > limit:
                await asyncio.sleep(max(limit - spent, 0))
                self._tell(f"{reason}; not back within {limit:g} s; the bdev is removed")
                return False
            await asyncio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, PAUSE_MIN_S), PAUSE_MAX_S)
            try:
                await self._connect_again()
            except QpairError as error:
                if str(error) != told:
                    told = str(error)
                    logger.warning("virtio %s: not connected again: %s", self._name, told)
            else:
                logger.info("virtio %s: connected again to target %s", self._name, self._path)
                return True

    async def _connect_again(self) -> None:
        front = await FrontEnd.connect(self._path, timeout_s=self._timeout_s)
        try:
            device = await negotiate(front, self._device)
            if device.num_queues < len(self._queues):
                raise TargetRefused(f"target {self._path}: has {device.num_queues} queues, {len(self._queues)} are in use")
            self._wipe()
            await attach_queues(front, self._memory, self._queues, self._device.features)
            self._broken.cancel()
            self._broken = self._ask(self._link.broken)
            await self._ask(self._link.rejoin, device.config)
        except BaseException:
            await front.close()
            raise
        self._adopt(front)
        try:
            await self._configure(device.config)
        except QpairError as error:
            self._tell(f"its configuration changed: {error}")

    def _wipe(self) -> None:
        """Whatever the last target left in the rings."""
        try:
            self._link.wipe()
        except OSError as error:
            raise from_engine(error) from error

    def _tell(self, what: str) -> None:
        logger.error("virtio %s: %s", self._name, what)
        self._stack.bdevs.events.publish(Failed(bdev=self._name, reason=what))

    def _ask(self, method: Callable[..., int], *args: Any) -> asyncio.Future[Any]:
        try:
            token = method(*args)
        except OSError as error:
            raise from_engine(error) from error
        return self._stack.bridge.call(token)
