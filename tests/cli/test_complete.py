"""Shell completion, asked as the shells ask, and in a real bash."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Shell, Terminal
from qpair.cli.complete import join_colons


async def completed(qpair_command: list[str], *words: str, cwd: Path | None = None) -> list[str]:
    """What bash is offered for the last of ``words``; nothing else is printed."""
    line = ("qpair", *words)
    process = await asyncio.create_subprocess_exec(
        *qpair_command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=cwd,
        env=os.environ | {"_QPAIR_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(line), "COMP_CWORD": str(len(line) - 1)},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, err) == (0, b"")
    return out.decode().split()


async def test_names_come_from_the_running_server(shell: Shell, qpair_command: list[str]) -> None:
    for name in ("disk0", "disk1", "other"):
        await shell.rpc("bdev_null_create", name=name, num_blocks=8, block_size=512)
    server = ("-r", shell.path)
    assert await completed(qpair_command, "ls", *server, "di") == ["disk0", "disk1"]
    assert await completed(qpair_command, "dd", *server, "--ib", "o") == ["other"]
    assert await completed(qpair_command, "perf", *server, "bdev:d") == ["bdev:disk0", "bdev:disk1"]
    assert await completed(qpair_command, "rpc", *server, "bdev_null_delete", "--name", "") == ["disk0", "disk1", "other"]
    assert await completed(qpair_command, "rpc", *server, "bdev_null_") == ["bdev_null_create", "bdev_null_delete", "bdev_null_resize"]


async def test_without_a_server_it_is_quick_silent_and_knows_what_is_declared(qpair_command: list[str], socket_path: str) -> None:
    server = ("-r", socket_path)
    assert await completed(qpair_command, "ls", *server, "d") == []
    assert await completed(qpair_command, "perf", *server, "bdev:") == []
    assert await completed(qpair_command, "rpc", *server, "vhost_get") == ["vhost_get_controllers"]
    assert await completed(qpair_command, "rpc", *server, "bdev_null_resize", "--") == ["--name", "--new-size"]
    assert await completed(qpair_command, "rpc", *server, "bdev_null_resize", "--new-size", "8", "--n") == ["--name"]


async def test_a_server_that_hangs_does_not_hang_the_shell(qpair_command: list[str], socket_path: str) -> None:
    hanging = await asyncio.start_unix_server(lambda reader, writer: asyncio.sleep(60), socket_path)
    try:
        assert await asyncio.wait_for(completed(qpair_command, "ls", "-r", socket_path, "d"), 10) == []
        assert await asyncio.wait_for(completed(qpair_command, "rpc", "-r", socket_path, "spdk_get"), 10) == ["spdk_get_version"]
    finally:
        hanging.close()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("",), {"serve", "rpc", "ls", "dd", "perf", "version"}),
        (("serve", "--driv"), {"--driver"}),
        (("serve", "--driver", ""), {"auto", "io_uring", "epoll"}),
        (("perf", "null:1GiB", "-w", "randr"), {"randread", "randrw"}),
        (("perf", "mal"), {"malloc:"}),
        (("ls", "--w"), {"--watch"}),
        (("rpc", "--js"), {"--json"}),
    ],
)  # fmt: skip
async def test_commands_options_and_their_values(qpair_command: list[str], words: tuple[str, ...], offered: set[str]) -> None:
    assert set(await completed(qpair_command, *words)) >= offered


async def test_paths_and_sockets(qpair_command: list[str], tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "images").mkdir()
    assert await completed(qpair_command, "dd", "--if", "images", cwd=tmp_path) == ["images/"]
    assert os.path.basename(shell.path) in await completed(qpair_command, "ls", "-r", "", cwd=tmp_path)
    assert await completed(qpair_command, "perf", "file:images", cwd=tmp_path) == ["file:images/"]


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["qpair", "perf", "bdev", ":", "di"], ["qpair", "perf", "bdev:di"]),
        (["qpair", "perf", "bdev", ":"], ["qpair", "perf", "bdev:"]),
        (["qpair", "perf", "python", ":", "a", ":", "B"], ["qpair", "perf", "python:a:B"]),
        (["qpair", "perf", "null:1GiB", "-w", ""], ["qpair", "perf", "null:1GiB", "-w", ""]),
        (["qpair", "ls", ""], ["qpair", "ls", ""]),
    ],
)
def test_words_that_bash_cut_at_colons_are_joined(words: list[str], joined: list[str]) -> None:
    environ = {"_QPAIR_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    kept = join_colons(environ)
    assert kept == (joined[-1].rpartition(":")[0] + ":" if len(joined) < len(words) else "")
    assert environ["COMP_WORDS"].split("\n") == joined
    assert environ["COMP_CWORD"] == str(len(joined) - 1)


async def test_in_a_real_bash(shell: Shell, qpair_command: list[str], tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    await shell.rpc("bdev_null_create", name="disk-seven", num_blocks=8, block_size=512)
    program = tmp_path / "qpair"
    program.write_text("#!/bin/sh\nexec " + " ".join(qpair_command) + ' "$@"\n')
    program.chmod(0o755)

    def typed() -> str:
        environment: dict[str, Any] = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PS1": "$ "}
        terminal = Terminal("bash", "--norc", "--noprofile", "-i", columns=200, env=environment)
        terminal.until(r"\$ ")
        for line, shown in (
            ('eval "$(qpair --show-completion bash)"; echo loa""ded\n', "loaded"),
            (f"qpair perf -r {shell.path} bdev:disk\t", "bdev:disk-seven"),
            (f"\x15qpair ls -r {shell.path} disk\t", "ls -r [^ ]* disk-seven"),
            (f"\x15qpair rpc -r {shell.path} bdev_null_del\t", "bdev_null_delete"),
            ("\x15exit\n", "exit"),
        ):
            os.write(terminal._fd, line.encode())
            terminal.until(shown)
        terminal.end()
        return terminal.shown

    assert "Traceback" not in await asyncio.wait_for(asyncio.to_thread(typed), 60)
