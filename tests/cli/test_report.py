"""Errors say what to do next, as text and as JSON; help fits 80 columns; starting is quick because little is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import CORE, Shell
from qpair.cli.report import explain, near
from qpair.errors import NoSuchBdev
from qpair.rpc.client import Unreachable

COMMANDS = ("serve", "rpc", "ls", "dd", "perf", "version")


async def test_an_unknown_method_is_compared_with_those_of_the_server(shell: Shell) -> None:
    code, out, err = await shell("rpc", "bdev_malloc_creat", "--name", "x")
    assert (code, out) == (1, "")
    assert err.splitlines()[1:] == [
        "  did you mean bdev_malloc_create or bdev_malloc_delete?",
        f"  all methods: qpair rpc -r {shell.path} rpc_get_methods",
    ] or err.splitlines()[1].startswith("  did you mean bdev_malloc_create")
    code, out, err = await shell("rpc", "--json", "xyzzy")
    assert (code, err) == (1, "")
    told = json.loads(out)["error"]
    assert (told["code"], told["hints"]) == (-32601, [f"all methods: qpair rpc -r {shell.path} rpc_get_methods"])


async def test_a_method_of_another_state_is_told_from_an_unknown_one(
    serve: Any, client: Any, qpair_command: list[str], socket_path: str
) -> None:
    server = await serve("--wait-for-rpc")
    await server.line()
    code, _, err = await client(*qpair_command, "rpc", "-r", socket_path, "bdev_get_bdevs")
    assert code == 1
    assert err.endswith(f"\n  end its start-up phase: qpair rpc -r {socket_path} framework_start_init\n")


async def test_what_exists_or_is_in_use_is_said_once_and_where_to_look(shell: Shell) -> None:
    await shell.rpc("bdev_null_create", name="n0", num_blocks=8, block_size=512)
    code, out, err = await shell("rpc", "bdev_null_create", "--name", "n0", "--num-blocks", "8", "--block-size", "512")
    assert (code, out) == (1, "")
    assert err == f"qpair rpc: bdev_null_create: File exists: bdev n0 (code -17)\n  what there is: qpair ls -r {shell.path}\n"
    await shell.rpc("bdev_passthru_create", name="p0", base_bdev_name="n0")
    code, _, err = await shell("rpc", "bdev_passthru_create", "--name", "p1", "--base-bdev-name", "n0")
    assert code == 1
    assert "claimed by passthru" in err
    assert err.endswith(f"(code -16)\n  who uses it: qpair ls -r {shell.path}\n")


async def test_qpair_alone_prints_its_help(client: Any, qpair_command: list[str]) -> None:
    code, out, err = await client(*qpair_command)
    assert (code, err) == (2, "")
    assert out.startswith("Usage: qpair ")


async def test_rpc_prints_json_alone_where_asked(shell: Shell) -> None:
    assert (await shell("rpc", "bdev_malloc_create", "--name", "a", "--num-blocks", "8", "--block-size", "512"))[1] == "a\n"
    code, out, _ = await shell("rpc", "--json", "bdev_malloc_create", "--name", "b", "--num-blocks", "8", "--block-size", "512")
    assert (code, json.loads(out)) == (0, "b")
    code, out, err = await shell("rpc", "--json", "bdev_malloc_create", "--name", "c")
    assert (code, err) == (1, "")
    assert json.loads(out)["error"]["code"] == -32602
    assert json.loads(out)["error"]["hints"] == ["its parameters: qpair rpc bdev_malloc_create --help"]


async def test_the_bdev_of_a_perf_target_is_the_servers(shell: Shell) -> None:
    await shell.rpc("bdev_malloc_create", name="disk0", num_blocks=8192, block_size=512)
    code, out, err = await shell("perf", "bdev:disk0", "--ios", "200", "--cores", CORE, "--json")
    assert code == 0, err + out
    assert json.loads(out)["ios"] >= 200
    assert await shell.rpc("vhost_get_controllers") == []
    code, out, err = await shell("perf", "bdev:disk1", "--ios", "200", "--cores", CORE)
    assert (code, err) == (1, "qpair perf: No such device: no bdev is named 'disk1'\n  did you mean disk0?\n")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("perf", "null:1GiB", "--depth", "0"), 2, "'--depth'"),
        (("perf", "tape:1"), 1, "'tape' is no kind of target"),
        (("perf", "null:1GiB", "--plot", "x.jpg"), 1, ".jpg is none of .svg, .png, .pdf"),
        (("perf", "bdev:x", "-r", "/nowhere/x.sock"), 3, "no server answers on /nowhere/x.sock: there is no such socket"),
        (("dd", "--if", "x"), 2, "one output, please"),
        (("dd", "--ib", "x", "--of", "y", "-r", "/nowhere/x.sock"), 3, "no server answers on /nowhere/x.sock"),
        (("ls", "--interval", "-1"), 2, "'--interval'"),
        (("ls", "-r", "/nowhere/x.sock"), 3, "no server answers on /nowhere/x.sock"),
        (("ls", "--sideways"), 2, "--sideways"),
        (("lss",), 2, "'lss'"),
        (("rpc", "-r", "/nowhere/x.sock", "--json", "spdk_get_version"), 3, "no server answers on /nowhere/x.sock"),
        (("rpc", "--json", "-t", "soon", "x"), 2, "'soon' is no number of seconds"),
        (("rpc", "--json", "bdev_null_creat", "--help"), 1, "bdev_null_creat is not declared here"),
    ],
)
async def test_every_error_is_one_json_document_where_asked(
    client: Any, qpair_command: list[str], tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    as_json = () if arguments[0] == "rpc" else ("--json",)
    found, out, err = await client(*qpair_command, *arguments, *as_json)
    assert (found, err) == (code, "")
    error = json.loads(out)["error"]
    assert set(error) == {"code", "message", "hints"}
    assert told in error["message"]
    if not as_json:
        return
    found, out, err = await client(*qpair_command, *arguments)
    assert (found, out) == (code, "")
    assert told in err
    assert err.startswith("qpair")


async def test_what_prints_json_says_the_same_of_success(client: Any, qpair_command: list[str]) -> None:
    code, out, _ = await client(*qpair_command, "version", "--json")
    assert (code, list(json.loads(out))) == (0, ["version"])
    code, out, _ = await client(*qpair_command, "rpc", "--json", "bdev_null_resize", "--help")
    assert code == 0
    assert json.loads(out)["params"] == [
        {"name": "name", "type": "string", "required": True},
        {"name": "new_size", "type": "uint64", "required": True},
    ]


def test_a_socket_that_may_not_be_used_names_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    path.touch(mode=0o600)
    told = explain(Unreachable("no", errno=13), address=str(path))
    assert told.exit_code == 3
    owner = __import__("pwd").getpwuid(os.getuid()).pw_name
    assert told.message.startswith(f"permission denied on {path}, which is {owner}'s (group ")
    assert told.message.endswith("mode 0600)")
    assert told.hints == ["run this as that user, or as root; or start a server of your own: qpair serve -r PATH"]
    told = explain(Unreachable("no", errno=13), address="/nowhere/rpc.sock")
    assert told.message == "permission denied on /nowhere/rpc.sock, which is in a directory that you may not enter"


def test_a_server_that_has_gone_is_told_from_one_that_never_was(tmp_path: Path) -> None:
    for number, why in ((2, "there is no such socket"), (111, "its server has gone"), (88, "that is no socket")):
        assert explain(Unreachable("no", errno=number), address="/x/y").message == f"no server answers on /x/y: {why}"
    assert explain(NoSuchBdev("gone"), address="/x/y").hints == []


def test_near_names() -> None:
    assert near("dsk0", ["disk1", "disk0", "other"]) == ["disk0", "disk1"]
    assert near("DISK0", ["disk0"]) == ["disk0"]
    assert near("bdev_get_bdev", ["bdev_get_bdevs", "bdev_get_iostat", "bdev_uring_delete"]) == ["bdev_get_bdevs"]
    assert near("quite-else", ["disk0"]) == []
    assert near("null", ["my-null-disk", "m0"]) == ["my-null-disk"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command: str, qpair_command: list[str]) -> None:
    done = subprocess.run(
        [*qpair_command, *command.split(), "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"COLUMNS": "80", "TERM": "dumb"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert "\x1b" not in done.stdout
    if not command:
        assert [name for name in COMMANDS if f"\n  {name} " not in done.stdout] == []
    elif command != "version":
        assert "xample" in done.stdout, "each command shows how it is used"


@pytest.mark.parametrize(
    ("arguments", "kept_out"),
    [
        (["--help"], {"rich", "asyncio", "matplotlib", "numpy", "qpair._engine", "qpair.app.stack", "hypothesis"}),
        (["rpc"], {"typer", "rich", "asyncio", "matplotlib", "qpair._engine", "qpair.app.stack", "difflib"}),
        (["version"], {"rich", "asyncio", "matplotlib", "qpair._engine", "qpair.app.stack"}),
    ],
)
def test_what_starts_imports_little(arguments: list[str], kept_out: set[str]) -> None:
    """A timing would say more about the machine; what is imported says why it is quick."""
    program = f"import sys; from qpair.cli import main; main({arguments!r}); print([*sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    loaded = set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))
    assert "qpair.cli" in loaded
    assert loaded & kept_out == set()
