"""``qpair trace``, and ``qpair serve -e``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from qpair.rpc.client import RpcClient


@contextlib.asynccontextmanager
async def following(command: list[str], path: str) -> AsyncIterator[Any]:
    """``qpair trace``, once its points are on; and how to end it: what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, "trace", "-r", path, "-t", "600", "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )

    async def end() -> Any:
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, err) == (0, b"")
        return json.loads(out)

    with RpcClient(path) as rpc:
        for _ in range(400):
            if rpc.call("trace_get_info")["bdev"]["tpoint_mask"] == "0x33":
                break
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        try:
            yield end
            assert rpc.call("trace_get_info")["bdev"]["tpoint_mask"] == "0x0", "off again"
        finally:
            if process.returncode is None:
                process.kill()


async def test_each_bdev_of_a_tower_is_a_row(serve: Any, client: Any, qpair_command: list[str], socket_path: str) -> None:
    server = await serve()
    await server.ready()
    with RpcClient(socket_path) as rpc:
        rpc.call("bdev_malloc_create", name="m0", num_blocks=256, block_size=512)
        rpc.call("bdev_passthru_create", name="p0", base_bdev_name="m0")
        rpc.call("bdev_wait_for_examine")
    async with following(qpair_command, socket_path) as end:
        code, _, err = await client(*qpair_command, "dd", "-r", socket_path, "--ib", "p0", "--of", "/dev/null", "--bs", "4k", "--notrunc")
        assert code == 0, err
        told = await end()
    rows = {(layer["bdev"], layer["op"]): layer for layer in told["layers"]}
    assert rows["m0", "read"]["ios"] == rows["p0", "read"]["ios"] >= 32
    for layer in rows.values():
        assert layer["errors"] == 0
        assert 0 <= layer["p50_ns"] <= layer["p99_ns"]
    assert told["records"] > told["lost"] == 0


async def test_a_table_by_default_and_bdevs_by_name(serve: Any, client: Any, qpair_command: list[str], socket_path: str) -> None:
    server = await serve("-e", "bdev:0x3")
    await server.ready()
    with RpcClient(socket_path) as rpc:
        rpc.call("bdev_null_create", name="n0", num_blocks=8192, block_size=512)
        rpc.call("bdev_wait_for_examine")
        assert rpc.call("trace_get_info")["bdev"]["tpoint_mask"] == "0x3"
    command = (*qpair_command, "trace", "-r", socket_path, "-t", "0.05")
    assert await client(*command) == (0, "", "no I/O was seen\n")
    code, out, err = await client(*command, "n1")
    assert (code, out) == (1, "")
    assert "bdevs there: n0" in err
    with RpcClient(socket_path) as rpc:
        assert rpc.call("trace_get_info")["bdev"]["tpoint_mask"] == "0x3", "what was on before stays so"
    code, err = await server.end()
    assert code == 0
    assert "no effect" not in err


async def test_interrupted_it_turns_points_off_and_shows_what_it_saw(serve: Any, qpair_command: list[str], socket_path: str) -> None:
    server = await serve()
    await server.ready()
    async with following(qpair_command, socket_path) as end:
        assert (await end())["layers"] == []


@pytest.mark.parametrize(
    ("groups", "why"),
    [("nothing", "no trace group is named 'nothing'; there are: bdev, all"), ("bdev:NEVER", "no trace point is named 'NEVER'")],
)
async def test_serve_refuses_a_group_that_nobody_has(serve: Any, groups: str, why: str) -> None:
    server = await serve("-e", groups)
    code, err = await server.end(None)
    assert code == 2
    assert why in err


async def test_groups_of_spdks_that_are_not_here_have_no_effect(serve: Any, socket_path: str) -> None:
    server = await serve("-e", "nvmf_tcp,0x8:0x3")
    await server.ready()
    with RpcClient(socket_path) as rpc:
        assert rpc.call("trace_get_info")["bdev"]["tpoint_mask"] == "0x3"
    _, err = await server.end()
    assert "-e nvmf_tcp is accepted and has no effect here" in err
