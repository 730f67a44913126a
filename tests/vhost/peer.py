"""A front end made by hand: it sends any bytes and descriptors, in any pieces, and reads what comes back."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Self

from qpair.vhost import messages as m
from qpair.vhost.framing import Assembler, Frame, ProtocolFeatures

ALL_PROTOCOL_FEATURES = (
    ProtocolFeatures.MQ
    | ProtocolFeatures.LOG_SHMFD
    | ProtocolFeatures.BACKEND_REQ
    | ProtocolFeatures.REPLY_ACK
    | ProtocolFeatures.CONFIG
    | ProtocolFeatures.INFLIGHT_SHMFD
    | ProtocolFeatures.RESET_DEVICE
    | ProtocolFeatures.CONFIGURE_MEM_SLOTS
    | ProtocolFeatures.STATUS
)
PROTOCOL_FEATURES_BIT = 1 << 30


class Peer:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)

    @classmethod
    async def connect(cls, path: str) -> Self:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, path)
        return cls(sock)

    def close(self) -> None:
        self.sock.close()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([data], control) == len(data)

    def send(self, message: m.Message, fds: Sequence[int] = (), *, need_reply: bool = False) -> None:
        self.send_raw(m.encode(message, need_reply=need_reply), fds)

    async def receive(self, timeout_s: float = 5) -> Frame | None:
        """The next message, None at the end of the connection."""
        assembler = Assembler()
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    data, control, _, _ = self.sock.recvmsg(assembler.wanted, 1024)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                    continue
                except ConnectionResetError:
                    return None
                if not data:
                    return None
                fds = array.array("i")
                for _, _, part in control:
                    fds.frombytes(part)
                if (frame := assembler.feed(data, fds.tolist())) is not None:
                    return frame

    async def ask(self, message: m.Message, fds: Sequence[int] = (), *, need_reply: bool = False) -> Any:
        self.send(message, fds, need_reply=need_reply)
        frame = await self.receive()
        assert frame is not None, f"the back end closed the connection instead of answering {message}"
        return m.decode_reply(frame, to=message.request)

    async def order(self, message: m.Message, fds: Sequence[int] = ()) -> int:
        """A request with REPLY_ACK; its result."""
        result: int = (await self.ask(message, fds, need_reply=True)).result
        return result

    async def agree(self, features: int = PROTOCOL_FEATURES_BIT, protocol: int = int(ALL_PROTOCOL_FEATURES)) -> None:
        self.send(m.SetOwner())
        await self.ask(m.GetFeatures())
        await self.ask(m.GetProtocolFeatures())
        self.send(m.SetProtocolFeatures(protocol))
        self.send(m.SetFeatures(features))
        await self.ask(m.GetFeatures())

    async def closed(self) -> bool:
        """The back end ends the connection without another word."""
        return await self.receive() is None


def with_files(count: int, use: Callable[[list[int]], None]) -> list[tuple[int, int]]:
    """Call ``use`` with that many fresh descriptors, then close them; their identities."""
    fds = [os.memfd_create(f"guest{number}", os.MFD_CLOEXEC) for number in range(count)]
    identities = [(status.st_dev, status.st_ino) for status in map(os.fstat, fds)]
    try:
        use(fds)
    finally:
        for fd in fds:
            os.close(fd)
    return identities
