"""What a recorder of engine calls stands on: events that come one turn later by an eventfd, and bdevs that are names and sizes.

For tests of who calls the engine when, with what, and what happens when it answers late or with an error (the bridge, vhost sessions, the virtio initiator): a
real engine cannot be held at one call. Everything else is tested on the real one; no I/O is done here.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from dataclasses import dataclass
from typing import Any


class EngineError(OSError):
    pass


@dataclass
class Reply:
    token: int
    error: EngineError | None
    value: Any


@dataclass
class BdevEvent:
    kind: str
    name: str
    limit: tuple[str, int] | None = None
    reason: str | None = None


@dataclass
class SessionEvent:
    session: int
    kind: str
    queue: int | None
    reason: str


@dataclass
class LogEvent:
    level: str
    component: str
    message: str
    suppressed: int = 0


@dataclass
class Disk:
    name: str
    module: str
    block_size: int
    num_blocks: int
    uuid: str
    path: str | None = None
    readonly: bool = False
    claimed_by: str | None = None
    open_count: int = 0
    version: int = 1

    def info(self) -> dict[str, Any]:
        supported = dict.fromkeys(("read", "write", "flush", "unmap", "write_zeroes", "reset", "abort"), True)
        return {
            "name": self.name,
            "module": self.module,
            "uuid": self.uuid,
            "aliases": [],
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "write_unit": 1,
            "physical_block_size": self.block_size,
            "optimal_io_boundary": 0,
            "max_io_blocks": 0,
            "max_segments": 0,
            "readonly": self.readonly,
            "claimed_by": self.claimed_by,
            "removing": False,
            "open_count": self.open_count,
            "write_cache": False,
            "supported": supported,
            "path": self.path,
            "version": self.version,
        }


class Engine:
    driver = "epoll"

    def __init__(
        self,
        *,
        cores: Any = (0,),
        pin: bool = True,
        driver: str = "auto",
        busy_poll: bool = False,
        spin_us: int = 50,
        ios_per_reactor: int = 8192,
    ) -> None:
        self.cores = list(cores)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.queue: deque[Any] = deque()
        self.disks: dict[str, Disk] = {}
        self.deadlines: dict[str, int] = {}
        """Of those that were unregistered."""
        self.next = 1
        self.stopped = False

    # events
    def push(self, event: Any) -> None:
        self.queue.append(event)
        os.eventfd_write(self.event_fd, 1)

    def reply(self, token: int, value: Any = None, error: EngineError | None = None) -> None:
        self.push(Reply(token, error, value))

    def token(self) -> int:
        if self.stopped:
            raise EngineError(errno.ESHUTDOWN, "the engine is stopped")
        self.next += 1
        return self.next

    def events(self, max_events: int = 256) -> list[Any]:
        found = [self.queue.popleft() for _ in range(min(max_events, len(self.queue)))]
        if not self.queue:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.event_fd)
        return found

    def stop(self, deadline_ms: int = 10_000) -> None:
        if not self.stopped:
            self.stopped = True

    # bdevs
    def _add(self, disk: Disk) -> int:
        token = self.token()
        if disk.name in self.disks:
            raise EngineError(errno.EEXIST, f"bdev name {disk.name!r} is in use")
        if disk.block_size % 512:
            raise EngineError(errno.EINVAL, f"block_size {disk.block_size} is no multiple of 512")
        self.disks[disk.name] = disk
        self.push(BdevEvent("added", disk.name))
        self.reply(token)
        return token

    def bdev_null_create(
        self,
        name: str,
        *,
        num_blocks: int,
        block_size: int,
        uuid: str | None = None,
        physical_block_size: int = 0,
        metadata_bytes: int = 0,
    ) -> int:
        return self._add(Disk(name, "null", block_size, num_blocks, uuid or ""))

    def _disk(self, name: str) -> Disk:
        if name not in self.disks:
            raise EngineError(errno.ENODEV, f"no bdev is named {name!r}")
        return self.disks[name]

    def bdev_unregister(self, name: str, *, deadline_ms: int = 10_000) -> int:
        disk, token = self._disk(name), self.token()
        if disk.claimed_by:
            raise EngineError(errno.EBUSY, f"bdev {name!r} is claimed by {disk.claimed_by}")
        del self.disks[name]
        self.deadlines[name] = deadline_ms
        self.push(BdevEvent("removing", name))
        self.push(BdevEvent("removed", name))
        self.reply(token)
        return token

    def bdev_info(self, name: str | None = None) -> list[dict[str, Any]]:
        return [disk.info() for disk in ([self._disk(name)] if name is not None else self.disks.values())]

    def qos_groups(self) -> list[dict[str, Any]]:
        return []

    def bdev_raid_info(self) -> list[dict[str, Any]]:
        return []

    def bdev_raid_examine(self, bdev: str) -> int:
        token = self.token()
        self.reply(token, 0)
        return token

    def bdev_raid_set_options(self, *, process_window_size_kb: int, process_max_bandwidth_mb_sec: int) -> None:
        pass

    def bdev_raid_shut_down(self) -> None:
        pass
