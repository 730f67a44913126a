"""What stands on a bdev that appears: what was declared for it, and what its content says.

How it works: each bdev that the engine registers is looked at once, one after the other, on a task of its own. First come the *declarations*: bdevs that
somebody asked for with this one as their base, maybe before it was there (a saved configuration need not be in order), or whose base went and is back.
Then, unless it is claimed by now, each module that knows bdevs by their content (``BdevModule.examine``) may look, until one claims it.

Errors: what fails while a bdev is looked at is logged with its name; the others are looked at all the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from qpair.errors import AlreadyExists, InvalidArgument, NoSuchBdev, QpairError

if TYPE_CHECKING:
    from qpair.bdev.control import BdevSubsystem

__all__ = ["Examiner"]

logger = logging.getLogger("qpair.bdev")


class Declaration(msgspec.Struct, frozen=True):
    """``name`` is to stand on ``base``; ``make`` makes it so, and is called each time that ``base`` appears."""

    name: str
    base: str
    make: Callable[[], Awaitable[None]]


class Examiner:
    """Of one stack: ``stack.bdevs.examiner``. ``auto``: whether content is looked at without being asked."""

    def __init__(self, room: BdevSubsystem) -> None:
        self.auto = True
        self._room = room
        self._declared: dict[str, Declaration] = {}
        self._making: set[str] = set()
        self._queue: deque[str] = deque()
        self._task: asyncio.Task[None] | None = None

    async def declare(self, name: str, base: str, make: Callable[[], Awaitable[None]]) -> bool:
        """Have ``name`` stand on ``base`` from now on, and whenever it comes back, until `forget`. True: it does already; False: its base is not there yet."""
        if name in self._declared or self._room.exists(name):
            raise AlreadyExists(f"bdev {name!r} exists or is declared")
        self._declared[name] = Declaration(name, base, make)
        try:
            self._room.info(base)
        except NoSuchBdev:
            logger.info("%s is made when its base %s appears", name, base)
            return False
        self._making.add(name)
        try:
            await make()
        except BaseException:
            self._declared.pop(name, None)
            raise
        finally:
            self._making.discard(name)
        return True

    def is_declared(self, name: str) -> bool:
        """Whether ``name`` is to stand on some base."""
        return name in self._declared

    def forget(self, name: str) -> bool:
        """Somebody deleted ``name`` by intent. Whether it was declared."""
        return self._declared.pop(name, None) is not None

    def appeared(self, name: str) -> None:
        """The engine registered a bdev."""
        self._queue.append(name)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="qpair-examine")

    async def idle(self) -> None:
        """Returns when all that appeared has been looked at."""
        while self._room.stack.bridge.drain():
            pass  # what the engine has said, but nobody has heard yet
        while self._task is not None:
            await asyncio.wait([self._task])

    async def examine(self, name: str) -> None:
        """Look at the content of one bdev; for those who switched ``auto`` off."""
        if self.auto:
            raise InvalidArgument("bdevs are examined by themselves: switch bdev_auto_examine off (bdev_set_options) to do it by hand")
        await self._look(self._room.info(name).name)

    async def stop(self) -> None:
        """Look at nothing more."""
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._declared.clear()

    async def _work(self) -> None:
        try:
            while self._queue:
                name = self._queue.popleft()
                try:
                    await self._examine(name)
                except NoSuchBdev:
                    logger.debug("%s was gone before it could be examined", name)
                except QpairError as error:
                    logger.error("bdev %s could not be examined: %s", name, error)
                except Exception:
                    logger.exception("bdev %s could not be examined", name)
        finally:
            self._task = None

    async def _examine(self, name: str) -> None:
        known = {name, *self._room.info(name).aliases}
        for declaration in tuple(self._declared.values()):
            if declaration.base in known and declaration.name not in self._making and not self._room.exists(declaration.name):
                try:
                    await declaration.make()
                except QpairError as error:
                    logger.error("%s cannot stand on %s, which appeared: %s", declaration.name, name, error)
        if self.auto:
            await self._look(name)

    async def _look(self, name: str) -> None:
        for module in self._room.modules():
            look = getattr(module, "examine", None)
            if look is None:
                continue
            info = self._room.info(name)
            if info.claimed_by is not None or info.removing:
                return
            try:
                await look(self._room.stack, info)
            except NoSuchBdev:
                raise
            except QpairError as error:
                # What one kind stumbles over may be what another one knows.
                logger.error("bdev %s could not be examined for %s: %s", name, module.name, error)
