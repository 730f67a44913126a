"""Logging: SPDK's five levels on Python's, and the one handler that ``qpair serve`` prints with.

NOTICE lies between INFO and WARNING. *level* is what the loggers let through at all, *print level* what standard error shows.
"""

from __future__ import annotations

import logging
import sys
import time

__all__ = ["FLAGS", "LEVELS", "LineLimit", "enable_timestamps", "get_level", "set_level", "setup"]

NOTICE = 25
LEVELS = {"ERROR": logging.ERROR, "WARNING": logging.WARNING, "NOTICE": NOTICE, "INFO": logging.INFO, "DEBUG": logging.DEBUG}
FLAGS = ("app", "bdev", "engine", "memory", "perf", "reactor", "rpc", "vhost", "virtio")

logging.addLevelName(NOTICE, "NOTICE")
_root = logging.getLogger("qpair")
_handler: logging.Handler | None = None


def setup(level: str = "NOTICE") -> None:
    """Print qpair's log on standard error from ``level`` on. Once a process."""
    global _handler
    if _handler is None:
        _handler = logging.StreamHandler(sys.stderr)
        enable_timestamps(True)
        _root.addHandler(_handler)
        _root.propagate = False
    set_level(level)
    set_level(level, printed=True)


def enable_timestamps(enabled: bool) -> None:
    """Whether printed lines begin with the time. A line of a service manager's log has it already."""
    if _handler is not None:
        _handler.setFormatter(logging.Formatter(("%(asctime)s " if enabled else "") + "%(levelname)s %(name)s: %(message)s"))


def set_level(level: str, *, printed: bool = False) -> None:
    """``level`` is one of `LEVELS`."""
    target = _handler if printed else _root
    if target is not None:
        target.setLevel(LEVELS[level])


def get_level(*, printed: bool = False) -> str:
    """The name of the present level."""
    number = (_handler.level if _handler is not None else NOTICE) if printed else _root.getEffectiveLevel()
    return max((name for name in LEVELS if LEVELS[name] <= number), key=LEVELS.__getitem__, default="DEBUG")


class LineLimit:
    """At most ``per_second`` lines about one peer, so that a hostile one cannot fill a disk or hide the others; what was dropped is counted and told."""

    def __init__(self, per_second: int = 20) -> None:
        self._per_second = per_second
        self._since = 0.0
        self._said = 0
        self._dropped = 0

    def log(self, logger: logging.Logger, level: int, message: str, *args: object) -> None:
        """As ``logger.log``, unless there were too many. Lines that nobody would see are not counted."""
        if not logger.isEnabledFor(level):
            return
        now = time.monotonic()
        if now - self._since >= 1:
            self._since, self._said = now, 0
        self._said += 1
        if self._said > self._per_second:
            self._dropped += 1
            return
        if self._dropped:
            message, args = message + " (%d lines before this one were dropped)", (*args, self._dropped)
            self._dropped = 0
        logger.log(level, message, *args)
