"""The front end's side of vhost-user: connecting to a target, agreeing on features, and handing over memory and queues.

The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user); Virtio 1.2, 3.1 (initialisation), 5.2 (block device).

How it works: `FrontEnd` is one connection; it sends a message and, where one is due, waits for the answer, one at a time. `negotiate` and `attach_queues` are
the handshake: features, protocol features, number of queues, configuration, memory, queues; with a successor of a target, the same features have to come out
again. Every message that the target can acknowledge
is acknowledged before the next; where it cannot (no REPLY_ACK), a question at the end makes sure that all were processed.

Errors: `TargetGone` (it closed the connection), `TargetBrokeProtocol`, `TargetRefused` (it answered no), `Unsupported` (it lacks a
feature without which nothing works), `TimedOut`; a path that cannot be connected to is `NoSuchFile` or what the system says.
After an error the connection is closed.

Not implemented: the inflight region (why not: crates/virtio/src/link.rs), legacy devices (without VERSION_1), targets without configuration messages.

Limits: 10 s for each answer by default; 60 bytes of configuration, which is all that QEMU's server gives; one memory region.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from qpair.errors import IoFailed, QpairError, TimedOut, Unsupported, from_errno
from qpair.vhost.framing import ProtocolError, ProtocolFeatures, Request
from qpair.vhost.messages import (
    Ack,
    ConfigReply,
    Features,
    GetConfig,
    GetFeatures,
    GetProtocolFeatures,
    GetQueueNum,
    GetVringBase,
    MemoryRegion,
    Message,
    ProtocolFeaturesOffer,
    QueueNum,
    SetBackendReqFd,
    SetFeatures,
    SetMemTable,
    SetOwner,
    SetProtocolFeatures,
    SetVringAddr,
    SetVringBase,
    SetVringCall,
    SetVringEnable,
    SetVringKick,
    SetVringNum,
    VringBase,
    decode_reply,
    encode,
)
from qpair.vhost.transport import Channel, Received
from qpair.virtio.notices import Notices

__all__ = [
    "ANSWER_TIMEOUT_S",
    "CONFIG_BYTES",
    "Device",
    "FrontEnd",
    "Memory",
    "Queue",
    "TargetBrokeProtocol",
    "TargetGone",
    "TargetRefused",
    "attach_queues",
    "negotiate",
    "read_config",
    "stop_queues",
]

ANSWER_TIMEOUT_S = 10.0
CONFIG_BYTES = 60

VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_BLK_SIZE = 1 << 6
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_MQ = 1 << 12
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14
VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_EVENT_IDX = 1 << 29
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
VIRTIO_F_VERSION_1 = 1 << 32
VIRTIO_F_RING_PACKED = 1 << 34

WANTED_FEATURES = (
    VIRTIO_BLK_F_SEG_MAX
    | VIRTIO_BLK_F_RO
    | VIRTIO_BLK_F_BLK_SIZE
    | VIRTIO_BLK_F_FLUSH
    | VIRTIO_BLK_F_MQ
    | VIRTIO_BLK_F_DISCARD
    | VIRTIO_BLK_F_WRITE_ZEROES
    | VIRTIO_F_INDIRECT_DESC
    | VIRTIO_F_EVENT_IDX
    | VHOST_USER_F_PROTOCOL_FEATURES
    | VIRTIO_F_VERSION_1
    | VIRTIO_F_RING_PACKED
)
WANTED_PROTOCOL_FEATURES = ProtocolFeatures.MQ | ProtocolFeatures.CONFIG | ProtocolFeatures.REPLY_ACK | ProtocolFeatures.BACKEND_REQ

# Of a packed ring: both sides at index 0 in their first lap.
_PACKED_START = 0x8000_8000
_NUM_QUEUES = struct.Struct("<H")
_NUM_QUEUES_OFFSET = 34
_OWN_REPLY = frozenset(
    {Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_VRING_BASE, Request.GET_CONFIG}
)

R = TypeVar("R", bound=Message)


class TargetGone(IoFailed):
    """ECONNRESET: the target closed the connection."""

    errno_default = errno.ECONNRESET


class TargetBrokeProtocol(IoFailed):
    """EPROTO: the target sent what vhost-user does not allow; the message names the field, the value and the limit."""

    errno_default = errno.EPROTO


class TargetRefused(IoFailed):
    """EREMOTEIO: the target answered a request with a refusal."""

    errno_default = errno.EREMOTEIO


class Memory(Protocol):
    """What `qpair._engine.VirtioMemory` offers."""

    fd: int
    size_bytes: int
    user_address: int

    def queue_addresses(self, queue: int) -> tuple[int, int, int]:
        """(desc, avail, used)."""
        ...


@dataclass(frozen=True, slots=True)
class Device:
    """What was agreed on with a target. ``config``: 60 bytes of virtio_blk_config; ``num_queues``: the most it takes."""

    features: int
    config: bytes
    num_queues: int


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue and its two eventfds."""

    size: int
    kick: int
    call: int


class FrontEnd:
    """A connection to a target."""

    def __init__(self, channel: Channel, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self.path = path
        self.protocol_features = ProtocolFeatures(0)
        self.changed = asyncio.Event()
        """The target said that its configuration is another."""
        self._notices: Notices | None = None
        self._channel = channel
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._waiting: asyncio.Future[Received] | None = None
        self._lost: QpairError | None = None
        self._closing = False
        self._on_lost: Callable[[QpairError], None] | None = None
        self._reader = asyncio.create_task(self._read(), name=f"virtio front end {path}")

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], *, timeout_s: float = ANSWER_TIMEOUT_S) -> Self:
        """Connect to a unix socket."""
        name = os.fspath(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(sock, name)
        except TimeoutError:
            sock.close()
            raise TimedOut(f"target {name}: not connected within {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            sock.close()
            number = error.errno if isinstance(error, OSError) else None
            raise from_errno(number or errno.EINVAL, f"target {name}: {getattr(error, 'strerror', None) or error}") from error
        except BaseException:
            sock.close()
            raise
        return cls(Channel(sock), name, timeout_s=timeout_s)

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        self._closing = True
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        if self._notices is not None:
            await self._notices.close()
        self._channel.close()

    async def hear(self) -> None:
        """Let the target tell of changes, if it can."""
        if ProtocolFeatures.BACKEND_REQ not in self.protocol_features:
            return
        ours, theirs = socket.socketpair()
        self._notices = Notices(ours, self.changed.set, lambda error: self._lose(TargetBrokeProtocol(f"target {self.path}: {error}")))
        with theirs:
            await self.send(SetBackendReqFd(), (theirs.fileno(),))

    def watch(self, on_lost: Callable[[QpairError], None]) -> None:
        """``on_lost(reason)`` is called once when the connection ends by itself; at once if it already has."""
        self._on_lost = on_lost
        if self._lost is not None and not self._closing:
            on_lost(self._lost)

    async def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """A request without a reply of its own; waits for its acknowledgement if the target gives one."""
        reply = await self._exchange(message, fds, ProtocolFeatures.REPLY_ACK in self.protocol_features)
        if isinstance(reply, Ack) and reply.result:
            raise TargetRefused(f"target {self.path}: refused {message.request.name} with {reply.result}")

    async def ask(self, message: Message, kind: type[R]) -> R:
        """A request with a reply of its own."""
        reply = await self._exchange(message, (), True)
        if not isinstance(reply, kind):
            raise TargetBrokeProtocol(f"target {self.path}: answered {message.request.name} with {type(reply).__name__}")
        return reply

    async def _exchange(self, message: Message, fds: Sequence[int], answered: bool) -> Message | Ack | None:
        name = message.request.name
        async with self._turn:
            if self._lost is not None:
                raise self._lost
            try:
                async with asyncio.timeout(self._timeout_s):
                    if answered:
                        self._waiting = asyncio.get_running_loop().create_future()
                    need_reply = answered and message.request not in _OWN_REPLY
                    await self._channel.send(encode(message, need_reply=need_reply), fds)
                    if self._waiting is None:
                        return None
                    with await self._waiting as received:
                        return decode_reply(received.frame, to=message.request)
            except TimeoutError:
                raise TimedOut(f"target {self.path}: no answer to {name} within {self._timeout_s:g} s") from None
            except ProtocolError as error:
                raise TargetBrokeProtocol(f"target {self.path}: {error}") from error
            except OSError as error:
                if isinstance(error, QpairError):
                    raise
                raise TargetGone(f"target {self.path}: {name}: {error.strerror or error}") from error
            finally:
                self._drop_waiting()

    def _drop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting.done() and not waiting.cancelled() and waiting.exception() is None:
            waiting.result().close()  # idempotent; an answer that came as the caller gave up

    async def _read(self) -> None:
        """Hand each message to whoever waits; the end of the connection to whoever waits and to the watcher."""
        try:
            while (received := await self._channel.receive()) is not None:
                waiting = self._waiting
                if waiting is None or waiting.done():
                    received.close()
                    raise ProtocolError(received.frame.header.request.name, "message", "an answer", "awaited by a request")
                waiting.set_result(received)
            self._lose(TargetGone(f"target {self.path}: closed the connection"))
        except ProtocolError as error:
            self._lose(TargetBrokeProtocol(f"target {self.path}: {error}"))
        except OSError as error:
            self._lose(TargetGone(f"target {self.path}: {error.strerror or error}"))

    def _lose(self, reason: QpairError) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(reason)
        if self._on_lost is not None and not self._closing:
            self._on_lost(reason)


async def negotiate(front: FrontEnd, before: Device | None = None) -> Device:
    """Agree on features and read the configuration. ``before``: what was agreed on with a predecessor, and has to be so again."""
    await front.send(SetOwner())
    offered = (await front.ask(GetFeatures(), Features)).value
    for bit, name in ((VIRTIO_F_VERSION_1, "VERSION_1"), (VHOST_USER_F_PROTOCOL_FEATURES, "PROTOCOL_FEATURES")):
        if not offered & bit:
            raise Unsupported(f"target {front.path}: feature {name} is not among those it offers, {offered:#x}")
    features = offered & WANTED_FEATURES
    if before is not None:
        _check_successor(front.path, before.features, features)
        features = before.features
    protocol = ProtocolFeatures((await front.ask(GetProtocolFeatures(), ProtocolFeaturesOffer)).value & int(WANTED_PROTOCOL_FEATURES))
    if ProtocolFeatures.CONFIG not in protocol:
        raise Unsupported(f"target {front.path}: protocol feature CONFIG is missing, so its size cannot be asked")
    await front.send(SetProtocolFeatures(int(protocol)))
    front.protocol_features = protocol
    await front.hear()
    await front.send(SetFeatures(features))
    config = await read_config(front)
    return Device(features, config, await _queue_limit(front, features, config))


def _check_successor(path: str, before: int, now: int) -> None:
    if missing := before & ~now:
        raise Unsupported(f"target {path}: features {missing:#x} are not among those it offers, {now:#x}, and were agreed on before")
    if now & ~before & VIRTIO_BLK_F_RO:
        raise Unsupported(f"target {path}: feature RO is among those it offers, and was not before")


async def read_config(front: FrontEnd) -> bytes:
    """The first 60 bytes of the configuration space, as it is now."""
    config = await front.ask(GetConfig.of(CONFIG_BYTES), ConfigReply)
    if config.refused or len(config.data) != CONFIG_BYTES:
        raise TargetRefused(f"target {front.path}: gave {len(config.data)} bytes of configuration, {CONFIG_BYTES} were asked")
    return config.data


async def _queue_limit(front: FrontEnd, features: int, config: bytes) -> int:
    if not features & VIRTIO_BLK_F_MQ or ProtocolFeatures.MQ not in front.protocol_features:
        return 1
    limit = (await front.ask(GetQueueNum(), QueueNum)).value
    (in_config,) = _NUM_QUEUES.unpack_from(config, _NUM_QUEUES_OFFSET)
    if not limit or not in_config:
        raise TargetBrokeProtocol(f"target {front.path}: number of queues is {limit} (configuration: {in_config}), must be at least 1")
    return int(min(limit, in_config))


async def attach_queues(front: FrontEnd, memory: Memory, queues: Sequence[Queue], features: int) -> None:
    """Hand over the memory, then start every queue. Descriptors stay the caller's. ``features``: those agreed on."""
    base = _PACKED_START if features & VIRTIO_F_RING_PACKED else 0
    region = MemoryRegion(0, memory.size_bytes, memory.user_address, 0)
    await front.send(SetMemTable((region,)), (memory.fd,))
    for index, queue in enumerate(queues):
        desc, avail, used = memory.queue_addresses(index)
        await front.send(SetVringNum(index, queue.size))
        await front.send(SetVringBase(index, base))
        await front.send(SetVringAddr(index, 0, desc, used, avail, 0))
        await front.send(SetVringKick.of(index), (queue.kick,))
        await front.send(SetVringCall.of(index), (queue.call,))
    for index in range(len(queues)):
        await front.send(SetVringEnable(index, 1))
    if ProtocolFeatures.REPLY_ACK not in front.protocol_features:
        await front.ask(GetFeatures(), Features)  # messages are processed in order: all of the above is done, or the connection is


async def stop_queues(front: FrontEnd, count: int) -> None:
    """Have the target let go of every queue."""
    for index in range(count):
        await front.ask(GetVringBase(index), VringBase)
