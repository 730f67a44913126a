"""JSON-RPC by HTTP POST with Basic authentication, for clients of SPDK's ``rpc_http_proxy``. Off unless asked for.

Specification: HTTP/1.1 (RFC 9112) as far as such clients use it: POST to any path, with Content-Length or chunked, ``Expect: 100-continue``, several requests
a connection, HTTP/1.0; Basic authentication (RFC 7617).

How it works: as with the proxy, the body of a POST is one JSON-RPC document, and the answer is 200 with the JSON-RPC answer, also when that is an error; a
document that asks for no answer gets 204, one that is no JSON 500 (with the JSON-RPC error), missing or wrong credentials 401, HEAD 200, other methods 501. Credentials are
checked before the body is read, by digests, in constant time. Each peer is one task; `_Reader` gives it lines and bytes until a deadline.

Errors: whatever breaks the framing (400, 411, 413, 417, 431, 505) is answered by its status and the connection closed. Credentials are in no log line.

Limits: 16 KiB and 64 lines of header, 1 MiB of body, 64 connections, 10 s for a header (the first from the start of the connection), 30 s for a body and for the
reading of an answer, 60 s between requests. An answer 401 comes after 0.25 s and ends the connection.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

from qpair.app.logs import LineLimit
from qpair.errors import InvalidArgument, from_errno
from qpair.rpc.address import parse_address
from qpair.rpc.dispatch import answer_document
from qpair.rpc.framing import DOCUMENT_BYTES_MAX, Framer
from qpair.rpc.protocol import Document, Refusal, decode, encode_error
from qpair.rpc.registry import REGISTRY, Registry

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["Credentials", "HttpServer"]

HEADER_BYTES_MAX = 16 << 10
HEADER_LINES_MAX = 64
CONNECTIONS_MAX = 64
HEADER_S_MAX = 10.0
BODY_S_MAX = 30.0
IDLE_S_MAX = 60.0
REFUSED_S = 0.25
LINGER_S = 10.0
LINGER_BYTES_MAX = 4 << 20
CHUNK_LINE_MAX = 256

logger = logging.getLogger("qpair.rpc")


class Credentials:
    """A user and a password, kept as a digest of what Basic authentication sends."""

    def __init__(self, user: str, password: str) -> None:
        if not user or ":" in user or not user.isprintable():
            raise InvalidArgument(f"HTTP user {user!r:.80}: printable characters, at least one, and no ':'")
        if not password:
            raise InvalidArgument("the HTTP password is empty")
        self._digest = _digest(f"{user}:{password}".encode())

    def accept(self, header: str | None) -> bool:
        """Whether an Authorization header is right. Takes as long for one wrong text as for another."""
        scheme, _, token = (header or "").partition(" ")
        try:
            given = base64.b64decode(token.strip(), validate=True)
        except (binascii.Error, ValueError):
            given = b""
        return hmac.compare_digest(_digest(given), self._digest) and scheme.lower() == "basic"


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


class HttpServer:
    """Listens on one TCP address and answers for one stack. ``certificate``: a PEM file with certificate and key, for HTTPS."""

    def __init__(
        self, stack: Stack, address: str, credentials: Credentials, *, certificate: str | None = None, registry: Registry = REGISTRY
    ) -> None:
        target = parse_address(address)
        if isinstance(target, str):
            raise InvalidArgument(f"HTTP address {address!r:.120}: write host:port or [v6]:port")
        self.stack = stack
        self.registry = registry
        self.credentials = credentials
        self.address = address
        self._target = target
        self._certificate = certificate
        self._server: asyncio.Server | None = None
        self._tls: ssl.SSLContext | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: set[asyncio.Task[None]] = set()
        self.limit = LineLimit()

    @property
    def bound(self) -> str:
        """Where it listens now; the port is the real one when 0 was asked."""
        if self._server is None or not self._server.sockets:
            return self.address
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Listen."""
        host, port = self._target
        self._tls = self._context()
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=HEADER_BYTES_MAX, backlog=128)
        except OSError as error:
            raise from_errno(error.errno or 5, f"HTTP address {self.address}: {error.strerror or error}") from error
        if self._certificate is None and host not in ("127.0.0.1", "::1", "localhost"):
            logger.warning("RPC by HTTP on %s is not encrypted: who can listen to it learns the password; give a certificate", self.address)

    def _context(self) -> ssl.SSLContext | None:
        if self._certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._certificate)
        except ssl.SSLError as error:
            raise InvalidArgument(f"HTTP certificate {self._certificate}: not PEM of a certificate and its key ({error.reason})") from None
        except OSError as error:
            raise from_errno(error.errno or 5, f"HTTP certificate {self._certificate}: {error.strerror}") from error
        return context

    def release(self) -> None:
        """Nothing to hand over: a successor listens by itself."""

    async def stop(self, deadline_s: float = 5.0) -> None:
        """Stop listening, let requests in progress finish until the deadline, close every connection. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        current = asyncio.current_task()
        for task in self._tasks - self._busy:
            task.cancel()
        if busy := self._busy - {current}:
            await asyncio.wait(busy, timeout=deadline_s)
        rest = self._tasks - {current}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=1)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = _Peer(self, reader, writer)
        if len(self._tasks) >= CONNECTIONS_MAX:
            self.limit.log(logger, logging.WARNING, "HTTP %s refused: %d connections are the limit", peer.name, CONNECTIONS_MAX)
            if self._tls is None:
                peer.write(HTTPStatus.SERVICE_UNAVAILABLE, close=True)
            writer.close()
            return
        self._tasks.add(task)
        try:
            if self._tls is not None:
                # Here, and not by start_server: a peer that never ends its handshake is a connection like others, and counted. Nothing may be awaited before,
                # so that none of the peer's bytes has been read as plain text.
                await writer.start_tls(self._tls, ssl_handshake_timeout=HEADER_S_MAX)
            await peer.run(self._busy, task)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # a peer that is slow, gone or rude; nothing is owed to it
        finally:
            self._tasks.discard(task)
            self._busy.discard(task)
            writer.close()
            # What is left in its buffer gets a moment; then it is dropped.
            asyncio.get_running_loop().call_later(LINGER_S, writer.transport.abort)


class _Refused(Exception):
    """Answer with this status and close."""

    def __init__(self, status: HTTPStatus, why: str, headers: bytes = b"") -> None:
        super().__init__(why)
        self.status = status
        self.headers = headers


class _Peer:
    """One connection, one request after the other."""

    def __init__(self, server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._known = False
        name = writer.get_extra_info("peername")
        self.name = f"{name[0]}:{name[1]}" if name else "?"

    async def run(self, busy: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        """Until the peer, a limit or a refusal ends it."""
        try:
            again = True
            while again:
                first = await asyncio.wait_for(self._line(), IDLE_S_MAX if self._known else HEADER_S_MAX)
                if not first:
                    return
                busy.add(task)
                again = await self._request(first)
                await asyncio.wait_for(self._writer.drain(), BODY_S_MAX)
                busy.discard(task)
        except _Refused as refusal:
            self._server.limit.log(logger, logging.WARNING, "HTTP %s: %d %s", self.name, refusal.status, refusal)
            self.write(refusal.status, f"{refusal}\n".encode(), kind="text/plain", headers=refusal.headers, close=True)
            busy.discard(task)
            await self._discard()

    async def _request(self, first: bytes) -> bool:
        """Answer one request; whether another may follow."""
        async with asyncio.timeout(HEADER_S_MAX):
            method, version, headers = await self._header(first)
        again = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if method == "HEAD":
            again = again and "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
            self.write(HTTPStatus.OK, close=not again)
            return again
        if method != "POST":
            raise _Refused(HTTPStatus.NOT_IMPLEMENTED, f"method {method!r:.32}: POST is all there is")
        if not self._server.credentials.accept(headers.get("authorization")):
            await asyncio.sleep(REFUSED_S)
            raise _Refused(
                HTTPStatus.UNAUTHORIZED, "credentials missing or wrong", b'WWW-Authenticate: Basic realm="qpair", charset="UTF-8"\r\n'
            )
        self._known = True
        if headers.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif "expect" in headers:
            raise _Refused(HTTPStatus.EXPECTATION_FAILED, "expect: 100-continue is all there is")
        async with asyncio.timeout(BODY_S_MAX):
            body = await self._body(headers)
        status, reply = await self._answer(body)
        self.write(status, reply, close=not again)
        return again

    async def _discard(self) -> None:
        """Take what a refused peer still sends: a connection that is closed on unread bytes is reset, and the peer never reads why."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
        async with asyncio.timeout(LINGER_S):
            left = LINGER_BYTES_MAX
            while left > 0 and (piece := await self._reader.read(1 << 16)):
                left -= len(piece)

    async def _answer(self, body: bytes) -> tuple[HTTPStatus, bytes | None]:
        document = _document(body)
        if document.fatal:
            refusal = document.items[0]
            assert isinstance(refusal, Refusal)
            return HTTPStatus.INTERNAL_SERVER_ERROR, encode_error(None, refusal.code, refusal.message) + b"\n"
        reply = await answer_document(self._server.stack, document, registry=self._server.registry)
        return (HTTPStatus.NO_CONTENT, None) if reply is None else (HTTPStatus.OK, reply + b"\n")

    # -- reading ----------------------------------------------------------------------------------

    async def _line(self, limit: int = HEADER_BYTES_MAX) -> bytes:
        """One line without its end; nothing at the end of the stream."""
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise _Refused(HTTPStatus.BAD_REQUEST, "the stream ended inside a line") from None
            return b""
        except asyncio.LimitOverrunError:
            raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a line is longer than {limit} bytes") from None
        if len(line) > limit:
            raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a line is longer than {limit} bytes")
        return line.rstrip(b"\r\n") or b"\r"

    async def _header(self, first: bytes) -> tuple[str, str, dict[str, str]]:
        parts = first.decode("latin-1").split(" ")
        if len(parts) != 3 or not parts[0].isalpha() or not parts[2].startswith("HTTP/"):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the first line is no HTTP request")
        if parts[2] not in ("HTTP/1.0", "HTTP/1.1"):
            raise _Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.0 and HTTP/1.1 are all there are")
        headers: dict[str, str] = {}
        size = len(first)
        for _ in range(HEADER_LINES_MAX + 1):
            line = await self._line()
            if line == b"\r":
                return parts[0], parts[2], headers
            size += len(line)
            if not line or size > HEADER_BYTES_MAX:
                break
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or not name or name != name.strip() or name.lower() in headers:
                raise _Refused(HTTPStatus.BAD_REQUEST, "a header line is malformed or given twice")
            headers[name.lower()] = value.strip()
        raise _Refused(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the header is longer than {HEADER_BYTES_MAX} bytes or {HEADER_LINES_MAX} lines"
        )

    async def _body(self, headers: dict[str, str]) -> bytes:
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise _Refused(HTTPStatus.BAD_REQUEST, "transfer-encoding: chunked is all there is, and without content-length")
            return await self._chunks()
        if length is None:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a POST needs content-length, or transfer-encoding: chunked")
        if not (length.isascii() and length.isdecimal() and len(length) < 20):
            raise _Refused(HTTPStatus.BAD_REQUEST, "content-length is no number")
        return await self._exactly(int(length), 0)

    async def _exactly(self, size: int, before: int) -> bytes:
        if before + size > DOCUMENT_BYTES_MAX:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is longer than {DOCUMENT_BYTES_MAX} bytes")
        return await self._reader.readexactly(size)

    async def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            digits = (await self._line(CHUNK_LINE_MAX)).partition(b";")[0].strip()
            if not 0 < len(digits) <= 8 or digits.strip(b"0123456789abcdefABCDEF"):
                raise _Refused(HTTPStatus.BAD_REQUEST, "a chunk's size is no hexadecimal number")
            size = int(digits, 16)
            if size == 0:
                break
            body += await self._exactly(size, len(body))
            if await self._line(CHUNK_LINE_MAX) != b"\r":
                raise _Refused(HTTPStatus.BAD_REQUEST, "a chunk does not end where it says")
        for _ in range(HEADER_LINES_MAX):
            if await self._line(CHUNK_LINE_MAX) == b"\r":
                return bytes(body)
        raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {HEADER_LINES_MAX} lines after the chunks")

    # -- writing ----------------------------------------------------------------------------------

    def write(
        self,
        status: HTTPStatus,
        body: bytes | None = None,
        *,
        kind: str = "application/json",
        headers: bytes = b"",
        close: bool = False,
    ) -> None:
        """One response."""
        lines = [f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode(), b"Cache-Control: no-store\r\n", headers]
        if body is not None:
            lines.append(f"Content-Type: {kind}\r\n".encode())
        if status is not HTTPStatus.NO_CONTENT:
            lines.append(f"Content-Length: {len(body or b'')}\r\n".encode())
        lines.append(b"Connection: close\r\n\r\n" if close else b"\r\n")
        with contextlib.suppress(RuntimeError):  # a transport that is closing already
            self._writer.write(b"".join(lines) + (body or b""))


def _document(body: bytes) -> Document:
    """The one document of a body; the framer's limits hold here, too."""
    framer = Framer()
    documents, error = framer.feed(body)
    if error is not None:
        return Document([Refusal(error.code, error.message)], fatal=True)
    if len(documents) != 1 or framer.buffered_bytes:
        return Document([Refusal(-32700, "Parse error: the body must be one JSON-RPC request or batch")], fatal=True)
    return decode(documents[0])
