"""JSON-RPC from peers that mean no good, against ``qpair serve``: an error by name, and nothing is kept."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.process import RpcFailed, Serve, read_line, until

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with Serve(tmp_path_factory.mktemp("rpc")) as there:
        there.malloc("there", 1)
        yield there
        assert there.end() == 0, there.log()


def connect(server: Serve, timeout_s: float = 20) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout_s)
    end = time.monotonic() + timeout_s
    while True:
        try:
            sock.connect(str(server.socket))
            return sock
        except BlockingIOError:  # the backlog is full
            assert time.monotonic() < end, "nobody accepts"
            time.sleep(0.01)


def exchange(server: Serve, data: bytes) -> Any:
    """The first answer to these bytes."""
    with connect(server) as sock:
        sock.sendall(data)
        return json.loads(read_line(sock))


def code_of(server: Serve, method: str, **params: Any) -> int:
    """The error's code, or 0."""
    try:
        server.rpc(method, **params)
    except RpcFailed as error:
        return error.code
    return 0


def call(method: str, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()


def create(**params: Any) -> bytes:
    return call("bdev_malloc_create", **{"name": "x", "num_blocks": 2048, "block_size": 512, **params})


def raw(number: str) -> bytes:
    """bdev_malloc_create with a number that Python would not write so."""
    return create().replace(b"2048", number.encode())


REFUSED: dict[str, tuple[bytes, int, str]] = {
    "an unknown method": (call("no_such_method"), -32601, "no_such_method"),
    "a method of 100000 bytes": (call("m" * 100_000), -32601, "Method not found"),
    "a wrong type": (create(num_blocks="many"), -32602, "num_blocks"),
    "a boolean for a number": (create(num_blocks=True), -32602, "num_blocks"),
    "a fraction": (create(num_blocks=1.5), -32602, "num_blocks"),
    "null": (create(num_blocks=None), -32602, "num_blocks"),
    "a missing parameter": (call("bdev_malloc_create", name="x", block_size=512), -32602, "num_blocks"),
    "an unknown parameter": (create(colour="red"), -32602, "colour"),
    "a parameter twice": (create().replace(b'"num_blocks"', b'"num_blocks": 1, "num_blocks"'), -32602, "num_blocks"),
    "a member twice": (b'{"id": 1, "method": "a", "method": "b"}', -32600, "method"),
    "params as an array": (b'{"id": 1, "method": "bdev_malloc_create", "params": [1]}', -32602, "bdev_malloc_create"),
    "2**63": (raw(str(2**63)), -22, ""),
    "2**63 - 1": (raw(str(2**63 - 1)), -22, ""),
    "2**64 - 1": (raw(str(2**64 - 1)), -22, ""),
    "2**64": (raw(str(2**64)), 0, "num_blocks"),
    "10**400": (raw("1" + "0" * 400), 0, "num_blocks"),
    "1e400": (raw("1e400"), 0, ""),
    "-1": (raw("-1"), -32602, "num_blocks"),
    "a number of 5000 digits": (raw("9" * 5000), -32700, "Parse error"),
    "NaN": (raw("NaN"), -32700, "Parse error"),
    "0 blocks": (raw("0"), -22, "it would have 0 blocks; at least 1"),
    "a block size of 0": (create(block_size=0), 0, "block_size"),
    "a block size of 513": (create(block_size=513), 0, "block_size"),
    "a name in use": (create(name="there"), -17, "there"),
    "deep nesting": (b"[" * 100_000, -32700, "nested deeper than 64"),
    "deep nesting inside": (create(name=0).replace(b'"name": 0', b'"name": ' + b"[" * 63 + b"]" * 63), -32700, "nested deeper than 64"),
    "invalid UTF-8": (b'{"id": 1, "method": "\xff\xfe"}', -32700, "Parse error"),
    "half a surrogate": (b'{"id": "\\ud800", "method": "\\udfff"}', -32601, ""),
    "no JSON": (b"GARBAGE\n", -32700, "Parse error"),
    "a string": (b'"hello"', -32600, "must be an object"),
    "an empty batch": (b"[]", -32600, "the batch is empty"),
    "a batch of 10000": (b"[" + b",".join([b'{"id":1,"method":"x"}'] * 10_000) + b"]", -32600, "a batch of 10000 is more than 1024"),
    "an id that is an object": (b'{"id": {}, "method": "x"}', -32600, "id must be"),
    "another version": (b'{"jsonrpc": "1.0", "id": 1, "method": "x"}', -32600, "jsonrpc"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_that_cannot_be_is_refused_by_name(server: Serve, what: str) -> None:
    data, code, text = REFUSED[what]
    error = exchange(server, data)["error"]
    assert error["code"] < 0
    if code:
        assert error["code"] == code, error
    assert text in error["message"] + error.get("data", ""), error
    assert len(json.dumps(error)) < 2000, "an error repeats no more of the request than its name"
    assert [bdev["name"] for bdev in server.rpc("bdev_get_bdevs")] == ["there"]
    assert not server.lines("Traceback"), server.log()


HUGE = {
    "bdev_null_create": {"name": "x", "num_blocks": 2**63, "block_size": 4096},
    "bdev_get_bdevs": {"name": "x" * 100_000},
    "vhost_create_blk_controller": {"ctrlr": "c", "dev_name": "there", "cpumask": "0x" + "f" * 100_000},
    "bdev_aio_create": {"name": "x", "filename": "/" + "y" * 100_000},
    "bdev_uring_create": {"name": "x", "filename": "/half/\ud800", "block_size": 512},
    "bdev_virtio_attach_controller": {"name": "x", "trtype": "user", "traddr": "z" * 100_000, "dev_type": "blk"},
}


@pytest.mark.parametrize("method", HUGE)
def test_huge_values_are_refused_by_name(server: Serve, method: str) -> None:
    error = exchange(server, call(method, **HUGE[method]))["error"]
    assert error["code"] < 0
    assert error["code"] != -32603, error
    assert len(json.dumps(error)) < 2000, json.dumps(error)[:3000]
    assert not server.lines("Traceback"), server.log()


NAMES = {
    "no byte": "",
    "256 bytes": "n" * 256,
    "a megabyte": "n" * 900_000,
    "a NUL": "a\0b",
    "a line end": "a\nb",
    "half a surrogate": "\ud800",
}


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("method", ["bdev_malloc_create", "bdev_null_create", "vhost_create_blk_controller"])
def test_names_that_nobody_could_use_are_refused(server: Serve, method: str, what: str) -> None:
    name = NAMES[what]
    params = {"ctrlr": name, "dev_name": "there"} if method.startswith("vhost") else {"name": name, "num_blocks": 8, "block_size": 512}
    answer = exchange(server, call(method, **params))
    if what == "no byte" and method != "vhost_create_blk_controller":
        # As SPDK's: no name is one that the server chooses.
        if "result" in answer:
            server.rpc(method.replace("create", "delete"), name=answer["result"])
        return
    assert "error" in answer, answer
    assert answer["error"]["code"] in (-22, -32602), answer
    assert len(json.dumps(answer)) < 2000
    assert not server.lines("Traceback"), server.log()


@pytest.mark.parametrize("name", ["n" * 255, "..", ".", "/", "a/b", "../../etc/passwd", "-", "Ω≈ç√", "a b", "'\";$(x)"])
def test_strange_names_are_names(server: Serve, name: str) -> None:
    server.malloc(name, 1)
    assert server.rpc("bdev_get_bdevs", name=name)[0]["name"] == name
    server.rpc("bdev_malloc_delete", name=name)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../outside", "/tmp/absolutely/nowhere", "n" * 200, "sub/"])
def test_controller_names_that_are_no_file_in_the_directory_leave_nothing(server: Serve, name: str) -> None:
    before = sorted(path.name for path in server.folder.parent.rglob("*"))
    code = code_of(server, "vhost_create_blk_controller", ctrlr=name, dev_name="there")
    assert code in (0, -22, -2, -17, -21, -13, -36)
    if code == 0:
        server.rpc("vhost_delete_controller", ctrlr=name)
    assert server.rpc("vhost_get_controllers") == []
    assert sorted(path.name for path in server.folder.parent.rglob("*")) == before


def baseline(server: Serve) -> tuple[int, int]:
    return len(server.fds()), server.rss_bytes()


def back_to(server: Serve, before: tuple[int, int], rss_slack_bytes: int) -> None:
    until(lambda: len(server.fds()) <= before[0], f"descriptors: {len(server.fds())}, {before[0]} at first")
    until(lambda: server.rss_bytes() <= before[1] + rss_slack_bytes, f"memory: {server.rss_bytes() >> 20} MiB, {before[1] >> 20} at first")
    assert server.rpc("spdk_get_version")


def test_a_request_of_100_mb_is_refused_while_it_comes(server: Serve) -> None:
    before = baseline(server)
    piece = b"x" * MIB
    with connect(server) as sock:
        sock.sendall(b'{"id": 1, "method": "')
        for _ in range(100):
            try:
                sock.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
        answer = json.loads(read_line(sock))
        assert answer["error"]["message"] == "Invalid request: longer than 1048576 bytes"
        assert server.rss_bytes() < before[1] + 32 * MIB
    back_to(server, before, 16 * MIB)


def test_200_half_requests_of_a_megabyte_are_bounded_together(server: Serve) -> None:
    before = baseline(server)
    socks = []
    for _ in range(200):
        socks.append(connect(server))
        socks[-1].sendall(b'{"id": 1, "method": "' + b"x" * (MIB - 100))
    assert server.rpc("spdk_get_version")
    assert server.rss_bytes() < before[1] + 128 * MIB
    for sock in socks:
        sock.close()
    back_to(server, before, 64 * MIB)


def test_3000_connections_are_limited_by_name_and_closed(server: Serve) -> None:
    before = baseline(server)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard != resource.RLIM_INFINITY else 8192, hard))
    socks, refused = [], 0
    start = server.mark()
    for _ in range(3000):
        socks.append(connect(server))
    for sock in socks[-100:]:
        answer = json.loads(read_line(sock))
        assert answer["error"]["message"] == "Too many connections: the limit is 1024"
        refused += 1
    assert refused == 100
    # Those inside are served meanwhile.
    socks[0].sendall(call("spdk_get_version"))
    assert "result" in json.loads(read_line(socks[0]))
    assert 1 <= len(server.lines("Too many connections", start)) < 20
    for sock in socks:
        sock.close()
    back_to(server, before, 48 * MIB)


def test_peers_that_never_read_cost_a_bounded_amount(server: Serve) -> None:
    before = baseline(server)
    socks = []
    for _ in range(20):
        sock = connect(server)
        sock.setblocking(False)
        socks.append(sock)
    end = time.monotonic() + 3
    request = call("rpc_get_methods") * 50
    while time.monotonic() < end:
        for sock in socks:
            try:
                sock.send(request)
            except BlockingIOError:
                continue
        time.sleep(0.001)
    began = time.monotonic()
    assert server.rpc("spdk_get_version")
    assert time.monotonic() - began < 5
    assert server.rss_bytes() < before[1] + 200 * MIB
    for sock in socks:
        sock.close()
    back_to(server, before, 64 * MIB)


def test_half_requests_are_forgotten_with_their_connection(server: Serve) -> None:
    before = baseline(server)
    for cut in range(1, len(create()), 3):
        with connect(server) as sock:
            sock.sendall(create()[:cut])
    back_to(server, before, 8 * MIB)
    assert [bdev["name"] for bdev in server.rpc("bdev_get_bdevs")] == ["there"]


def test_a_request_byte_by_byte_is_answered(server: Serve) -> None:
    with connect(server) as sock:
        for byte in call("spdk_get_version"):
            sock.sendall(bytes([byte]))
        assert "result" in json.loads(read_line(sock))


def test_pipelined_creations_and_deletions_from_many_connections_leave_nothing(server: Serve) -> None:
    before = baseline(server)

    def work(number: int) -> None:
        with connect(server) as sock:
            name = f"w{number % 4}"  # on purpose the same names
            sock.sendall((create(name=name) + call("bdev_malloc_delete", name=name)) * 50)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for name in ("w0", "w1", "w2", "w3"):
        assert code_of(server, "bdev_malloc_delete", name=name) in (0, -19)
    back_to(server, before, 32 * MIB)


def test_a_claim_protects_a_bdev_that_a_front_end_serves(server: Serve) -> None:
    path = server.export("held", "there")
    with pytest.raises(RpcFailed) as refused:
        server.rpc("vhost_create_blk_controller", ctrlr="held", dev_name="there")
    assert refused.value.code == -17
    server.rpc("vhost_delete_controller", ctrlr="held")
    assert not path.exists()


def test_a_socket_of_another_server_is_left_alone(server: Serve, tmp_path: Path) -> None:
    with Serve(tmp_path, "-r", str(server.socket), wait=False) as second:
        assert second.process.wait(20) == 1
        assert "is served by another process" in second.log()
    assert server.rpc("spdk_get_version")
    assert os.path.exists(server.socket)
