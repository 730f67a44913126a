"""The server on a socket: pipelining, batches, hostile peers, and what a connection may hold."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qpair.errors import Busy, InvalidArgument, QpairError
from qpair.rpc import server as server_module
from qpair.rpc.address import parse_address
from qpair.rpc.registry import Registry, method
from qpair.rpc.server import RpcServer


class Peer:
    """A raw client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path: str) -> Peer:
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 24))

    async def send(self, *values: Any, indent: int | None = 2) -> None:
        self.writer.write("".join(json.dumps(value, indent=indent) for value in values).encode())
        await self.writer.drain()

    async def answer(self) -> Any:
        line = await asyncio.wait_for(self.reader.readline(), 10)
        return json.loads(line) if line else None

    async def ask(self, method_name: str, params: Any = None, identity: Any = 1) -> Any:
        request = {"jsonrpc": "2.0", "id": identity, "method": method_name}
        await self.send(request | ({"params": params} if params is not None else {}))
        return await self.answer()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def settles(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether ``condition`` comes true in time."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return condition()


@pytest.fixture
async def peer(server: RpcServer, socket_path: str) -> Any:
    connected = await Peer.connect(socket_path)
    yield connected
    await connected.close()


async def test_answers_are_compact_end_with_a_newline_and_echo_string_ids(peer: Peer) -> None:
    await peer.send({"id": "one", "method": "framework_wait_init"})
    assert await peer.reader.readline() == b'{"jsonrpc":"2.0","id":"one","result":true}\n'


async def test_pipelined_requests_are_answered_in_order(peer: Peer) -> None:
    await peer.send(*({"id": number, "method": "spdk_get_version" if number % 2 else "nothing"} for number in range(50)))
    answers = [await peer.answer() for _ in range(50)]
    assert [answer["id"] for answer in answers] == list(range(50))
    assert answers[0]["error"] == {"code": -32601, "message": "Method not found", "data": "no method is named 'nothing'"}
    assert "result" in answers[1]


async def test_a_batch_is_answered_by_one_array_and_notifications_by_nothing(peer: Peer) -> None:
    await peer.send([{"id": 1, "method": "framework_wait_init"}, {"method": "framework_wait_init"}, 7])
    answers = await peer.answer()
    assert [answer["id"] for answer in answers] == [1, None]
    assert answers[1]["error"]["code"] == -32600
    await peer.send([{"method": "framework_wait_init"}], {"id": 2, "method": "framework_wait_init"})
    assert (await peer.answer())["id"] == 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "missing parameter 'block_size', 'num_blocks'"),
        ({"block_size": 512}, "missing parameter 'num_blocks'"),
        ({"block_size": 512, "num_blocks": 8, "colour": 1, "x": 2}, "unknown parameter 'colour', 'x'"),
        ({"block_size": "512", "num_blocks": 8}, "parameter 'block_size': Expected `int`, got `str`"),
        ({"block_size": 512, "num_blocks": -1}, "parameter 'num_blocks': Expected `int` >= 0"),
        ({"block_size": 2**32, "num_blocks": 8}, "parameter 'block_size': Expected `int` <= 4294967295"),
        ({"block_size": 512, "num_blocks": 2**64}, "parameter 'num_blocks': the number is past 18446744073709551615"),
        ({"block_size": 512, "num_blocks": 10**200}, "parameter 'num_blocks': the number is past 18446744073709551615"),
        ({"block_size": 512, "num_blocks": 1e300}, "parameter 'num_blocks': Expected `int`, got `float`"),
        ([512, 8], "params must be an object of named parameters, got list"),
        ({"block_size": 512, "num_blocks": 8, "uuid": "nonsense"}, "parameter 'uuid': Expected `str` matching regex"),
    ],
)
async def test_wrong_parameters_are_refused_and_named(peer: Peer, params: Any, message: str) -> None:
    error = (await peer.ask("bdev_malloc_create", params))["error"]
    assert error["code"] == -32602
    assert error["message"].startswith(f"Invalid parameters: bdev_malloc_create: {message}")
    assert (await peer.ask("bdev_get_bdevs"))["result"] == []


async def test_a_parameter_named_twice_is_refused(peer: Peer) -> None:
    peer.writer.write(b'{"id":1,"method":"bdev_get_bdevs","params":{"name":"a","name":"b"}}')
    assert (await peer.answer())["error"] == {
        "code": -32602,
        "message": "Invalid parameters: bdev_get_bdevs: parameter 'name' is given twice",
    }


async def test_parameters_of_a_method_that_takes_none_are_refused(peer: Peer) -> None:
    assert (await peer.ask("spdk_get_version", {"x": 1}))["error"]["code"] == -32602
    assert "result" in await peer.ask("spdk_get_version", {})


async def test_a_defect_in_a_method_is_an_internal_error_and_the_server_goes_on(stack: Any, socket_path: str) -> None:
    registry = Registry()

    @method("broken", registry=registry)
    async def broken(stack: Any, params: None) -> None:
        raise ZeroDivisionError("a defect")

    async with RpcServer(stack, socket_path, registry=registry):
        peer = await Peer.connect(socket_path)
        for _ in range(2):
            assert (await peer.ask("broken"))["error"] == {
                "code": -32603,
                "message": "Internal error",
                "data": "ZeroDivisionError: a defect",
            }
        await peer.close()


async def test_garbage_is_answered_after_what_came_before_it_and_ends_the_connection(peer: Peer) -> None:
    peer.writer.write(b'{"id":1,"method":"framework_wait_init"} GET / HTTP/1.1\r\n')
    assert (await peer.answer())["result"] is True
    assert (await peer.answer())["error"] == {
        "code": -32700,
        "message": "Parse error: no JSON object or array begins with byte 0x47",
    }
    assert await peer.answer() is None


async def test_a_stream_that_ends_inside_a_request_is_a_parse_error(peer: Peer) -> None:
    peer.writer.write(b'{"id":1,')
    peer.writer.write_eof()
    assert (await peer.answer())["error"] == {"code": -32700, "message": "Parse error: the stream ended inside a request"}


async def test_a_peer_that_only_closes_its_sending_side_gets_its_answers(peer: Peer) -> None:
    await peer.send({"id": 1, "method": "framework_wait_init"}, {"id": 2, "method": "framework_wait_init"})
    peer.writer.write_eof()
    assert [(await peer.answer())["id"], (await peer.answer())["id"]] == [1, 2]
    assert await peer.answer() is None


async def test_a_request_of_100_mb_is_refused_by_name_and_holds_no_memory(server: RpcServer, socket_path: str) -> None:
    peer = await Peer.connect(socket_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peer.writer.write(b'{"id":1,"method":"bdev_get_bdevs","params":{"name":"')
    chunk = b"x" * (1 << 20)
    for _ in range(100):
        peer.writer.write(chunk)
        await peer.writer.drain()
    assert (await peer.answer())["error"] == {"code": -32600, "message": "Invalid request: longer than 1048576 bytes"}
    assert server.held_bytes == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10, "kibibytes"
    await peer.close()


async def test_unfinished_requests_together_are_bounded(server: RpcServer, socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELD_BYTES_MAX", 1 << 20)
    peers = [await Peer.connect(socket_path) for _ in range(3)]
    for peer in peers:
        peer.writer.write(b'{"id":"' + b"x" * 400_000)
        await peer.writer.drain()
    answers = await asyncio.gather(*(asyncio.wait_for(peer.reader.readline(), 0.5) for peer in peers), return_exceptions=True)
    refused = [json.loads(answer) for answer in answers if isinstance(answer, bytes)]
    assert [answer["error"]["code"] for answer in refused] == [-12]
    assert server.held_bytes <= 1 << 20
    for peer in peers:
        await peer.close()


async def test_thousands_of_connections_are_bounded_and_leave_nothing(stack: Any, socket_path: str) -> None:
    async with RpcServer(stack, socket_path, connections_max=64) as server:
        descriptors = len(os.listdir("/proc/self/fd"))
        refused = 0
        for _ in range(10):
            peers = [await Peer.connect(socket_path) for _ in range(200)]
            for peer in peers:
                try:
                    error = (await peer.ask("framework_wait_init")).get("error")
                except ConnectionError:
                    error = {"code": -24}
                if error is not None:
                    assert error["code"] == -24
                    refused += 1
            assert len(server.connections) == 64
            for peer in peers:
                peer.writer.close()
            assert await settles(lambda: not server.connections)
        assert refused == 10 * 136
        assert server.refused_connections == 10 * 136
        peer = await Peer.connect(socket_path)
        assert (await peer.ask("framework_wait_init"))["result"] is True
        await peer.close()
        await asyncio.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert server.held_bytes == 0


async def test_a_peer_that_reads_no_answers_is_disconnected(
    server: RpcServer, socket_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "UNREAD_S_MAX", 0.3)
    reader, writer = await asyncio.open_unix_connection(socket_path, limit=1024)
    request = json.dumps({"id": 1, "method": "rpc_get_methods"}).encode()
    writer.transport.set_write_buffer_limits(high=1 << 30)
    writer.write(request * 5000)
    assert await settles(lambda: bool(server.connections))
    assert await settles(lambda: not server.connections)
    assert server.held_bytes == 0
    assert "read no replies" in caplog.text
    writer.transport.abort()
    del reader


async def test_an_accepted_request_is_carried_out_though_its_sender_leaves(server: RpcServer, socket_path: str, stack: Any) -> None:
    peer = await Peer.connect(socket_path)
    await peer.send({"id": 1, "method": "bdev_null_create", "params": {"name": "n", "block_size": 512, "num_blocks": 8}})
    await peer.close()
    assert (await stack.bdevs.wait_for("n", 5000)).name == "n"


async def test_the_socket_is_private_and_goes_with_the_server(stack: Any, socket_path: str) -> None:
    async with RpcServer(stack, socket_path):
        assert stat.S_IMODE(os.stat(socket_path).st_mode) == 0o600
    assert not os.path.exists(socket_path)
    assert not os.path.exists(socket_path + ".lock")


async def test_a_second_server_on_the_same_path_is_refused_and_a_stale_socket_replaced(stack: Any, socket_path: str) -> None:
    async with RpcServer(stack, socket_path):
        with pytest.raises(Busy, match="is served by another process"):
            await RpcServer(stack, socket_path).start()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(socket_path)
    async with RpcServer(stack, socket_path):
        peer = await Peer.connect(socket_path)
        assert "result" in await peer.ask("spdk_get_version")
        await peer.close()


async def test_the_socket_is_private_from_its_first_instant(stack: Any, socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            modes.append(stat.S_IMODE(os.stat(address).st_mode))

    monkeypatch.setattr(server_module.socket, "socket", Watched)
    mask = os.umask(0)
    try:
        async with RpcServer(stack, socket_path):
            assert modes == [0o600]
            assert stat.S_IMODE(os.stat(socket_path + ".lock").st_mode) == 0o600
    finally:
        assert os.umask(mask) == 0, "the process's own mask is as it was"


async def test_a_second_instance_is_told_which_process_serves(stack: Any, socket_path: str) -> None:
    async with RpcServer(stack, socket_path):
        with pytest.raises(Busy) as refused:
            await RpcServer(stack, socket_path).start()
        assert (
            str(refused.value)
            == f"RPC socket {socket_path} is served by another process; name another with -r (process {os.getpid()} has its lock)"
        )


async def test_a_socket_that_answers_without_a_lock_file_is_not_taken_away(stack: Any, socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(socket_path)
        other.listen(1)
        with pytest.raises(Busy, match="is served by another process"):
            await RpcServer(stack, socket_path).start()
        assert os.path.exists(socket_path)
        assert not os.path.exists(socket_path + ".lock")


async def test_a_lock_file_that_its_owner_removes_meanwhile_is_no_lock(
    stack: Any, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened, then removed by the server that stops, then locked: a lock on a file that no longer has the name would let two serve."""
    real = server_module.fcntl.flock
    removed = []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            os.unlink(socket_path + ".lock")
            removed.append(True)
        real(descriptor, operation)

    monkeypatch.setattr(server_module.fcntl, "flock", flock)
    async with RpcServer(stack, socket_path):
        assert removed
        with pytest.raises(Busy):
            await RpcServer(stack, socket_path).start()


async def test_a_lock_file_that_is_a_link_is_not_followed(stack: Any, socket_path: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    os.symlink(tmp_path / "precious", socket_path + ".lock")
    with pytest.raises(QpairError, match=r"its lock .*rpc.sock.lock: Too many levels of symbolic links"):
        await RpcServer(stack, socket_path).start()
    assert (tmp_path / "precious").read_text() == "kept"


async def test_who_connects_is_logged_by_the_kernels_word(server: RpcServer, socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="qpair.rpc")
    peer = await Peer.connect(socket_path)
    await peer.ask("spdk_get_version")
    assert f"connection from pid {os.getpid()} uid {os.getuid()} gid {os.getgid()}" in caplog.text
    await peer.close()


async def test_a_plain_file_in_the_way_is_left_alone(stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(Busy, match="that is no socket"):
        await RpcServer(stack, str(path)).start()
    assert path.read_text() == "data"


async def test_it_answers_on_tcp_too(stack: Any) -> None:
    async with RpcServer(stack, "127.0.0.1:0") as server:
        host, _, port = server.bound.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b'{"id":1,"method":"framework_wait_init"}')
        assert json.loads(await reader.readline())["result"] is True
        writer.close()


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("/var/tmp/spdk.sock", "/var/tmp/spdk.sock"),
        ("spdk.sock", "spdk.sock"),
        ("127.0.0.1", ("127.0.0.1", 5260)),
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(text: str, meaning: Any) -> None:
    assert parse_address(text) == meaning


@pytest.mark.parametrize("text", ["host:99999", "host:x", ":80", "/" + "x" * 108])
def test_addresses_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_address(text)
