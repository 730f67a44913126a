"""The side that serves, and is asked to let another process take its place.

How it works: `Giver.asked` checks who asks and connects; the rest is a task, step by step as in `qpair.app.takeover.messages`. Up to "at rest" nothing has changed, and a
failure is one line in the log. Coming to rest is bounded by `QUIET_S`: a disk that does not answer makes the takeover fail, not its requests. From then until Go a failure means
`Serving.rebuild`: the same steps that the taker would have taken, with descriptors that this side kept; but first the taker says that it has let go, or its process has ended, by
itself or killed.

Errors: `NotPermitted` (another user), `Busy` (one is under way), `Unsupported` (no version in common); later ones are logged, and told to the taker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING, Protocol

from qpair.app.config import snapshot
from qpair.app.parcel import Descriptor
from qpair.app.takeover.messages import PROTOCOLS, FromTaker, Go, Handover, Offer, Prepared, Ready
from qpair.app.takeover.peer import Lost, Peer, same_user
from qpair.app.version import VERSION
from qpair.errors import Busy, QpairError, Unsupported, from_errno

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["Giver", "Serving"]

PREPARE_S = 60.0
QUIET_S = 2.0
READY_S = 30.0
SEND_S = 10.0
END_S = 2.0

logger = logging.getLogger("qpair.app")


class Serving(Protocol):
    """What a giver needs of the process that it is a part of."""

    stack: Stack

    async def rest(self, quiet_s: float) -> Handover:
        """Stop all that answers or moves, close the disks, and say what there was; `QpairError`: it goes on as before."""

    async def rebuild(self, handover: Handover) -> None:
        """Go on after all."""

    def gone(self, pid: int) -> None:
        """The successor has it all."""


class Giver:
    """One a process."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._task: asyncio.Task[None] | None = None

    async def asked(self, path: str, protocols: list[int]) -> None:
        """Somebody who listens on ``path`` and speaks ``protocols`` wants this process's place. Returns when it may have it; what follows is a task."""
        if self._task is not None and not self._task.done():
            raise Busy("a takeover is under way")
        common = sorted(set(protocols) & set(PROTOCOLS))
        if not common:
            raise Unsupported(f"takeover: protocol versions {protocols[:20]} were asked for, {VERSION} speaks {list(PROTOCOLS)}")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(1.0)
            try:
                sock.connect(path)
            except OSError as error:
                raise from_errno(error.errno or 5, f"takeover socket {path:.200}: {error.strerror or error}") from error
            pid = same_user(sock, "takeover")
        except BaseException:
            sock.close()
            raise
        self._task = asyncio.create_task(self._give(Peer(sock, pid), common[-1]), name="takeover")

    async def _give(self, peer: Peer, protocol: int) -> None:
        logger.log(25, "takeover: %s wants to take over", peer.name)
        try:
            await self._prepare(peer, protocol)
            handover = await self._serving.rest(QUIET_S)
        except (QpairError, OSError) as error:
            logger.warning("takeover given up, nothing was changed: %s", error)
            await peer.tell_failed(str(error))
            peer.close()
            return
        try:
            await peer.send(handover, SEND_S)
            await peer.receive(Ready, FromTaker, READY_S)
            await peer.send(Go(), SEND_S)
        except Lost as error:
            logger.error("takeover failed, going on: %s", error)
            if not error.told:
                await peer.tell_failed(str(error))
                await peer.end(END_S)
            peer.close()
            await self._serving.rebuild(handover)
            return
        self._serving.gone(peer.pid)
        peer.close()

    async def _prepare(self, peer: Peer, protocol: int) -> None:
        stack = self._serving.stack
        offer = Offer(protocol, VERSION, os.getpid(), list(stack.cores), stack.vhost_dir, snapshot(stack))
        await peer.send(offer, SEND_S)
        await peer.receive(Prepared, FromTaker, PREPARE_S)


async def memory_of(stack: Stack) -> dict[str, Descriptor]:
    """What malloc bdevs hold, by their names."""
    names = [name for name, record in stack.bdevs.records.items() if record.method == "bdev_malloc_create"]
    contents = await asyncio.gather(*(asyncio.to_thread(stack.engine.bdev_malloc_contents, name) for name in names))
    return {name: Descriptor(fd) for name, fd in zip(names, contents, strict=True)}
