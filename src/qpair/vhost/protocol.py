"""The back end's side of vhost-user as a pure core: a message in, the engine's calls and the answer out. No I/O, no clock.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user).

How it works: `BackendProtocol.handle` checks a message against what was offered and agreed on, and says what it asks of the engine: a
`Command` (a call of `qpair._engine.Engine`, or none) whose reply, once there, `BackendProtocol.answer` turns into the message to send back, if any.
Commands are done one at a time, in the order of their messages. The engine takes guest memory as a whole table; regions
that come and go one by one (libblkio, QEMU) make a new table each.

What is agreed on:
- features: any subset of the device's and of PROTOCOL_FEATURES;
- protocol features: any subset of `OFFERED`; a message that belongs to one is refused until the front end has set it;
- a log of dirty pages: the engine marks what the device writes while LOG_ALL is set and SET_LOG_BASE gave it a place;
- REPLY_ACK: a request without a reply of its own is answered if it asks for it, with 0 or, if the engine refused, the errno.

Errors: `ProtocolError` ends the session. What the engine refuses, and `Refused`, end it too, unless the front end asked for an answer and gets it.

Not implemented: in-band notifications; of the back end's own requests all but CONFIG_CHANGE_MSG (`qpair.vhost.backend_requests`).

Limits: queues below the controller's number; 256 bytes of configuration; 64 regions of memory, each of which holds a descriptor open.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpair.vhost.framing import CONFIG_BYTES_MAX, Frame, ProtocolError, ProtocolFeatures, Request
from qpair.vhost.messages import (
    Ack,
    AddMemReg,
    ConfigReply,
    DeviceStatus,
    Features,
    GetConfig,
    GetFeatures,
    GetInflightFd,
    GetMaxMemSlots,
    GetProtocolFeatures,
    GetQueueNum,
    GetStatus,
    GetVringBase,
    InflightReply,
    MaxMemSlots,
    MemoryRegion,
    Message,
    ProtocolFeaturesOffer,
    QueueNum,
    RemMemReg,
    ResetDevice,
    ResetOwner,
    SetBackendReqFd,
    SetConfig,
    SetFeatures,
    SetInflightFd,
    SetLogBase,
    SetLogFd,
    SetMemTable,
    SetOwner,
    SetProtocolFeatures,
    SetStatus,
    SetVringAddr,
    SetVringBase,
    SetVringCall,
    SetVringEnable,
    SetVringErr,
    SetVringKick,
    SetVringNum,
    VringBase,
    decode_request,
    encode,
)

if TYPE_CHECKING:
    from qpair.vhost.record import SessionRecord

__all__ = ["CONFIG_WRITEBACK_OFFSET", "FEATURE_PROTOCOL_FEATURES", "OFFERED", "Answer", "BackendProtocol", "Command", "Refused"]

FEATURE_PROTOCOL_FEATURES = 1 << 30
FEATURE_RING_PACKED = 1 << 34
VRING_FLAG_LOG = 1 << 0
CONFIG_WRITEBACK_OFFSET = 32
OFFERED = (
    ProtocolFeatures.MQ
    | ProtocolFeatures.LOG_SHMFD
    | ProtocolFeatures.REPLY_ACK
    | ProtocolFeatures.BACKEND_REQ
    | ProtocolFeatures.CONFIG
    | ProtocolFeatures.INFLIGHT_SHMFD
    | ProtocolFeatures.RESET_DEVICE
    | ProtocolFeatures.CONFIGURE_MEM_SLOTS
    | ProtocolFeatures.STATUS
)
MEM_SLOTS_MAX = 64

# Messages that exist only under a protocol feature.
_NEEDS: dict[Request, ProtocolFeatures] = {
    Request.GET_QUEUE_NUM: ProtocolFeatures.MQ,
    Request.SET_LOG_BASE: ProtocolFeatures.LOG_SHMFD,
    Request.SET_LOG_FD: ProtocolFeatures.LOG_SHMFD,
    Request.SET_BACKEND_REQ_FD: ProtocolFeatures.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeatures.CONFIG,
    Request.SET_CONFIG: ProtocolFeatures.CONFIG,
    Request.GET_INFLIGHT_FD: ProtocolFeatures.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeatures.INFLIGHT_SHMFD,
    Request.RESET_DEVICE: ProtocolFeatures.RESET_DEVICE,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeatures.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeatures.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeatures.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: ProtocolFeatures.STATUS,
    Request.GET_STATUS: ProtocolFeatures.STATUS,
}

_VRING_CALLS: dict[type[Message], str] = {
    SetVringKick: "vhost_set_vring_kick",
    SetVringCall: "vhost_set_vring_call",
    SetVringErr: "vhost_set_vring_err",
}


Slot = tuple[MemoryRegion, int]
"""A region and its descriptor."""


class Refused(Exception):
    """A request that is well formed but that this device does not grant. ``errno`` is positive."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Command:
    """What one message asks. ``call`` is a method of the engine, called with the session and ``args``; None asks nothing of it."""

    message: Message
    needs_reply: bool
    call: str | None = None
    args: tuple[Any, ...] = ()
    memory: tuple[Slot, ...] | None = None
    """All guest memory once this is done; None if it stays as it is."""
    refused: Refused | None = None
    """Why it is not done at all."""

    @property
    def name(self) -> str:
        """The message's name, for the log."""
        return self.message.request.name


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes to send and the descriptor that goes with them, which whoever sends them closes."""

    data: bytes
    fds: tuple[int, ...] = ()


class BackendProtocol:
    """The state of one connection. ``device_features``: what the engine's device offers; ``num_queues``: how many queues it has."""

    def __init__(self, *, device_features: int, num_queues: int) -> None:
        self.offered_features = device_features | FEATURE_PROTOCOL_FEATURES
        self.num_queues = num_queues
        self.features = 0
        self.protocol_features = ProtocolFeatures(0)
        self.memory: tuple[Slot, ...] = ()
        self.status = 0

    def resume(self, record: SessionRecord) -> None:
        """Go on where another process left off. The descriptors of guest memory are this state's from now on."""
        self.features = record.features or 0
        self.protocol_features = ProtocolFeatures(record.protocol_features or 0)
        self.memory = record.regions()
        self.status = record.status

    @property
    def _packed(self) -> bool:
        """Rings are packed: any size is legal, and a base is two positions."""
        return bool(self.features & FEATURE_RING_PACKED)

    def handle(self, frame: Frame) -> Command:
        """Check one message. Descriptors in ``args`` are still the frame's: the engine duplicates them. Those in ``memory`` that came
        with this frame must be kept open once the command is done, because a later message may add to the table: see `replace_memory`."""
        message = decode_request(frame)
        needed = _NEEDS.get(message.request)
        if needed is not None and needed not in self.protocol_features:
            raise ProtocolError(
                message.request.name, "protocol feature", f"{needed.name} not agreed on", "set by SET_PROTOCOL_FEATURES first"
            )
        acknowledged = frame.header.needs_reply and ProtocolFeatures.REPLY_ACK in self.protocol_features
        if isinstance(message, SetMemTable | AddMemReg | RemMemReg):
            memory = self._plan_memory(message, frame.fds)
            table = [(r.guest_address, r.size_bytes, r.user_address, r.mmap_offset, fd) for r, fd in memory]
            return Command(message, acknowledged, "vhost_set_mem_table", (table,), memory)
        try:
            call, args = self._plan(message, frame.fds)
        except Refused as refused:
            return Command(message, acknowledged, refused=refused)
        return Command(message, acknowledged, call, args)

    def replace_memory(self, command: Command) -> list[int]:
        """The engine has taken ``command.memory``; the descriptors that are not wanted any more."""
        assert command.memory is not None
        kept = {fd for _, fd in command.memory}
        dropped = [fd for _, fd in self.memory if fd not in kept]
        self.memory = command.memory
        return dropped

    def answer(self, command: Command, value: Any) -> Answer | None:
        """The message to send back for ``value``, the engine's reply. None where the front end waits for nothing."""
        match command.message:
            case SetFeatures(features=features):
                self.features = features
            case SetProtocolFeatures(features=features):
                self.protocol_features = ProtocolFeatures(features)
            case GetFeatures():
                return _reply(Features(self.offered_features))
            case GetProtocolFeatures():
                return _reply(ProtocolFeaturesOffer(int(OFFERED)))
            case GetQueueNum():
                return _reply(QueueNum(self.num_queues))
            case GetMaxMemSlots():
                return _reply(MaxMemSlots(MEM_SLOTS_MAX))
            case SetStatus(value=status):
                self.status = status
            case ResetDevice():
                self.status = 0
            case GetStatus():
                return _reply(DeviceStatus(self.status))
            case SetLogBase():
                # It waits for this, whether or not it asked for it.
                return Answer(encode(Ack(Request.SET_LOG_BASE, 0)))
            case GetVringBase(index=index):
                return _reply(VringBase(index, value))
            case GetConfig() as asked:
                return _reply(_config_reply(asked, value))
            case GetInflightFd() as asked:
                fd, size, offset = value
                return Answer(encode(InflightReply(size, offset, asked.num_queues, asked.queue_size), reply=True), (fd,))
            case _:
                pass
        return Answer(encode(Ack(command.message.request, 0))) if command.needs_reply else None

    def refuse(self, command: Command, code: int) -> Answer | None:
        """The message that tells of a refusal by the engine; None if the protocol has no way to tell, so the session must end."""
        if isinstance(command.message, GetConfig):
            return _reply(ConfigReply(0, 0, 0, b""))
        # QEMU does not look at what SET_LOG_BASE is answered with: it would migrate without the log.
        if isinstance(command.message, GetVringBase | GetInflightFd | SetLogBase) or not command.needs_reply:
            return None
        return Answer(encode(Ack(command.message.request, code or errno.EIO)))

    def _plan(self, message: Message, fds: tuple[int, ...]) -> tuple[str | None, tuple[Any, ...]]:
        """The engine's method and its arguments after the session."""
        match message:
            case GetFeatures() | SetOwner() | ResetOwner() | GetProtocolFeatures() | GetQueueNum() | GetMaxMemSlots() | GetStatus():
                return None, ()  # RESET_OWNER is obsolete, and ignoring it is what the documentation recommends
            case SetBackendReqFd():
                return None, ()
            case SetStatus(value=status):
                return (None, ()) if status else ("vhost_reset_device", ())
            case SetLogBase() as log:
                return "vhost_set_log_base", (fds[0], log.mmap_size, log.mmap_offset)
            case SetLogFd():
                return "vhost_set_log_fd", (fds[0],)
            case SetFeatures(features=features):
                _subset(message, features, self.offered_features)
                return "vhost_set_features", (features,)
            case SetProtocolFeatures(features=features):
                _subset(message, features, OFFERED)
                return "vhost_set_protocol_features", (features,)
            case SetVringNum(index=index, size=size):
                return "vhost_set_vring_num", (self._queue(message, index), size)
            case SetVringAddr() as addr:
                queue = self._queue(message, addr.index)
                self._check_ring_flags(addr)
                return "vhost_set_vring_addr", (queue, addr.flags, addr.desc, addr.used, addr.avail, addr.log)
            case SetVringBase(index=index, base=base):
                if base > 0xFFFF and not self._packed:
                    raise ProtocolError(message.request.name, "base", base, "at most 65535")
                return "vhost_set_vring_base", (self._queue(message, index), base)
            case GetVringBase(index=index):
                return "vhost_get_vring_base", (self._queue(message, index),)
            case SetVringKick() | SetVringCall() | SetVringErr():
                return _VRING_CALLS[type(message)], (self._queue(message, message.index), fds[0] if message.has_fd else None)
            case SetVringEnable(index=index, enable=enable):
                if not self.features & FEATURE_PROTOCOL_FEATURES:
                    raise ProtocolError(message.request.name, "feature", "PROTOCOL_FEATURES not agreed on", "set by SET_FEATURES first")
                return "vhost_set_vring_enable", (self._queue(message, index), bool(enable))
            case GetConfig():
                return "vhost_get_config", ()
            case SetConfig() as written:
                return "vhost_set_writeback", (_writeback(written),)
            case GetInflightFd() | SetInflightFd():
                return self._plan_inflight(message, fds)
            case ResetDevice():
                return "vhost_reset_device", ()
            case _:  # decode_request knows no other
                raise AssertionError(f"no plan for {message.request.name}")

    def _plan_memory(self, message: SetMemTable | AddMemReg | RemMemReg, fds: tuple[int, ...]) -> tuple[Slot, ...]:
        """All guest memory after this message."""
        if isinstance(message, SetMemTable):
            return tuple(zip(message.regions, fds, strict=True))
        if isinstance(message, AddMemReg):
            if len(self.memory) == MEM_SLOTS_MAX:
                raise ProtocolError(message.request.name, "number of regions", MEM_SLOTS_MAX + 1, f"at most {MEM_SLOTS_MAX}")
            return (*self.memory, (message.region, fds[0]))
        gone = message.region
        left = tuple((region, fd) for region, fd in self.memory if _where(region) != _where(gone))
        if len(left) == len(self.memory):
            raise ProtocolError(
                message.request.name, "region", f"{gone.size_bytes:#x} bytes at {gone.guest_address:#x}", "one of the table"
            )
        return left

    def _plan_inflight(self, message: GetInflightFd | SetInflightFd, fds: tuple[int, ...]) -> tuple[str, tuple[Any, ...]]:
        name = message.request.name
        if not 1 <= message.num_queues <= self.num_queues:
            raise ProtocolError(name, "num_queues", message.num_queues, f"1 to {self.num_queues}, this controller's")
        # Of any size, whatever the rings: a machine asks before its driver chooses, and firmware's rings are split.
        if not 1 <= message.queue_size <= 32768:
            raise ProtocolError(name, "queue_size", message.queue_size, "1 to 32768")
        if isinstance(message, GetInflightFd):
            return "vhost_get_inflight_fd", (message.num_queues, message.queue_size)
        return "vhost_set_inflight_fd", (fds[0], message.mmap_size, message.mmap_offset, message.num_queues, message.queue_size)

    def _check_ring_flags(self, addr: SetVringAddr) -> None:
        known = VRING_FLAG_LOG if ProtocolFeatures.LOG_SHMFD in self.protocol_features else 0
        if addr.flags & ~known:
            limit = f"0 or {VRING_FLAG_LOG:#x}" if known else "0: logging was not agreed on"
            raise ProtocolError(addr.request.name, "flags", f"{addr.flags:#x}", limit)

    def _queue(self, message: Message, index: int) -> int:
        if index >= self.num_queues:
            raise ProtocolError(message.request.name, "queue", index, f"below {self.num_queues}, this controller's number of queues")
        return index


def _where(region: MemoryRegion) -> tuple[int, int, int]:
    """What tells regions apart; the place in the file does not."""
    return region.guest_address, region.size_bytes, region.user_address


def _reply(message: Message) -> Answer:
    return Answer(encode(message, reply=True))


def _config_reply(asked: GetConfig, config: bytes) -> ConfigReply:
    """Exactly what was asked for: cut, or filled with zeros."""
    whole = config[:CONFIG_BYTES_MAX].ljust(CONFIG_BYTES_MAX, b"\0")
    return ConfigReply(asked.offset, asked.size, asked.flags, whole[asked.offset : asked.offset + asked.size])


def _writeback(written: SetConfig) -> bool:
    """The write-cache mode, which alone may be written (Virtio 1.2, 5.2.5.2)."""
    if (written.offset, written.size) != (CONFIG_WRITEBACK_OFFSET, 1):
        raise Refused(
            errno.EPERM,
            f"SET_CONFIG: bytes {written.offset} to {written.offset + written.size} are read-only; only byte {CONFIG_WRITEBACK_OFFSET} is not",
        )
    if written.data[0] > 1:
        raise Refused(errno.EINVAL, f"SET_CONFIG: writeback is {written.data[0]}, must be 0 or 1")
    return bool(written.data[0])


def _subset(message: Message, features: int, offered: int) -> None:
    if extra := features & ~offered:
        raise ProtocolError(
            message.request.name, "features", f"{features:#x} with {extra:#x} that were not offered", f"a subset of {int(offered):#x}"
        )
