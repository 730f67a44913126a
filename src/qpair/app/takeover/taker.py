"""The side that takes a running process's place.

How it works: `Taker.ask` calls ``qpair_takeover`` of the process that answers RPC at an address, names a socket of its own in a directory that only its user can enter, and waits to
be called there. `adopt` makes everything of a `Handover` in a stack whose subsystems have started; the giver uses it, too, to go on after a failure.

When the giver ends without a word after Ready, it may have died: `Taker.go` waits for its process to be gone, and then goes on, as told to. A giver that lives says `Failed`.

Errors: `Lost` and what RPC says: the running process cannot be asked, refuses, or gave up. `ConfigError` and others of `adopt` are told to the giver.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from errno import EIO
from typing import TYPE_CHECKING, Any

import msgspec

from qpair.app.config import load_runtime, parse
from qpair.app.takeover.messages import PROTOCOLS, FromGiver, Go, Handover, Offer, Prepared, Ready
from qpair.app.takeover.peer import Lost, Peer, same_user
from qpair.app.version import VERSION
from qpair.errors import InvalidArgument, MethodNotFound, QpairError, Unsupported, from_errno
from qpair.rpc.address import parse_address

if TYPE_CHECKING:
    from qpair.app.config import Config
    from qpair.app.stack import Stack

__all__ = ["Taker", "adopt"]

ASK_S = 10.0
REST_S = 60.0
GO_S = 30.0
DEAD_S = 5.0


class Taker:
    """One attempt."""

    def __init__(self, peer: Peer, offer: Offer) -> None:
        self._peer = peer
        self.offer = offer

    @classmethod
    async def ask(cls, address: str) -> Taker:
        """Ask whoever answers RPC at ``address``; back when the offer is there."""
        with _directory(address) as directory:
            path = os.path.join(directory, "sock")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(path)
                listener.listen(1)
                listener.settimeout(ASK_S)
                await _call(address, {"socket": path, "protocols": list(PROTOCOLS), "version": VERSION})
                try:
                    sock, _ = await asyncio.to_thread(listener.accept)
                except OSError as error:
                    raise Lost(f"RPC {address}: the process there agreed and did not come: {error.strerror or error}") from error
        peer = Peer(sock, same_user(sock, "takeover"))
        return cls(peer, await peer.receive(Offer, FromGiver, ASK_S))

    def config(self) -> Config:
        """What the offer would have this process do."""
        return parse(msgspec.json.encode(self.offer.config), source=f"the configuration of {self._peer.name}")

    async def handover(self) -> Handover:
        """This process is prepared: let the other come to rest."""
        await self._peer.send(Prepared(), ASK_S)
        return await self._peer.receive(Handover, FromGiver, REST_S)

    async def go(self) -> None:
        """All is made: wait to be told that it is this process's."""
        try:
            await self._peer.send(Ready(), ASK_S)
            await self._peer.receive(Go, FromGiver, GO_S)
        except Lost as error:
            if not error.left or not await self._peer.dead(DEAD_S):
                raise

    async def failed(self, error: BaseException) -> None:
        """Tell the giver to go on: this process has let go of everything."""
        await self._peer.tell_failed(str(error) or type(error).__name__)

    def close(self) -> None:
        """Idempotent."""
        self._peer.close()


def _directory(address: str) -> tempfile.TemporaryDirectory[str]:
    """Beside the RPC socket, where the other surely comes; else where temporary files are."""
    target = parse_address(address)
    if not isinstance(target, str):
        raise InvalidArgument(f"takeover: {address} is no Unix socket, and only there descriptors can be passed")
    beside = os.path.dirname(os.path.abspath(target))
    if len(os.fsencode(beside)) < 70:  # a socket's path has 107 bytes at most
        with contextlib.suppress(OSError):
            return tempfile.TemporaryDirectory(prefix=".takeover-", dir=beside)
    return tempfile.TemporaryDirectory(prefix="qpair-takeover-")


async def _call(address: str, params: dict[str, Any]) -> None:
    from qpair.rpc.client import RpcClient, RpcError

    def call() -> None:
        with RpcClient(address, timeout_s=ASK_S) as client:
            client.call("qpair_takeover", **params)

    try:
        await asyncio.to_thread(call)
    except RpcError as error:
        if error.code != MethodNotFound.rpc_code:
            raise
        raise Unsupported(f"RPC {address}: the program there knows no takeover; stop it and start this one") from None


async def adopt(stack: Stack, handover: Handover) -> None:
    """Bdevs, controllers and sessions as they were; no ring runs before ``stack.vhost.start_sessions``."""
    try:
        await _adopt(stack, handover)
    except OSError as error:
        if isinstance(error, QpairError):
            raise
        raise from_errno(error.errno or EIO, f"what was handed over cannot be used: {error.strerror or error}") from error


async def _adopt(stack: Stack, handover: Handover) -> None:
    for record in handover.sockets:
        stack.passed_sockets.inherit(record)
    for controller in handover.controllers:
        if controller.listener is not None:
            stack.passed_sockets.inherit(controller.listener)
    stack.inherited_memory = dict(handover.memory)
    stack.vhost.expect(handover.controllers)
    await load_runtime(stack, parse(msgspec.json.encode(handover.config), source="the configuration taken over"))
    await stack.vhost.resume(handover.controllers)
    if left := list(stack.inherited_memory):
        raise QpairError(f"the memory of {', '.join(left[:5])} was given, and no bdev of that name was made")
