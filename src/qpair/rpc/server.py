"""The JSON-RPC server: a thin asyncio shell around `Framer`, `decode` and `answer`.

How it works: each connection feeds its bytes to a framer and queues whole documents; while the queue holds any, one task answers them in order.
An accepted request is carried out even if its sender leaves. A Unix socket has mode 0600 and a lock file beside it (``<path>.lock``, as SPDK's), so that
a socket left by a crash is replaced and one in use is not. A socket that a service manager passed is the manager's: its mode, its file.

Errors: what breaks a stream (see `qpair.rpc.framing`) is answered, then input is discarded until the peer closes, so that a peer that is still
sending reads the reason.

Limits, each answered or logged by name: 1024 connections or half of the process's descriptors (whichever is less); 64 queued documents a connection,
then its reading pauses; 64 MiB of unfinished or queued requests together; a peer that does not read 1 MiB of replies for 30 s is disconnected.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import socket
import stat
import struct
import sys
from collections import deque
from errno import EAGAIN
from typing import TYPE_CHECKING, Any, Self

from qpair.app.parcel import Descriptor
from qpair.app.passed import PassedRecord
from qpair.errors import Busy, QpairError, from_errno
from qpair.rpc.address import DEFAULT_ADDRESS, parse_address
from qpair.rpc.dispatch import CALLER, Caller, answer_document
from qpair.rpc.framing import Framer
from qpair.rpc.protocol import Document, Refusal, decode, encode_error
from qpair.rpc.registry import REGISTRY, Registry

if TYPE_CHECKING:
    from qpair.app.passed import PassedSockets
    from qpair.app.stack import Stack

__all__ = ["DEFAULT_ADDRESS", "RpcServer", "parse_address"]

QUEUED_DOCUMENTS_MAX = 64
HELD_BYTES_MAX = 64 << 20
DOCUMENT_OVERHEAD_BYTES = 64  # of a queued document: thousands of two bytes each count for what they hold
UNREAD_BYTES_MAX = 1 << 20
UNREAD_S_MAX = 30.0
LINGER_S = 10.0
CONNECTIONS_MAX = 1024

logger = logging.getLogger("qpair.rpc")

# Since 3.13 asyncio would unlink the socket's file itself, also one that is not ours.
_KEEP_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}


class RpcServer:
    """Listens on one address and answers for one stack. ``async with RpcServer(stack, "/tmp/q.sock"): ...``"""

    def __init__(
        self,
        stack: Stack,
        address: str = DEFAULT_ADDRESS,
        *,
        registry: Registry = REGISTRY,
        connections_max: int | None = None,
        passed: PassedSockets | None = None,
    ) -> None:
        self.stack = stack
        self.registry = registry
        self.address = address
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.connections_max = connections_max if connections_max is not None else min(CONNECTIONS_MAX, max(1, descriptors // 2))
        self.connections: set[_Connection] = set()
        self.held_bytes = 0
        self.refused_connections = 0
        self._server: asyncio.Server | None = None
        self._passed = passed
        self._lock: int | None = None
        self._path: str | None = None

    @property
    def bound(self) -> str:
        """Where it listens now; the port is the real one when 0 was asked."""
        if self._server is not None and self._server.sockets and self._server.sockets[0].family != socket.AF_UNIX:
            host, port = self._server.sockets[0].getsockname()[:2]
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self.address

    async def start(self) -> None:
        """Listen. `Busy` when another process serves this path."""
        loop = asyncio.get_running_loop()
        target = parse_address(self.address)
        if isinstance(target, str):
            self._server = await loop.create_unix_server(lambda: _Connection(self), sock=self._bind_unix(target), backlog=512, **_KEEP_FILE)
            return
        host, port = target
        try:
            self._server = await loop.create_server(lambda: _Connection(self), host, port, backlog=512)
        except OSError as error:
            raise from_errno(error.errno or 5, f"RPC address {self.address}: {error.strerror or error}") from error
        if host not in ("127.0.0.1", "::1", "localhost"):
            logger.warning("RPC listens on %s without authentication: whoever reaches it owns this process", self.address)

    def _bind_unix(self, path: str) -> socket.socket:
        if self._passed is not None and (passed := self._passed.borrow(path)) is not None:
            if passed.owned:
                self._lock, self._path = passed.lock, path
                self._sign_lock()
            return passed.sock
        self._lock = _lock(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _remove_stale(path)
            # Private from its first instant: a mode that is set after bind comes too late for whoever watches the directory.
            mask = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(mask)
        except OSError as error:
            listener.close()
            self._unlock(path)
            if isinstance(error, QpairError):
                raise
            raise from_errno(error.errno or 5, f"RPC socket {path}: {error.strerror}") from error
        self._path = path
        return listener

    def _sign_lock(self) -> None:
        """Whoever finds it locked is told of this process."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _unlock(self, path: str | None = None) -> None:
        if self._lock is not None:
            if path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + ".lock")
            os.close(self._lock)
            self._lock = None

    def release(self) -> PassedRecord | None:
        """What another process needs to listen in this one's place; `stop` leaves the file alone after that. None: it is no Unix socket."""
        if self._server is None or not self._server.sockets or self._server.sockets[0].family != socket.AF_UNIX:
            return None
        listener = Descriptor.duplicate(self._server.sockets[0].fileno())
        owned, lock = self._path is not None, None if self._lock is None else Descriptor(self._lock)
        self._lock = self._path = None
        return PassedRecord(os.path.abspath(self.address), listener, owned, lock)

    async def stop(self, deadline_s: float = 5.0) -> None:
        """Stop listening, let requests in progress finish until the deadline, then close every connection. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for connection in tuple(self.connections):
            connection.stop_reading()
        tasks = [
            connection.task
            for connection in self.connections
            if connection.task is not None and connection.task is not asyncio.current_task()
        ]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=deadline_s)
            for task in late:
                task.cancel()
            if late:
                logger.warning("%d RPC requests did not finish within %.1f s and were cancelled", len(late), deadline_s)
        for connection in tuple(self.connections):
            connection.finish()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._unlock(self._path)
            self._path = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class _Connection(asyncio.Protocol):
    """One peer: Open, then Discarding (its stream is broken) or Ended (it closed its sending side)."""

    def __init__(self, server: RpcServer) -> None:
        self.server = server
        self.framer = Framer()
        self.queue: deque[bytes] = deque()
        self.queued_bytes = 0
        self.task: asyncio.Task[None] | None = None
        self.caller = Caller()
        self.peer = "?"
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._held = 0
        self._discarding = False
        self._ended = False
        self._failure: bytes | None = None
        self._linger: asyncio.TimerHandle | None = None

    # -- asyncio's side ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=UNREAD_BYTES_MAX)
        self.peer = _peer_name(transport)
        if len(self.server.connections) >= self.server.connections_max:
            self.server.refused_connections += 1
            message = f"Too many connections: the limit is {self.server.connections_max}"
            if self.server.refused_connections & (self.server.refused_connections - 1) == 0:
                logger.warning("%s (%d refused so far)", message, self.server.refused_connections)
            transport.write(encode_error(None, -24, message) + b"\n")
            self._discarding = True
            transport.close()
            return
        self.server.connections.add(self)
        logger.info("connection from %s", self.peer)

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        documents, error = self.framer.feed(data)
        for document in documents:
            self.queue.append(document)
            self.queued_bytes += len(document) + DOCUMENT_OVERHEAD_BYTES
        if error is not None:
            self._fail(error.code, error.message)
        self._account()
        if len(self.queue) > QUEUED_DOCUMENTS_MAX and self._transport is not None and not self._discarding:
            self._transport.pause_reading()
        self._work()

    def eof_received(self) -> bool:
        if self._transport is None:
            return False
        self._ended = True
        if self._discarding:
            return self.task is not None
        if self.framer.buffered_bytes:
            self._failure = encode_error(None, -32700, "Parse error: the stream ended inside a request")
        self._work()
        return self.task is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        if self._linger is not None:
            self._linger.cancel()
        self.framer = Framer()
        self.server.connections.discard(self)
        self._account()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- the server's side ------------------------------------------------------------------------

    def stop_reading(self) -> None:
        """Take no further request."""
        self._discarding = True
        self.queue.clear()
        self.queued_bytes = 0
        self._account()

    def finish(self) -> None:
        """Close after what is written has gone."""
        if self._transport is not None:
            self._transport.close()

    # -- answering --------------------------------------------------------------------------------

    def _work(self) -> None:
        if self.task is None and (self.queue or self._failure is not None):
            self.task = asyncio.get_running_loop().create_task(self._answer_all(), name=f"rpc {self.peer}")

    async def _answer_all(self) -> None:
        CALLER.set(self.caller)
        try:
            while self.queue:
                document = self.queue.popleft()
                self.queued_bytes -= len(document) + DOCUMENT_OVERHEAD_BYTES
                decoded = decode(document)
                await self._answer(decoded)
                del document, decoded
                self._account()
                await asyncio.sleep(0)  # a peer's long queue must not hold up the others
                if len(self.queue) < QUEUED_DOCUMENTS_MAX // 2 and self._transport is not None and not self._discarding:
                    self._transport.resume_reading()
            if self._failure is not None:
                self._end_stream(self._failure)
            elif self._ended:
                self.finish()
        finally:
            self.task = None

    async def _answer(self, document: Document) -> None:
        if document.fatal:
            refusal = document.items[0]
            assert isinstance(refusal, Refusal)
            self.queue.clear()
            self.queued_bytes = 0
            self._fail(refusal.code, refusal.message)
            return
        reply = await answer_document(self.server.stack, document, registry=self.server.registry)
        if reply is not None:
            await self._write(reply + b"\n")

    async def _write(self, data: bytes) -> None:
        if self._transport is None:
            return
        self._transport.write(data)
        if self._writable.is_set():
            return
        try:
            await asyncio.wait_for(self._writable.wait(), UNREAD_S_MAX)
        except TimeoutError:
            logger.warning("%s read no replies for %.0f s: disconnected", self.peer, UNREAD_S_MAX)
            self.queue.clear()
            self.queued_bytes = 0
            if self._transport is not None:
                self._transport.abort()

    def _fail(self, code: int, message: str) -> None:
        """The stream is broken: answer what came before, then this, then only discard."""
        logger.warning("%s: %s", self.peer, message)
        self._failure = encode_error(None, code, message)
        self._discarding = True
        if self._transport is not None:
            self._transport.resume_reading()

    def _end_stream(self, last: bytes) -> None:
        if self._transport is None:
            return
        self._transport.write(last + b"\n")
        if self._ended or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._linger = asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)

    def _account(self) -> None:
        held = self.framer.buffered_bytes + self.queued_bytes
        self.server.held_bytes += held - self._held
        self._held = held
        if self.server.held_bytes > HELD_BYTES_MAX and held and not self._discarding:
            self.framer = Framer()
            self.queue.clear()
            self.queued_bytes = 0
            self._fail(-12, f"Cannot allocate memory: unfinished requests hold {HELD_BYTES_MAX} bytes, the limit of all connections")
            self._account()


def _lock(path: str) -> int:
    """The lock file of a socket's path, locked and with our process id in it. `Busy` names the process that has it."""
    name = path + ".lock"
    try:
        while True:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last owner may have removed it between our opening and our locking: then it is nobody's name any more.
                if _is_file(name, descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return descriptor
            except BlockingIOError:
                owner = os.pread(descriptor, 20, 0).strip()
                os.close(descriptor)
                who = f" (process {int(owner)} has its lock)" if owner.isdigit() else ""
                raise Busy(f"RPC socket {path} is served by another process; name another with -r{who}") from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except OSError as error:
        if isinstance(error, QpairError):
            raise
        raise from_errno(error.errno or 5, f"RPC socket {path}: its lock {name}: {error.strerror}") from error


def _is_file(name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(name), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_stale(path: str) -> None:
    """A socket that a crash left. `Busy` when it is something else, or when somebody answers there who knows of no lock file."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Busy(f"RPC socket {path}: there is a file of that name that is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) in (0, EAGAIN):
                raise Busy(f"RPC socket {path} is served by another process; name another with -r")
        os.unlink(path)


def _peer_name(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("socket")
    if peer is None or peer.family != socket.AF_UNIX:
        return str(transport.get_extra_info("peername"))
    pid, uid, gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"pid {pid} uid {uid} gid {gid}"
