"""A stand-in for the compiled engine: the bdev half of its contract, in memory, for tests of the control plane without a build.

Replies come through an eventfd as the real ones do, one turn later. No I/O is concurrent here, and nothing is measured.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from dataclasses import dataclass, field
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
class PythonBdevWork:
    ring: int


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
    data: bytearray | None = None
    ring: Ring | None = None
    stat: dict[str, int] = field(default_factory=dict)

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


@dataclass
class Request:
    ring: Ring
    token: int
    op: str
    offset: int
    length: int
    buffer: bytearray
    data: memoryview
    done: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.length

    def complete(self, errno: int = 0) -> None:
        if self.done:
            raise ValueError(f"{self.op} at {self.offset} was completed before")
        self.done = True
        self.data.release()
        if errno:
            self.ring.engine.reply(self.token, None, EngineError(errno, f"{self.op} failed"))
        else:
            self.ring.engine.reply(self.token, bytes(self.buffer) if self.op == "read" else None)

    def fail(self, errno: int) -> None:
        self.complete(errno)


class Ring:
    def __init__(self, engine: Engine, number: int, disk: Disk) -> None:
        self.id = number
        self.engine = engine
        self.disk = disk
        self.waiting: deque[tuple[int, str, int, int, Any]] = deque()
        self.closed = False

    def fetch(self, max_requests: int = 64) -> list[tuple[str, tuple[Request, ...]]]:
        found: dict[str, list[Request]] = {}
        while self.waiting and max_requests > 0:
            max_requests -= 1
            token, op, offset, blocks, data = self.waiting.popleft()
            size = self.disk.block_size
            buffer = bytearray(blocks * size if op == "read" else data if op == "write" else 0)
            view = memoryview(buffer) if op == "read" else memoryview(buffer).toreadonly()
            found.setdefault(op, []).append(Request(self, token, op, offset * size, blocks * size, buffer, view))
        return [(op, tuple(requests)) for op, requests in found.items()]

    def finish(self, requests: Any, errno: int = 0) -> None:
        for request in requests:
            if not request.done:
                request.complete(errno)

    def close(self) -> None:
        self.closed = True


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
        self.opened: dict[int, tuple[Disk, bool]] = {}
        self.next = 1
        self.stopped = False
        self.runs: dict[int, dict[str, Any]] = {}

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

    def reactors(self) -> list[dict[str, Any]]:
        poller = {"name": "bdev", "state": "armed", "busy_ns": 5, "runs": 10, "busy_runs": 1}
        return [
            {
                "lcore": core,
                "tid": os.getpid(),
                "driver": "epoll",
                "busy_ns": 5,
                "idle_ns": 7,
                "sleeps": 1,
                "turns": 9,
                "messages": 2,
                "pollers": [poller],
            }
            for core in self.cores
        ]

    def stop(self, deadline_ms: int = 10_000) -> None:
        if not self.stopped:
            self.stopped = True
            for token in list(self.runs):
                self.perf_stop(token)

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

    def bdev_malloc_create(
        self,
        name: str,
        *,
        num_blocks: int,
        block_size: int,
        uuid: str | None = None,
        physical_block_size: int = 0,
        optimal_io_boundary: int = 0,
        metadata_bytes: int = 0,
    ) -> int:
        if num_blocks * block_size > 1 << 32:
            raise EngineError(errno.ENOMEM, f"num_blocks {num_blocks}: no memory")
        return self._add(Disk(name, "malloc", block_size, num_blocks, uuid or "", data=bytearray(num_blocks * block_size)))

    def bdev_file_create(
        self,
        name: str,
        path: str,
        *,
        module: str,
        block_size: int = 0,
        readonly: bool = False,
        fallocate: bool = False,
        uuid: str | None = None,
    ) -> int:
        if not os.path.exists(path):
            raise EngineError(errno.ENOENT, f"path {path!r}: no such file")
        with open(path, "rb") as file:
            data = bytearray(file.read())
        size = block_size or 512
        return self._add(Disk(name, module, size, len(data) // size, uuid or "", path=path, readonly=readonly, data=data))

    def bdev_python_create(
        self,
        name: str,
        *,
        num_blocks: int,
        block_size: int,
        depth: int = 128,
        max_io_bytes: int = 131072,
        uuid: str | None = None,
        readonly: bool = False,
    ) -> Ring:
        disk = Disk(name, "python", block_size, num_blocks, uuid or "", readonly=readonly)
        disk.ring = Ring(self, self._add(disk), disk)
        return disk.ring

    def _disk(self, name: str) -> Disk:
        if name not in self.disks:
            raise EngineError(errno.ENODEV, f"no bdev is named {name!r}")
        return self.disks[name]

    def bdev_unregister(self, name: str, *, deadline_ms: int = 10_000) -> int:
        disk, token = self._disk(name), self.token()
        if disk.claimed_by:
            raise EngineError(errno.EBUSY, f"bdev {name!r} is claimed by {disk.claimed_by}")
        del self.disks[name]
        self.push(BdevEvent("removing", name))
        self.push(BdevEvent("removed", name))
        self.reply(token)
        return token

    def bdev_resize(self, name: str, num_blocks: int) -> int:
        disk, token = self._disk(name), self.token()
        disk.num_blocks = num_blocks
        self.push(BdevEvent("resized", name))
        self.reply(token)
        return token

    def bdev_info(self, name: str | None = None) -> list[dict[str, Any]]:
        return [disk.info() for disk in ([self._disk(name)] if name is not None else self.disks.values())]

    def bdev_iostat(self, name: str | None = None, *, reset: str = "none") -> int:
        token = self.token()
        keys = [
            "read_ios",
            "read_bytes",
            "write_ios",
            "write_bytes",
            "unmap_ios",
            "unmap_bytes",
            "flush_ios",
            "write_zeroes_ios",
            "read_ns",
            "write_ns",
            "unmap_ns",
            "max_read_ns",
            "min_read_ns",
            "max_write_ns",
            "min_write_ns",
            "max_unmap_ns",
            "min_unmap_ns",
            *(f"{key}copy{unit}" for key, unit in (("", "_ios"), ("", "_bytes"), ("", "_ns"), ("max_", "_ns"), ("min_", "_ns"))),
        ]
        disks = [self._disk(name)] if name is not None else list(self.disks.values())
        rest: dict[str, Any] = {"errors": {}, "channels": [], "sampled": None}
        self.reply(token, [{"name": disk.name} | {key: disk.stat.get(key, 0) for key in keys} | rest for disk in disks])
        if reset == "all":
            for disk in disks:
                disk.stat.clear()
        return token

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

    def bdev_claim(self, name: str, owner: str) -> None:
        self._disk(name).claimed_by = owner

    def bdev_release(self, name: str, owner: str) -> None:
        self._disk(name).claimed_by = None

    def bdev_open(self, name: str, *, write: bool = True) -> int:
        disk, token = self._disk(name), self.token()
        if write and disk.readonly:
            raise EngineError(errno.EROFS, f"bdev {name!r} is read-only")
        disk.open_count += 1
        self.opened[token] = (disk, write)
        self.reply(token, token)
        return token

    def bdev_close(self, descriptor: int) -> int:
        disk, _ = self.opened.pop(descriptor)
        disk.open_count -= 1
        token = self.token()
        self.reply(token)
        return token

    def bdev_io(self, descriptor: int, op: str, offset_blocks: int = 0, num_blocks: int = 0, data: Any = None, **options: Any) -> int:
        disk, write = self.opened[descriptor]
        token = self.token()
        start, size = offset_blocks * disk.block_size, num_blocks * disk.block_size
        if offset_blocks + num_blocks > disk.num_blocks:
            raise EngineError(errno.EINVAL, f"offset_blocks {offset_blocks} + num_blocks {num_blocks} is past {disk.num_blocks}")
        if op in ("read", "write"):
            disk.stat[f"{op}_ios"] = disk.stat.get(f"{op}_ios", 0) + 1
            disk.stat[f"{op}_bytes"] = disk.stat.get(f"{op}_bytes", 0) + size
        if disk.ring is not None:
            disk.ring.waiting.append((token, op, offset_blocks, num_blocks, None if data is None else bytes(data)))
            self.push(PythonBdevWork(disk.ring.id))
            return token
        if op == "write" and not write:
            raise EngineError(errno.EPERM, f"descriptor {descriptor} is open for reading")
        if disk.data is not None and op in ("write", "write_zeroes", "unmap"):
            disk.data[start : start + size] = bytes(data) if op == "write" else bytes(size)
        self.reply(token, bytes(size) if disk.data is None else bytes(disk.data[start : start + size]) if op == "read" else None)
        return token

    # perf
    def perf_start(self, bdev: str, **options: Any) -> int:
        self._disk(bdev)
        token = self.token()
        self.runs[token] = options
        if options["max_ios"]:
            self.perf_stop(token)
        else:
            timer = threading.Timer(options["duration_ms"] / 1000, self.perf_stop, [token])
            timer.daemon = True
            timer.start()
        return token

    def perf_snapshot(self, token: int) -> dict[str, Any]:
        if token not in self.runs:
            raise EngineError(errno.ENOENT, f"run {token} is not under way")
        return {"ios": 10, "bytes": 40960, "errors": 0, "elapsed_ns": 1_000_000}

    def perf_stop(self, token: int) -> None:
        options = self.runs.pop(token, None)
        if options is None:
            return
        ios = options["max_ios"] or 1000
        self.reply(
            token,
            {
                "ios": ios,
                "reads": ios,
                "writes": 0,
                "bytes": ios * options["io_bytes"],
                "errors": 0,
                "verify_errors": 0,
                "elapsed_ns": 10_000_000,
                "mean_ns": 900,
                "min_ns": 500,
                "max_ns": 9000,
                "percentiles": {"50": 800, "99": 2000, "99.9": 5000, "99.99": 8000},
                "per_reactor": [{"lcore": self.cores[0], "ios": ios}],
                "max_gap_ns": 9000,
                "histogram": b"",
            },
        )
