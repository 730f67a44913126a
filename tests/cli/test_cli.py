"""The ``qpair`` command as a process: what it prints, where, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qpair.cli.rpc import parse_params
from qpair.cli.serve import _options, parser
from qpair.errors import InvalidArgument

CORE = str(min(os.sched_getaffinity(0)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_says_where_it_listens_is_ready_and_stops_cleanly(serve: Any, socket_path: str, number: int, tmp_path: Path) -> None:
    server = await serve("-f", str(tmp_path / "pid"))
    first = await server.line()
    assert first.startswith("qpair 0.1.0: ")
    assert f"reactors on cores {CORE}; RPC on {socket_path}; vhost sockets in {tmp_path}" in first
    assert await server.line() == "ready"
    assert int((tmp_path / "pid").read_text()) == server.process.pid
    code, err = await server.end(number)
    assert code == 0, err
    assert not os.path.exists(socket_path)
    assert not (tmp_path / "pid").exists()


async def test_spdks_flags_are_accepted_and_those_without_effect_named(serve: Any) -> None:
    server = await serve("-s", "1024", "-u", "--no-huge", "--no-pci", "-L", "nvmf", "-e", "thread", "--main-core", "0")
    await server.line()
    assert await server.line() == "ready"
    code, err = await server.end()
    assert code == 0
    for flag in ("--mem-size", "--no-pci", "--no-huge", "-e thread", "-L nvmf", "--main-core"):
        assert f"{flag} is accepted and has no effect here" in err


async def test_rpc_talks_to_serve_and_kill_instance_ends_it(serve: Any, client: Any, qpair_command: list[str], socket_path: str) -> None:
    server = await serve()
    assert await server.line()
    assert await server.line() == "ready"

    async def rpc(*arguments: str) -> tuple[int, str, str]:
        answer: tuple[int, str, str] = await client(*qpair_command, "rpc", "-r", socket_path, *arguments)
        return answer

    assert await rpc("bdev_malloc_create", "--num-blocks", "8192", "--block-size=512", "--name", "7") == (0, "7\n", "")
    code, out, _ = await rpc("bdev_get_bdevs", "--json", '{"name": "7"}')
    assert code == 0
    assert json.loads(out)[0]["num_blocks"] == 8192
    code, out, err = await rpc("bdev_malloc_create", "--num-blocks", "x", "--block-size", "512")
    assert (code, out) == (1, "")
    assert "parameter 'num_blocks': Expected `int`, got `str`" in err
    assert "\n  its parameters: qpair rpc bdev_malloc_create --help\n" in err
    code, _, err = await rpc("bdev_get_bdevs", "--name", "nothing")
    assert (code, err) == (
        1,
        f"qpair rpc: bdev_get_bdevs: No such device: no bdev is named 'nothing' (code -19)\n  bdevs there: 7; all of them: qpair ls -r {socket_path}\n",
    )
    code, _, err = await rpc("no_such_method")
    assert code == 1
    assert err.endswith(f"\n  all methods: qpair rpc -r {socket_path} rpc_get_methods\n")
    assert (await rpc("spdk_kill_instance", "--sig-name", "SIGTERM"))[0] == 0
    assert (await server.end(None))[0] == 0


async def test_serve_waits_for_framework_start_init(serve: Any, client: Any, qpair_command: list[str], socket_path: str) -> None:
    server = await serve("--wait-for-rpc")
    assert "waiting for framework_start_init" in await server.line()
    assert (await client(*qpair_command, "rpc", "-r", socket_path, "framework_start_init"))[0] == 0
    assert "RPC on" in await server.line()
    assert await server.line() == "ready"
    assert (await server.end())[0] == 0


async def test_a_waiting_serve_stops_too(serve: Any) -> None:
    server = await serve("--wait-for-rpc")
    assert "waiting" in await server.line()
    assert (await server.end())[0] == 0


async def test_a_configuration_is_loaded_before_ready(
    serve: Any, client: Any, qpair_command: list[str], socket_path: str, tmp_path: Path
) -> None:
    config = tmp_path / "c.json"
    call = {"method": "bdev_null_create", "params": {"name": "n0", "num_blocks": 8, "block_size": 512}}
    config.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": [call]}]}))
    server = await serve("-c", str(config))
    await server.line()
    assert await server.line() == "ready"
    _code, out, _ = await client(*qpair_command, "rpc", "-r", socket_path, "bdev_get_bdevs")
    assert [disk["name"] for disk in json.loads(out)] == ["n0"]
    assert (await server.end())[0] == 0


async def test_what_cannot_start_says_why_and_exits_with_1(serve: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"subsystems": [{"subsystem": "bdev", "config": [{"method": "bdev_null_create", "params": {"name": 5}}]}]}')
    for flags, reason in (
        (
            ("-c", str(bad)),
            "subsystem 'bdev', entry 1, method 'bdev_null_create': bdev_null_create: missing parameter 'block_size', 'num_blocks'",
        ),
        (("-c", str(tmp_path / "none.json")), "none.json: no such file"),
        (("-m", "0x0"), "core mask '0x0' names no core"),
        (("-m", "[1023]"), "core 1023 is not usable by this process"),
    ):
        server = await serve(*flags)
        _, err = await asyncio.wait_for(server.process.communicate(), 20)
        assert server.process.returncode == 1, err
        assert reason in err.decode()


async def test_a_second_server_on_the_same_socket_is_refused(serve: Any) -> None:
    first = await serve()
    await first.line()
    second = await serve()
    _, err = await asyncio.wait_for(second.process.communicate(), 20)
    assert second.process.returncode == 1
    assert f"is served by another process; name another with -r (process {first.process.pid} has its lock)" in err.decode()
    assert (await first.end())[0] == 0


async def test_rpc_without_a_server_says_how_to_start_one(client: Any, qpair_command: list[str], socket_path: str) -> None:
    code, _, err = await client(*qpair_command, "rpc", "-r", socket_path, "bdev_get_bdevs")
    assert code == 3
    assert err == (
        f"qpair rpc: no server answers on {socket_path}: there is no such socket\n"
        f"  start one: qpair serve -r {socket_path}\n  or name the socket of one that runs: -r PATH\n"
    )


def test_serve_and_rpc_import_nothing_heavy(qpair_command: list[str]) -> None:
    program = (
        "import sys, qpair.cli.serve, qpair.cli.rpc, qpair.app.rooms as rooms; rooms.load_rpc(); import qpair; qpair.Stack();"
        "print([name for name in ('typer', 'click', 'rich', 'hypothesis', 'tempfile', 'email', 'http') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


async def test_perf_measures_and_prints_json(client: Any, qpair_command: list[str]) -> None:
    code, out, err = await client(*qpair_command, "perf", "null:1GiB", "--ios", "2000", "--depth", "16", "--cores", CORE, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["target"] == "null:1GiB"
    assert result["ios"] >= 2000
    assert result["errors"] == 0
    assert {"iops", "mb_per_s", "mean_ns", "p50_ns", "p99_ns", "p99_9_ns", "p99_99_ns"} <= set(result)


async def test_perf_prints_a_table(client: Any, qpair_command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(1 << 20))
    for target in ("malloc:16MiB", f"file:{file}"):
        code, out, err = await client(*qpair_command, "perf", target, "--ios", "100", "--cores", CORE)
        assert code == 0, err
        for title in ("IOPS", "MB/s", "mean", "p50", "p99", "p99.9", "p99.99"):
            assert title in out


async def test_perf_shows_progress_on_a_terminal(qpair_command: list[str]) -> None:
    terminal, end = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *qpair_command, "perf", "null:1GiB", "--time", "1", "--cores", CORE,
        stdout=asyncio.subprocess.PIPE, stderr=end, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(end)
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert process.returncode == 0
    assert "randread 4KiB depth 128" in shown
    assert "IOPS" in shown
    assert "p99.99" in out.decode()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("malloc:lots",), "size 'lots' is not a size: write 4096, '64MiB' or '10GB'"),
        (
            ("tape:0",),
            "'tape' is no kind of target; write malloc:512MiB, null:1TiB, file:PATH, python:module:Class, vhost:SOCKET or bdev:NAME",
        ),
        (("disk0",), "target 'disk0': write malloc:512MiB"),
        (("null:1GiB", "--pattern", "sideways"), "pattern 'sideways' is none of"),
        (("python:nothing_here:Class",), "it must name a class that is made without arguments"),
    ],
)
async def test_perf_refuses_by_name(client: Any, qpair_command: list[str], arguments: tuple[str, ...], reason: str) -> None:
    code, _, err = await client(*qpair_command, "perf", *arguments, "--ios", "1", "--cores", CORE)
    assert code == 1
    assert reason in err


async def test_help_lists_the_commands_and_wrong_usage_exits_with_2(client: Any, qpair_command: list[str]) -> None:
    code, out, _ = await client(*qpair_command, "--help")
    assert code == 0
    for command in ("serve", "rpc", "perf", "version"):
        assert command in out
    assert (await client(*qpair_command, "sideways"))[0] == 2
    assert (await client(*qpair_command, "serve", "--sideways"))[0] == 2
    assert (await client(*qpair_command, "rpc"))[0] == 2
    code, out, _ = await client(*qpair_command, "rpc", "bdev_null_resize", "--help")
    assert code == 0
    assert "--new-size" in out


def test_parameters_are_read_as_the_method_declares_them() -> None:
    assert parse_params("bdev_null_create", ["--name", "0x1", "--num-blocks=8", "--block-size", "512"]) == {
        "name": "0x1",
        "num_blocks": 8,
        "block_size": 512,
    }
    assert parse_params("bdev_aio_create", ["--readonly", "--no-fallocate", "--name=1"]) == {
        "readonly": True,
        "fallocate": False,
        "name": "1",
    }
    assert parse_params("unknown_to_us", ["--list", "[1,2]", "--text", "plain"]) == {"list": [1, 2], "text": "plain"}
    assert parse_params("bdev_get_iostat", ["--json", '{"names": ["a"]}']) == {"names": ["a"]}
    with pytest.raises(InvalidArgument, match="parameter 'name' is given twice"):
        parse_params("bdev_get_bdevs", ["--name", "a", "--name", "b"])
    with pytest.raises(InvalidArgument, match="write parameters as --name value"):
        parse_params("bdev_get_bdevs", ["disk0"])
    with pytest.raises(InvalidArgument, match="--json: it must be an object"):
        parse_params("bdev_get_bdevs", ["--json", "[]"])


def test_a_list_of_cores_without_brackets_is_taken_from_lcores() -> None:
    assert _options(parser().parse_args(["--lcores", "0,2"])).mask == "[0,2]"
    assert _options(parser().parse_args(["-m", "0x3"])).mask == "0x3"
    assert _options(parser().parse_args([])).mask is None, "0x1, or what the process has whose place is taken"
