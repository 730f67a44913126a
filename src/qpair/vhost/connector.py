"""The client's side of a unix socket: it is connected, and connected again whenever the connection has ended.

For front ends that listen (QEMU's ``-chardev socket,server=on``); what DPDK calls the client mode of vhost-user.

How it works: `Connector.run` connects, hands the connection over, waits until it has ended, and begins anew. Between two tries it waits `PAUSE_MIN_S`, twice as
long after each failure, up to `PAUSE_MAX_S`; a connection that lived as long as that begins again with the shortest. Nobody listens yet: no error, but a reason that `Connector.reason`
holds and the log tells once, until it changes.

Errors: none leave `run`. `InvalidArgument` at once for a path that is too long, as a listener has it.

Limits: one connection at a time.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from qpair.vhost.listener import check_path

__all__ = ["PAUSE_MAX_S", "PAUSE_MIN_S", "Connector"]

PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 3.2

logger = logging.getLogger("qpair.vhost")


class Connector:
    """Connects to ``path`` while `run` runs."""

    def __init__(self, path: str) -> None:
        check_path(path)
        self.path = path
        self.reason: str | None = "not tried yet"
        """Why there is no connection; None while there is one."""

    async def run(self, connected: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Until cancelled. ``connected`` owns its socket from the call on, and returns when the connection has ended."""
        loop = asyncio.get_running_loop()
        pause_s = PAUSE_MIN_S
        while True:
            connection = self._connect()
            if connection is not None:
                began = loop.time()
                await connected(connection)
                self.reason = "the connection ended"
                if loop.time() - began >= PAUSE_MAX_S:
                    pause_s = PAUSE_MIN_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    def _connect(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            # A queue that is full says EAGAIN: somebody listens and does not accept.
            code = error.errno or errno.EIO
            self._tell("its listener accepts nobody" if code == errno.EAGAIN else os.strerror(code))
            return None
        self.reason = None
        return sock

    def _tell(self, reason: str) -> None:
        if reason != self.reason:
            logger.warning("socket %s: cannot connect: %s; trying again", self.path, reason)
        self.reason = reason
