"""JSON-RPC by HTTP: what clients of SPDK's proxy expect, and what hostile peers get."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from missing import missing
from qpair import Stack
from qpair.app.serve import HttpOptions
from qpair.errors import InvalidArgument, NoSuchFile
from qpair.rpc import http as http_module
from qpair.rpc.http import Credentials, HttpServer

USER, PASSWORD = "admin", "s3cret: with colon"
TOKEN = base64.b64encode(f"{USER}:{PASSWORD}".encode())
AUTH = b"Authorization: Basic " + TOKEN + b"\r\n"
VERSION = b'{"jsonrpc":"2.0","id":1,"method":"spdk_get_version"}'


@pytest_asyncio.fixture
async def http(stack: Any) -> AsyncIterator[HttpServer]:
    yield await stack.listen_http("127.0.0.1:0", USER, PASSWORD)


async def connect(server: HttpServer, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.bound.rpartition(":")
    return await asyncio.open_connection(host, int(port), **options)


def post(body: bytes, *headers: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    lines = b"".join(line + b"\r\n" for line in headers)
    return b"POST / " + version + b"\r\nHost: x\r\n" + AUTH + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    status = int((await asyncio.wait_for(reader.readline(), 20)).split()[1])
    headers = {}
    while line := (await reader.readline()).decode().strip():
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, await reader.readexactly(int(headers.get("content-length", "0")))


async def exchange(server: HttpServer, data: bytes) -> tuple[int, bytes]:
    """One connection: send, read one response."""
    reader, writer = await connect(server)
    writer.write(data)
    status, _, body = await response(reader)
    writer.close()
    return status, body


async def test_a_post_is_answered_as_spdks_proxy_answers_it(http: HttpServer) -> None:
    status, body = await exchange(http, post(VERSION))
    assert (status, json.loads(body)["result"]["version"].startswith("qpair v")) == (200, True)
    status, body = await exchange(http, post(b'{"id":"x","method":"bdev_get_bdevs","params":{"name":"nothing"}}', version=b"HTTP/1.0"))
    assert (status, json.loads(body)["error"]["code"]) == (200, -19), "an error of the method is an answer"
    status, body = await exchange(http, post(b'{"method":"bdev_wait_for_examine"}'))
    assert (status, body) == (204, b""), "who gives no id wants no answer"
    status, body = await exchange(http, post(b'[{"id":1,"method":"bdev_get_bdevs"},{"id":2,"method":"no"}]'))
    assert [answer["id"] for answer in json.loads(body)] == [1, 2]
    for wrong in (b"{", b"", b"nonsense", VERSION + VERSION, VERSION + b"{", b"[" * 100):
        status, body = await exchange(http, post(wrong))
        assert (status, json.loads(body)["error"]["code"] in (-32700, -32600)) == (500, True), wrong
    reader, writer = await connect(http)
    writer.write(b"HEAD /x HTTP/1.1\r\n\r\n")
    assert (await response(reader))[0] == 200
    writer.close()


async def test_several_requests_share_a_connection_until_one_says_close(http: HttpServer) -> None:
    reader, writer = await connect(http)
    for _ in range(3):
        writer.write(post(VERSION))
    for _ in range(3):
        assert (await response(reader))[0] == 200
    writer.write(post(VERSION, b"Connection: close"))
    status, headers, _ = await response(reader)
    assert (status, headers["connection"]) == (200, "close")
    assert await reader.read() == b""
    writer.close()


async def test_bodies_come_in_chunks_and_after_100_continue(http: HttpServer) -> None:
    reader, writer = await connect(http)
    pieces = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece) for piece in (VERSION[:10], VERSION[10:]))
    writer.write(b"POST / HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\nTrailer: x\r\n\r\n")
    assert (await response(reader))[0] == 200
    writer.write(b"POST / HTTP/1.1\r\n" + AUTH + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(VERSION))
    assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert await reader.readline() == b"\r\n"
    writer.write(VERSION)
    assert (await response(reader))[0] == 200
    writer.close()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Authorization: Basic\r\n",
        b"Authorization: Basic " + base64.b64encode(b"admin:wrong") + b"\r\n",
        b"Authorization: Basic " + base64.b64encode(b"Admin:" + PASSWORD.encode()) + b"\r\n",
        b"Authorization: Basic " + TOKEN[:-4] + b"\r\n",
        b"Authorization: Basic \xff\xfe\r\n",
        b"Authorization: Bearer " + TOKEN + b"\r\n",
        b"Authorization: " + TOKEN + b"\r\n",
    ],
)
async def test_wrong_credentials_are_401_before_the_body_is_read(http: HttpServer, header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = await connect(http)
    writer.write(b"POST / HTTP/1.1\r\n" + header + b"Content-Length: 1000000\r\n\r\n")
    status, headers, _ = await response(reader)
    assert (status, headers["www-authenticate"]) == (401, 'Basic realm="qpair", charset="UTF-8"')
    assert "credentials missing or wrong" in caplog.text
    assert TOKEN.decode() not in caplog.text
    assert PASSWORD not in caplog.text
    writer.close()


def test_credentials_are_compared_whole_and_by_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = http_module.hmac.compare_digest
    monkeypatch.setattr(http_module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    credentials = Credentials(USER, PASSWORD)
    assert credentials.accept("basic " + TOKEN.decode())
    for wrong in (None, "", "Basic", "Basic " + TOKEN.decode()[:-1], "x" * 5000, "Basic " + "é"):
        assert not credentials.accept(wrong)
    assert len(compared) == 7, "whatever came is compared"
    assert {len(text) for pair in compared for text in pair} == {32}, "digests, so that no length is told"
    for user, password, message in (("", "p", "HTTP user ''"), ("a:b", "p", "and no ':'"), ("a", "", "the HTTP password is empty")):
        with pytest.raises(InvalidArgument, match=message):
            Credentials(user, password)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 501),
        (b"POST / HTTP/2.0\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"\r\n", 411),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: 1e3\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: " + b"9" * 4000 + b"\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: 1048577\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n", 413),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 300 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Expect: miracles\r\nContent-Length: 1\r\n\r\n", 417),
        (b"POST / HTTP/1.1\r\n" + AUTH + b" folded: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 65 + b"\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + b"".join(b"a%d: b\r\n" % number for number in range(65)) + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\n" + b"".join(b"a%d: %s\r\n" % (number, b"b" * 1000) for number in range(20)) + b"\r\n", 431),
        (b"POST /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 431),
    ],
)
async def test_a_broken_request_is_refused_by_its_status_and_ends_the_connection(http: HttpServer, data: bytes, status: int) -> None:
    reader, writer = await connect(http)
    writer.write(data)
    found, headers, body = await response(reader)
    assert (found, headers["connection"]) == (status, "close")
    assert body.endswith(b"\n")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert (await exchange(http, post(VERSION)))[0] == 200, "the others are served"


async def test_a_refused_peer_that_goes_on_sending_can_read_why(http: HttpServer) -> None:
    reader, writer = await connect(http)
    writer.write(b"POST / HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n")
    for _ in range(20):
        writer.write(b"x" * 100_000)
        await writer.drain()
    assert (await response(reader))[0] == 401
    writer.close()


async def test_slow_peers_are_cut_off_and_the_others_served(http: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADER_S_MAX", "BODY_S_MAX", "IDLE_S_MAX"):
        monkeypatch.setattr(http_module, name, 0.3)
    starts = (b"", b"POST", b"POST / HTTP/1.1\r\na: b\r\n", post(VERSION)[:-50], post(VERSION))
    peers = [await connect(http) for _ in starts]
    for (_, writer), start in zip(peers, starts, strict=True):
        writer.write(start)

    async def drip(writer: asyncio.StreamWriter) -> None:
        """A byte at a time, so that a limit on silence alone would never be reached."""
        for _ in range(30):
            writer.write(b"x")
            await asyncio.sleep(0.05)

    drips = [asyncio.ensure_future(drip(writer)) for _, writer in peers[1:4]]
    assert (await exchange(http, post(VERSION)))[0] == 200
    ends = await asyncio.gather(*(asyncio.wait_for(reader.read(), 30) for reader, _ in peers), return_exceptions=True)
    assert not any(isinstance(end, TimeoutError) for end in ends), "all were cut off"
    for task in drips:
        task.cancel()
    for _, writer in peers:
        writer.close()
    assert len(http._tasks) == 0


async def test_connections_are_bounded_and_come_free_again(http: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "CONNECTIONS_MAX", 4)
    peers = [await connect(http) for _ in range(8)]
    await asyncio.sleep(0.1)
    assert len(http._tasks) == 4
    assert [(await response(reader))[0] for reader, _ in peers[4:]] == [503] * 4
    for _, writer in peers:
        writer.close()
        await writer.wait_closed()
    for _ in range(100):
        if not http._tasks:
            break
        await asyncio.sleep(0.01)
    assert (await exchange(http, post(VERSION)))[0] == 200


async def test_a_request_in_progress_is_answered_when_the_stack_stops(make_stack: Any) -> None:
    async with make_stack() as stack:
        server = await stack.listen_http("127.0.0.1:0", USER, PASSWORD)
        reader, writer = await connect(server)
        idle = await connect(server)
        writer.write(post(b'{"id":1,"method":"bdev_get_bdevs","params":{"name":"never","timeout":500}}'))
        await asyncio.sleep(0.1)
    assert json.loads((await response(reader))[2])["error"]["code"] == -19
    assert await asyncio.wait_for(idle[0].read(), 5) == b""
    for each in (writer, idle[1]):
        each.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([b"POST / HTTP/1.1\r\n", AUTH, b"Content-Length: 52\r\n", b"\r\n", VERSION, b"0\r\n", b"a:b", b"\n"])).map(
        b"".join
    )
)
async def test_any_bytes_are_answered_or_the_connection_ends(data: bytes) -> None:
    stack = Stack(cores=0)  # never started: no method is reached but spdk_get_version
    server = HttpServer(stack, "127.0.0.1:0", Credentials(USER, PASSWORD))
    async with server:
        reader, writer = await connect(server)
        writer.write(data)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
        writer.close()


@pytest_asyncio.fixture
async def certificate(client: Any, tmp_path: Path) -> Path:
    """A fresh PEM of a key and a certificate for 127.0.0.1; the certificate alone lies beside it as ``cert``."""
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("openssl", "apt-get install openssl")
    code, _, err = await client(
        openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
        "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert"),
    )  # fmt: skip
    assert code == 0, err
    path = tmp_path / "server.pem"
    path.write_text((tmp_path / "key").read_text() + (tmp_path / "cert").read_text())
    return path


async def test_a_peer_that_ends_no_handshake_is_counted_and_cut_off(
    stack: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_module, "HEADER_S_MAX", 0.5)
    monkeypatch.setattr(http_module, "CONNECTIONS_MAX", 8)
    server = await stack.listen_http("127.0.0.1:0", USER, PASSWORD, certificate=str(certificate))
    silent = [await connect(server) for _ in range(12)]
    silent[0][1].write(b"POST / HTTP/1.1\r\n\r\n")  # plain text is no handshake
    await asyncio.sleep(0.1)
    assert len(server._tasks) <= 8
    assert [await asyncio.wait_for(reader.read(), 30) for reader, _ in silent][1:] == [b""] * 11
    for _, writer in silent:
        writer.close()
    trusted = ssl.create_default_context(cafile=str(tmp_path / "cert"))
    for _ in range(3):
        peers = await asyncio.gather(*(connect(server, ssl=trusted, ssl_shutdown_timeout=1) for _ in range(8)))
        for _, writer in peers:
            writer.write(post(VERSION, b"Connection: close"))
        assert [(await response(reader))[0] for reader, _ in peers] == [200] * 8
        for _, writer in peers:
            writer.close()
        await asyncio.sleep(0.05)


async def test_curl_is_served_with_and_without_tls(stack: Any, client: Any, tmp_path: Path, certificate: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        missing("curl", "apt-get install curl")
    plain = await stack.listen_http("127.0.0.1:0", USER, PASSWORD)
    secure = await stack.listen_http("127.0.0.1:0", USER, PASSWORD, certificate=str(certificate))
    large = json.dumps({"id": 1, "method": "bdev_get_bdevs", "params": {"name": "x" * 4000}})
    for url in (f"http://{plain.bound}/", f"https://{secure.bound}/rpc"):
        common = (curl, "-sS", "--fail-with-body", "--max-time", "20", "--cacert", str(tmp_path / "cert"), url)
        code, out, err = await client(*common, "-u", f"{USER}:{PASSWORD}", "-d", VERSION.decode())
        assert (code, json.loads(out)["result"]["fields"]["major"]) == (0, 0), err
        code, out, err = await client(*common, "-u", f"{USER}:{PASSWORD}", "-H", "Transfer-Encoding: chunked", "-d", large)
        assert (code, json.loads(out)["error"]["code"]) == (0, -19), err
        code, out, err = await client(*common, "-u", f"{USER}:wrong", "-d", VERSION.decode())
        assert code == 22
        assert "401" in err
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(secure, ssl=ssl.create_default_context())
    with pytest.raises(InvalidArgument, match="not PEM of a certificate and its key"):
        await stack.listen_http("127.0.0.1:0", USER, PASSWORD, certificate=str(tmp_path / "cert"))
    with pytest.raises(InvalidArgument, match="write host:port"):
        await stack.listen_http("/a/path", USER, PASSWORD)


async def test_serve_offers_it_when_asked_and_takes_no_password_from_the_command_line(
    qpair_command: list[str], client: Any, tmp_path: Path
) -> None:
    curl = shutil.which("curl")
    if curl is None:
        missing("curl", "apt-get install curl")
    password = tmp_path / "password"
    password.write_text("from a file\n")
    password.chmod(0o600)
    process = await asyncio.create_subprocess_exec(
        *qpair_command, "serve", "-r", str(tmp_path / "rpc.sock"), "--no-pin", "--rpc-http", "127.0.0.1:0", "--rpc-http-user", "me",
        "--rpc-http-password-file", str(password), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        url = line.partition("http://")[2].partition(";")[0]
        code, out, err = await client(curl, "-sS", f"http://{url}/", "-u", "me:from a file", "-d", VERSION.decode())
        assert (code, json.loads(out)["id"]) == (0, 1), err
    finally:
        process.terminate()
        await process.wait()


def test_the_password_is_a_files_first_line_or_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.delenv("QPAIR_RPC_HTTP_PASSWORD", raising=False)
    path = tmp_path / "password"
    path.write_text("one\ntwo\n")
    path.chmod(0o644)
    assert HttpOptions.of("h:1", "u", str(path), None).password == "one"
    assert "can be read by others than its owner" in caplog.text
    with pytest.raises(InvalidArgument, match="--rpc-http needs --rpc-http-user"):
        HttpOptions.of("h:1", None, str(path), None)
    with pytest.raises(InvalidArgument, match="--rpc-http needs a password"):
        HttpOptions.of("h:1", "u", None, None)
    monkeypatch.setenv("QPAIR_RPC_HTTP_PASSWORD", "env")
    assert HttpOptions.of("h:1", "u", None, None).password == "env"
    path.write_text("\n")
    with pytest.raises(InvalidArgument, match="its first line is empty"):
        HttpOptions.of("h:1", "u", str(path), None)
    with pytest.raises(NoSuchFile):
        HttpOptions.of("h:1", "u", str(tmp_path / "nothing"), None)
