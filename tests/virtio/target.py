"""A target made by hand: it answers as told, and so can break every rule."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from qpair.vhost import messages as m
from qpair.vhost.framing import Frame, ProtocolFeatures, Request
from vhost.engine_double import FEATURES
from vhost.peer import PROTOCOL_FEATURES_BIT, Peer

CONFIG = (131072).to_bytes(8, "little") + bytes(26) + b"\2\0" + bytes(24)
Answers = dict[Request, "Callable[[], bytes | None] | bytes | None"]


class Target:
    """Answers what a target must; ``answers`` overrides by request: bytes to send, or None for silence."""

    def __init__(self, path: str, protocol: ProtocolFeatures) -> None:
        self.path = path
        self.protocol = protocol
        self.answers: dict[Request, bytes | None] = {}
        self.leave_at: Request | None = None
        self.seen: list[Request] = []
        self.connections: list[Peer] = []
        self.config = CONFIG
        self.features = FEATURES | PROTOCOL_FEATURES_BIT
        self.num_queues = 2
        self.agreed: list[int] = []
        self.backend: Peer | None = None
        """Where it may ask something itself."""

    def answer(self, frame: Frame) -> bytes | None:
        request = frame.header.request
        if request in self.answers:
            return self.answers[request]
        own: dict[Request, m.Message] = {
            Request.GET_FEATURES: m.Features(self.features),
            Request.GET_PROTOCOL_FEATURES: m.ProtocolFeaturesOffer(int(self.protocol)),
            Request.GET_QUEUE_NUM: m.QueueNum(self.num_queues),
            Request.GET_CONFIG: m.ConfigReply(0, 60, 0, self.config),
            Request.GET_VRING_BASE: m.VringBase(0, 0),
        }
        if request in own:
            return m.encode(own[request], reply=True)
        return m.encode(m.Ack(request, 0)) if frame.header.needs_reply else None

    def drop(self) -> None:
        """Close the present connection."""
        self.connections[-1].sock.shutdown(socket.SHUT_RDWR)

    async def serve(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            peer = Peer(sock)
            self.connections.append(peer)
            while (frame := await peer.receive(3600)) is not None:
                for fd in frame.fds:
                    if frame.header.request is Request.SET_BACKEND_REQ_FD:
                        if self.backend is not None:
                            self.backend.close()
                        self.backend = Peer(socket.socket(fileno=os.dup(fd)))
                    os.close(fd)
                self.seen.append(frame.header.request)
                if frame.header.request is Request.SET_FEATURES:
                    self.agreed.append(int.from_bytes(frame.payload, "little"))
                if frame.header.request is self.leave_at:
                    break
                if (data := self.answer(frame)) is not None:
                    peer.send_raw(data)
            peer.close()


@asynccontextmanager
async def serving(path: str, protocol: ProtocolFeatures) -> AsyncIterator[Target]:
    target = Target(path, protocol)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(path)
        listener.listen()
        task = asyncio.create_task(target.serve(listener))
        try:
            yield target
        finally:
            task.cancel()
            await asyncio.wait([task])
            for peer in (*target.connections, *filter(None, [target.backend])):
                peer.close()
