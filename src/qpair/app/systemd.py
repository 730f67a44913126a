"""What a service manager and a server say to each other: readiness, a watchdog, sockets that were opened before the server started.

The protocols are systemd's (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)); other managers and containers speak them, too. Nothing of systemd is needed: without
its variables in the environment everything here does nothing.

How it works: `Manager.of_environment` reads the variables and takes them out of the environment, so that no worker process answers in our place. `Manager.tell` sends one
datagram. `Manager.watch` sends ``WATCHDOG=1`` a few times in each period, but only when every reactor has answered just then, and it runs on the control loop: so a loop or a
reactor that hangs is restarted. Listening sockets that were handed over go to `qpair.app.passed`.

Errors: `InvalidArgument` for a watchdog period that is no number.

Not implemented: the file descriptor store, RELOADING.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Self

from qpair.app.passed import PassedSockets
from qpair.errors import InvalidArgument

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["Manager"]

FIRST_PASSED = 3
"""Passed descriptors are numbered from here."""
LOOKS = 4
"""How often in a watchdog's period everything is looked at: one look may fail because the machine is busy."""

logger = logging.getLogger("qpair.app")


class Manager:
    """Who started this process and wants to hear of it; perhaps nobody."""

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self._address = f"\0{address[1:]}" if address is not None and address.startswith("@") else address
        self.watchdog_s = watchdog_s
        self.sockets = PassedSockets()

    @classmethod
    def of_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Self:
        """What the environment says, which is forgotten there. Variables with another process's id are not for us."""
        said = {
            name: environment.pop(name, "")
            for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
        }
        period = said["WATCHDOG_USEC"] if said["WATCHDOG_PID"] in ("", str(os.getpid())) else ""
        if period and (not period.isdecimal() or int(period) == 0):
            raise InvalidArgument(f"WATCHDOG_USEC is {period!r:.40}: it must be a number of microseconds from 1")
        made = cls(said["NOTIFY_SOCKET"] or None, int(period) / 1e6 if period else None)
        if said["LISTEN_PID"] == str(os.getpid()) and said["LISTEN_FDS"].isdecimal():
            for descriptor in range(FIRST_PASSED, FIRST_PASSED + int(said["LISTEN_FDS"])):
                made.sockets.add(descriptor)
        return made

    def environment(self) -> dict[str, str]:
        """What a successor of this process is to find in its environment; sockets come to it another way."""
        said = {} if self._address is None else {"NOTIFY_SOCKET": self._address.replace("\0", "@", 1)}
        return said if self.watchdog_s is None else {**said, "WATCHDOG_USEC": str(int(self.watchdog_s * 1e6))}

    def tell(self, **fields: str | int) -> bool:
        """``tell(READY=1, STATUS="...")``; whether somebody was told. A manager that does not take it is no reason to stop."""
        if self._address is None:
            return False
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(text.encode(), self._address)
        except OSError as error:
            logger.warning(
                "the service manager at %s was not told %s: %s", self._address.replace("\0", "@"), ", ".join(fields), error.strerror
            )
            return False
        return True

    async def watch(self, stack: Stack) -> None:
        """Tell the watchdog that all is well, as long as it is; until cancelled. Returns at once where there is none."""
        if self.watchdog_s is None:
            return
        while True:
            late = [reactor["lcore"] for reactor in await stack.reactors() if not reactor["responsive"]]
            if late:
                logger.warning("reactors on cores %s do not answer: the watchdog (%.3g s) is not told", late, self.watchdog_s)
            else:
                self.tell(WATCHDOG=1)
            await asyncio.sleep(self.watchdog_s / LOOKS)
