"""The vhost half of the engine's contract as a recorder: which call came when, with which descriptors. It moves no data."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from doubles.engine import BdevEvent, Engine, EngineError, SessionEvent

FEATURES = 0x5_3000_7244


@dataclass
class Call:
    name: str
    session: int
    args: tuple[Any, ...]
    files: tuple[tuple[int, int], ...] = ()
    """(device, inode) of each descriptor at the time of the call: proof that it was open and the right one."""


@dataclass
class Controller:
    name: str
    bdev: str
    reactors: Sequence[int]
    readonly: bool
    num_queues: int
    session: int | None = None


@dataclass
class Memory:
    """As `qpair._engine.VirtioMemory`, with addresses only."""

    num_queues: int
    queue_size: int
    size_bytes: int = 1 << 20
    user_address: int = 0x7F00_0000_0000
    fd: int = field(init=False)

    def __post_init__(self) -> None:
        self.fd = os.memfd_create("rings", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size_bytes)

    def __del__(self) -> None:
        os.close(self.fd)

    def queue_addresses(self, queue: int) -> tuple[int, int, int]:
        base = self.user_address + queue * 0x10000
        return base, base + 0x4000, base + 0x8000


class VhostEngine(Engine):
    """Replies at once, except to calls in ``held``, which wait for `release`; calls in ``refusals`` get an error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.controllers: dict[str, Controller] = {}
        self.calls: list[Call] = []
        self.held: set[str] = set()
        self.refusals: dict[str, EngineError] = {}
        self.waiting: list[tuple[str, int, Any]] = []
        self.virtio: list[dict[str, Any]] = []
        self.links: dict[str, VirtioLink] = {}
        self.config = bytes.fromhex("0000020000000000 00000000 7e000000 00000000 00020000").ljust(32, b"\0") + b"\1\0\4\0" + bytes(24)

    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def finish(self, name: str, value: Any = None, *, session: int = 0, args: tuple[Any, ...] = (), fds: Sequence[int] = ()) -> int:
        files = tuple((status.st_dev, status.st_ino) for status in map(os.fstat, fds))
        self.calls.append(Call(name, session, args, files))
        token = self.token()
        if name in self.held:
            self.waiting.append((name, token, value))
        elif name in self.refusals:
            self.reply(token, None, self.refusals[name])
        else:
            self.reply(token, value)
        return token

    def release(self, name: str) -> None:
        self.held.discard(name)
        ready = [entry for entry in self.waiting if entry[0] == name]
        self.waiting = [entry for entry in self.waiting if entry[0] != name]
        for _, token, value in ready:
            self.reply(token, value)

    def fail(self, kind: str, reason: str, queue: int | None = None) -> None:
        session = next(controller.session for controller in self.controllers.values() if controller.session is not None)
        self.push(SessionEvent(session, kind, queue, reason))

    # controllers
    def vhost_blk_create(
        self,
        name: str,
        bdev: str,
        *,
        reactors: Sequence[int] = (),
        readonly: bool = False,
        num_queues: int = 16,
        packed_ring: bool = False,
    ) -> int:
        self._disk(bdev)
        self.controllers[name] = Controller(name, bdev, reactors, readonly, num_queues)
        return self.finish("vhost_blk_create", args=(name, bdev))

    def vhost_blk_delete(self, name: str, *, deadline_ms: int = 10_000) -> int:
        del self.controllers[name]
        return self.finish("vhost_blk_delete", args=(name,))

    def vhost_blk_set_reactors(self, name: str, reactors: Sequence[int]) -> int:
        self.controllers[name].reactors = reactors
        return self.finish("vhost_blk_set_reactors", args=(name, tuple(reactors)))

    def vhost_blk_set_coalescing(self, name: str, delay_base_us: int, iops_threshold: int) -> int:
        return self.finish("vhost_blk_set_coalescing", args=(name, delay_base_us, iops_threshold))

    def vhost_blk_info(self, name: str | None = None) -> list[dict[str, Any]]:
        chosen = self.controllers.values() if name is None else [self.controllers[name]]
        queue = {"index": 0, "size": 128, "state": "running", "lcore": 0, "avail_idx": 0, "used_idx": 0, "requests": 0}
        queue |= {"kicks": 0, "interrupts": 0, "inflight": 3}
        return [
            {
                "name": controller.name,
                "bdev": controller.bdev,
                "readonly": controller.readonly,
                "num_queues": controller.num_queues,
                "reactors": list(controller.reactors),
                "device_features": FEATURES,
                "sessions": [] if controller.session is None else [{"id": controller.session, "features": 0, "queues": [queue]}],
            }
            for controller in chosen
        ]

    def vhost_session_open(self, controller: str) -> int:
        found = self.controllers[controller]
        if found.session is not None:
            raise EngineError(errno.EBUSY, f"controller {controller!r} has session {found.session}")
        found.session = 100 + len(self.calls)
        return self.finish("vhost_session_open", found.session, args=(controller,))

    def vhost_session_close(self, session: int, *, deadline_ms: int = 10_000) -> int:
        for controller in self.controllers.values():
            if controller.session == session:
                controller.session = None
        return self.finish("vhost_session_close", session=session)

    # messages
    def vhost_set_features(self, session: int, features: int) -> int:
        return self.finish("vhost_set_features", session=session, args=(features,))

    def vhost_set_protocol_features(self, session: int, features: int) -> int:
        return self.finish("vhost_set_protocol_features", session=session, args=(features,))

    def vhost_set_mem_table(self, session: int, regions: Sequence[tuple[int, int, int, int, int]]) -> int:
        plain = tuple(region[:4] for region in regions)
        return self.finish("vhost_set_mem_table", session=session, args=plain, fds=[region[4] for region in regions])

    def vhost_set_vring_num(self, session: int, queue: int, size: int) -> int:
        return self.finish("vhost_set_vring_num", session=session, args=(queue, size))

    def vhost_set_vring_addr(self, session: int, queue: int, flags: int, desc: int, used: int, avail: int, log: int) -> int:
        return self.finish("vhost_set_vring_addr", session=session, args=(queue, flags, desc, used, avail, log))

    def vhost_set_vring_base(self, session: int, queue: int, base: int) -> int:
        return self.finish("vhost_set_vring_base", session=session, args=(queue, base))

    def vhost_get_vring_base(self, session: int, queue: int, *, deadline_ms: int = 5_000) -> int:
        return self.finish("vhost_get_vring_base", 0x1234, session=session, args=(queue,))

    def vhost_set_vring_kick(self, session: int, queue: int, fd: int | None) -> int:
        return self.finish("vhost_set_vring_kick", session=session, args=(queue,), fds=() if fd is None else (fd,))

    def vhost_set_vring_call(self, session: int, queue: int, fd: int | None) -> int:
        return self.finish("vhost_set_vring_call", session=session, args=(queue,), fds=() if fd is None else (fd,))

    def vhost_set_vring_err(self, session: int, queue: int, fd: int | None) -> int:
        return self.finish("vhost_set_vring_err", session=session, args=(queue,), fds=() if fd is None else (fd,))

    def vhost_set_vring_enable(self, session: int, queue: int, enabled: bool) -> int:
        return self.finish("vhost_set_vring_enable", session=session, args=(queue, enabled))

    def vhost_get_inflight_fd(self, session: int, num_queues: int, queue_size: int) -> int:
        fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        return self.finish("vhost_get_inflight_fd", (fd, 8192, 0), session=session, args=(num_queues, queue_size))

    def vhost_set_inflight_fd(self, session: int, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int) -> int:
        args = (mmap_size, mmap_offset, num_queues, queue_size)
        return self.finish("vhost_set_inflight_fd", session=session, args=args, fds=(fd,))

    def vhost_get_config(self, session: int) -> bytes:
        return self.config

    def vhost_set_log_base(self, session: int, fd: int, mmap_size: int, mmap_offset: int) -> int:
        return self.finish("vhost_set_log_base", session=session, args=(mmap_size, mmap_offset), fds=(fd,))

    def vhost_set_log_fd(self, session: int, fd: int) -> int:
        return self.finish("vhost_set_log_fd", session=session, fds=(fd,))

    def vhost_set_writeback(self, session: int, writeback: bool) -> int:
        return self.finish("vhost_set_writeback", session=session, args=(writeback,))

    def vhost_reset_device(self, session: int) -> int:
        return self.finish("vhost_reset_device", session=session)

    # the initiator's side
    def bdev_virtio_create(
        self, name: str, *, features: int, config: bytes, memory: Any, queues: Sequence[tuple[int, int, int]]
    ) -> VirtioLink:
        capacity = int.from_bytes(config[:8], "little")
        self.bdev_null_create(name, num_blocks=capacity, block_size=512)
        self.disks[name].module = "virtio"
        self.virtio.append({"name": name, "features": features, "config": config, "sizes": [queue[0] for queue in queues]})
        self.finish("bdev_virtio_create", args=(name,), fds=[fd for queue in queues for fd in queue[1:]])
        self.links[name] = VirtioLink(self, name)
        return self.links[name]


class VirtioLink:
    """As `qpair._engine.VirtioLink`; `break_rule` is what a target does."""

    def __init__(self, engine: VhostEngine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.asked = 0

    def broken(self) -> int:
        self.asked = self.engine.token()
        return self.asked

    def break_rule(self, reason: str) -> None:
        self.engine.reply(self.asked, reason)

    def leave(self) -> int:
        return self.engine.finish("leave", args=(self.name,))

    def wipe(self) -> None:
        self.engine.calls.append(Call("wipe", 0, (self.name,)))

    def rejoin(self, config: bytes) -> int:
        return self.engine.finish("rejoin", args=(self.name, config))

    def configure(self, config: bytes) -> int:
        blocks = int.from_bytes(config[:8], "little")
        if blocks != self.engine.disks[self.name].num_blocks:
            self.engine.disks[self.name].num_blocks = blocks
            self.engine.push(BdevEvent("resized", self.name))
        return self.engine.finish("configure", blocks, args=(self.name, config))
