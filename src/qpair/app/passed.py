"""Listening Unix sockets that somebody else opened: a service manager, or the process whose place this one takes.

How it works: `PassedSockets` has them by their paths: whoever is to listen on such a path borrows that socket instead of making one. It stays open while nobody borrows it:
clients that come meanwhile wait in its queue. The files of a service manager's sockets are the manager's; those of a predecessor are this process's from then on (``owned``).

Errors: none; a socket that cannot be used (no listening Unix stream socket) is named in the log and closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass

import msgspec

from qpair.app.parcel import Descriptor

__all__ = ["Passed", "PassedRecord", "PassedSockets"]

logger = logging.getLogger("qpair.app")


class PassedRecord(msgspec.Struct):
    """One on its way to another process. ``lock``: of the file beside it that says whose it is."""

    path: str
    listener: Descriptor
    owned: bool
    lock: Descriptor | None = None


@dataclass
class Passed:
    """One that was borrowed: ``sock`` and ``lock`` are the borrower's to close; the file too, if ``owned``."""

    sock: socket.socket
    owned: bool
    lock: int | None = None


class PassedSockets:
    """Listening sockets by path, to be borrowed."""

    def __init__(self) -> None:
        self._by_path: dict[str, Passed] = {}

    def inherit(self, record: PassedRecord) -> None:
        """One of a predecessor's, or one that was passed to it."""
        self._add(record.listener.take(), record.path, owned=record.owned, lock=record.lock)

    def add(self, descriptor: int) -> None:
        """Owns ``descriptor`` from now on."""
        self._add(descriptor, None)

    def _add(self, descriptor: int, known: str | None, *, owned: bool = False, lock: Descriptor | None = None) -> None:
        try:
            passed = socket.socket(fileno=descriptor)
        except OSError as error:
            logger.error("passed descriptor %d is no socket: %s", descriptor, error.strerror)
            with contextlib.suppress(OSError):
                os.close(descriptor)
            return
        name = passed.getsockname() if passed.family == socket.AF_UNIX else ""
        path = known or os.fsdecode(name)
        listens = passed.type == socket.SOCK_STREAM and passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not path.startswith("/") or not listens or path in self._by_path:
            logger.error(
                "passed socket %d (%s) is not used: it must listen on a Unix stream socket with a path of its own",
                descriptor,
                name or "no path",
            )
            passed.close()
            return
        passed.set_inheritable(False)
        self._by_path[path] = Passed(passed, owned, lock.take() if lock is not None else None)

    def borrow(self, path: str) -> Passed | None:
        """What listens on ``path``; None: there is none. A predecessor's is given once."""
        path = os.path.abspath(path)
        passed = self._by_path.get(path)
        if passed is None or passed.owned:
            return self._by_path.pop(path, None)
        return Passed(passed.sock.dup(), owned=False)

    def paths(self) -> list[str]:
        """Where they listen."""
        return list(self._by_path)

    def close(self) -> None:
        """Let go of them; their files are the manager's. Idempotent."""
        while self._by_path:
            passed = self._by_path.popitem()[1]
            passed.sock.close()
            if passed.lock is not None:
                os.close(passed.lock)
