"""SPDK's spdk-cli, unmodified, on every path of its tree that our rooms have: what it makes, lists, shows, changes and deletes is there, shown, changed and gone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from missing import missing

Cli = Callable[..., Awaitable[str]]


@pytest.fixture
def cli(client: Any, server: Any, socket_path: str) -> Cli:
    """Runs one command, which must succeed, or with ``refused`` must not; what it printed."""
    program = shutil.which("spdk-cli", path=str(Path(sys.executable).parent))
    if program is None:
        missing("spdk-cli", "pip install spdk")

    async def run(*words: str, address: str = socket_path, refused: bool = False) -> str:
        code, out, err = await client(program, "-s", address, *words)
        if code != 0 and "configshell" in err:
            missing("spdk-cli", "it needs configshell-fb")
        # It prints what it made; of a raid it makes nothing to print, which is its own fault, and the raid is there.
        own_fault = words[:2] == ("bdevs/raid_volume", "create") and "write() argument must be str, not None" in err
        assert (code, "Traceback" in out + err) == (int(refused or own_fault), False), err
        return re.sub(r"\x1b\[[0-9;]*m", "", str(out + err)).strip()

    return run


def shown(tree: str, name: str) -> str:
    """What the tree says of one node; nothing if it is not there."""
    found = re.search(rf"o- {re.escape(name)} \.+ \[(.*)\]", tree)
    return found.group(1) if found else ""


# path, words, what appears, its size, what makes room for it before, how it goes
KINDS = [
    ("malloc", "create 16 512 m1", ["m1"], "16.0M", [], "delete m1"),
    ("malloc", "create 16 4096 m1 5b6a5f0e-7f0a-4b5c-9f33-2f6f0a3f1a11", ["m1"], "16.0M", [], "delete m1"),
    ("malloc", "create 16 512", ["Malloc0"], "16.0M", [], "delete Malloc0"),
    ("null", "create n1 1024 512", ["n1"], "1.0G", [], "delete n1"),
    ("aio", "create a1 {image} 512", ["a1"], "8.0M", [], "delete a1"),
    ("uring", "create {image} u1 512", ["u1"], "8.0M", [], "delete u1"),
    ("error", "create m1", ["EE_m1"], "16.0M", ["bdevs/malloc create 16 512 m1"], "delete EE_m1"),
    ("split_disk", "bdev_split_create m1 4", ["m1p0", "m1p3"], "4.0M", ["bdevs/malloc create 16 512 m1"], "bdev_split_delete m1"),
    ("split_disk", "bdev_split_create m1 2 3", ["m1p0", "m1p1"], "3.0M", ["bdevs/malloc create 16 512 m1"], "bdev_split_delete m1"),
    (
        "raid_volume",
        'create r1 raid0 "m1 m2" 64',
        ["r1"],
        "32.0M",
        ["bdevs/malloc create 16 512 m1", "bdevs/malloc create 16 512 m2"],
        "delete r1",
    ),
    (
        "virtioblk_disk",
        "create V1 user {directory}/c1",
        ["V1"],
        "16.0M",
        ["bdevs/malloc create 16 512 m1", "vhost/block create c1 m1"],
        "delete V1",
    ),
]


@pytest.mark.parametrize(
    ("path", "words", "names", "size", "before", "goes"), KINDS, ids=[f"{kind[0]}-{kind[1].split()[-1]}" for kind in KINDS]
)
async def test_each_kind_is_made_listed_shown_and_deleted(
    cli: Cli, stack: Any, tmp_path: Path, path: str, words: str, names: list[str], size: str, before: list[str], goes: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 << 20))
    for command in before:
        await cli(*command.split())
    await cli(f"bdevs/{path}", *words.format(image=image, directory=tmp_path).split(" "))
    assert set(names) <= {info.name for info in stack.bdevs.infos()}
    tree = await cli("ls", "/bdevs")
    for name in names:
        told = shown(tree, name)
        assert f"Size={size}, Not claimed" in told, tree
        assert stack.bdevs.info(name).uuid in told, "its first alias"
    for base in stack.bdevs.info(names[0]).bases:
        assert shown(tree, base).endswith(", Claimed"), tree
    details = json.loads(await cli(f"bdevs/{path}/{names[0]}", "show_details"))
    assert details["name"] == names[0]
    statistics = json.loads(await cli(f"bdevs/{path}", "get_bdev_iostat", names[0]))
    assert [entry["name"] for entry in statistics["bdevs"]] == [names[0]]
    assert await cli(f"bdevs/{path}", *goes.split()) in ("", "true")
    left = {info.name for info in stack.bdevs.infos()}
    assert not left & set(names)
    assert shown(await cli("ls", "/bdevs"), names[0]) == ""


@pytest.mark.parametrize(("path", "made"), [("malloc", ["create 4 512 {}"]), ("null", ["create {} 4 512"])])
async def test_all_of_a_kind_are_deleted_at_once(cli: Cli, stack: Any, path: str, made: list[str]) -> None:
    await stack.null("other", "1MiB") if path == "malloc" else await stack.malloc("other", "1MiB")
    for number in range(3):
        for words in made:
            await cli(f"bdevs/{path}", *words.format(f"d{number}").split())
    assert shown(await cli("ls", "/bdevs"), path) == "Bdevs: 3"
    await cli(f"bdevs/{path}", "delete_all")
    assert [info.name for info in stack.bdevs.infos()] == ["other"]


async def test_a_vhost_disk_is_made_listed_changed_and_deleted(cli: Cli, stack: Any, tmp_path: Path) -> None:
    await cli("bdevs/malloc", "create", "16", "512", "m1")
    await cli("vhost/block", "create", "c1", "m1", "0x1" if stack.cores[0] == 0 else f"[{stack.cores[0]}]", "True")
    tree = await cli("ls", "/vhost")
    assert shown(tree, "c1") == f"{tmp_path}/c1, Readonly"
    assert "o- m1 " in tree
    details = json.loads(await cli("vhost/block/c1", "show_details"))
    assert details["backend_specific"]["block"] == {"readonly": True, "bdev": "m1", "transport": "vhost_user_blk"}
    await cli("vhost/block/c1", "set_coalescing", "20", "1000")
    details = json.loads(await cli("vhost/block/c1", "show_details"))
    assert (details["delay_base_us"], details["iops_threshold"]) == (20, 1000)
    await cli("vhost/block", "delete", "c1")
    assert await stack.rpc("vhost_get_controllers") == []


async def test_what_is_refused_is_printed_with_our_code_and_reason(cli: Cli) -> None:
    await cli("bdevs/malloc", "create", "16", "512", "m1")
    again = await cli("bdevs/malloc", "create", "16", "512", "m1", refused=True)
    assert '"code": -17' in again, again
    assert '"message": "File exists"' in again, again
    gone = await cli("bdevs/null", "delete", "nothing", refused=True)
    assert '"code": -19' in gone, gone
    absent = await cli("bdevs/logical_volume", "create", "v", "1", "lvs", refused=True)
    assert '"code": -32601' in absent, absent


async def test_the_whole_tree_is_listed_whatever_rooms_are_not_there_yet(cli: Cli) -> None:
    tree = await cli("ls", "/")
    for name in ("bdevs", "lvol_stores", "nvmf", "iscsi", "vhost", "raid_volume", "virtioscsi_disk"):
        assert shown(tree, name), name


async def test_configurations_are_saved_and_loaded_whole_and_by_subsystem(cli: Cli, make_stack: Any, tmp_path: Path) -> None:
    for command in ("malloc create 16 512 m1", "split_disk bdev_split_create m1 2", "error create m1p0", "null create n1 8 512"):
        await cli(*f"bdevs/{command}".split())
    await cli("/", "save_config", f"{tmp_path}/all.json")
    await cli("/", "save_subsystem_config", f"{tmp_path}/bdev.json", "bdev")
    saved = json.loads((tmp_path / "all.json").read_text())
    assert json.loads((tmp_path / "bdev.json").read_text()) in saved["subsystems"]
    other = str(tmp_path / "other.sock")
    async with make_stack(wait_for_rpc=True) as second:
        await second.listen(other)
        await cli("/", "load_config", f"{tmp_path}/all.json", address=other)
        await cli("/", "save_config", f"{tmp_path}/again.json", address=other)
    assert json.loads((tmp_path / "again.json").read_text()) == saved
    async with make_stack(wait_for_rpc=True) as third:
        await third.listen(other)
        assert "framework_start_init" in await cli("help", address=other)
        await cli("/", "framework_start_init", address=other)
        assert third.state == "runtime"
        await cli("/", "load_subsystem_config", f"{tmp_path}/bdev.json", address=other)
        assert [info.name for info in third.bdevs.infos()] == ["m1", "n1", "m1p0", "m1p1", "EE_m1p0"]
