"""``qpair ls``: what stands on what, from our own server and from answers of SPDK's shape; rates; watching; what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Shell, Terminal
from qpair.cli.tree import EXPORTS, Forest, rates


def bdev(name: str, specific: Any = None, *, claimed: bool = False, blocks: int = 2048, product: str = "Malloc disk") -> dict[str, Any]:
    return {
        "name": name,
        "aliases": [f"alias-of-{name}"],
        "product_name": product,
        "block_size": 512,
        "num_blocks": blocks,
        "claimed": claimed,
        "driver_specific": {} if specific is None else specific,
    }


def drawn(forest: Forest, **options: Any) -> list[str]:
    return [line.stem + line.item.name + (" *" if line.again else "") for line in forest.lines(**options)]


@pytest.mark.parametrize(
    ("specific", "bases"),
    [
        ({"passthru": {"name": "top", "base_bdev_name": "a"}}, ["a"]),
        ({"split": {"base_bdev": "a", "offset_blocks": 0}}, ["a"]),
        ({"gpt": {"base_bdev": "a", "offset_blocks": 2048, "unique_partition_guid": "b"}}, ["a"]),
        ({"delay": {"name": "top", "base_bdev_name": "a"}}, ["a"]),
        ({"error_disk": {"base_bdev": "a"}}, ["a"]),
        ({"zoned_block": {"base_bdev": "a", "name": "top", "zone_capacity": 8}}, ["a"]),
        ({"raid": {"raid_level": "raid1", "base_bdevs_list": [{"name": "a"}, {"name": None}, {"name": "b"}]}}, ["a", "b"]),
        ({"raid": {"raid_level": "raid1", "base_bdevs_list": ["a", "b"]}}, ["a", "b"]),
        ({"lvol": {"lvol_store_uuid": "x", "base_bdev": "a", "base_snapshot": "b"}}, ["a"]),
        ({"crypto": {"base_bdev_name": "alias-of-a", "key_name": "b"}}, ["a"]),
        ({"ftl": {"base_bdev": "a", "cache": "b"}}, ["a", "b"]),
        ([{"cache_device": "a", "core_device": "b"}], ["a", "b"]),
        ({"nvme": [{"trid": {"traddr": "a"}, "ns_data": {"id": 1}}], "mp_policy": "active_passive"}, []),
        ({"passthru": {"base_bdev_name": "gone"}}, []),
        ({"passthru": {"base_bdev_name": "top"}}, []),
        ({}, []),
    ],
)
def test_bases_are_read_from_what_each_module_says(specific: Any, bases: list[str]) -> None:
    assert Forest([bdev("a"), bdev("b"), bdev("top", specific)], []).bdevs["top"].bases == bases


@pytest.mark.parametrize(
    ("own", "bases", "claimed_by"),
    [
        ({"bases": ["b"], "claimed_by": None}, ["b"], {"b": "passthru", "top": None}),
        ({"bases": [], "claimed_by": "somebody"}, [], {"b": None, "top": "somebody"}),
        ({"bases": ["gone", "top"]}, [], {"b": None, "top": None}),
    ],
)
def test_what_a_server_says_outright_counts_before_what_its_modules_say(own: Any, bases: list[str], claimed_by: dict[str, Any]) -> None:
    answer = [bdev("a"), bdev("b", claimed=True), bdev("top", {"passthru": {"base_bdev_name": "a"}}, claimed=True) | {"qpair": own}]
    found = Forest(answer, []).bdevs
    assert found["top"].bases == bases
    assert found["a"].users == []
    assert {name: found[name].claimed_by for name in claimed_by} == claimed_by


def stacked() -> Forest:
    """Two mirrored disks, a partition of the mirror under a vhost controller, and one disk alone."""
    raid = {
        "raid": {
            "raid_level": "raid1",
            "state": "online",
            "num_base_bdevs": 2,
            "num_base_bdevs_operational": 1,
            "base_bdevs_list": ["a", "b"],
        }
    }
    answer = [
        bdev("a", claimed=True),
        bdev("b", claimed=True),
        bdev("r", raid, claimed=True, product="Raid Volume"),
        bdev("rp1", {"gpt": {"base_bdev": "r"}}, product="GPT Disk"),
        bdev("alone"),
    ]
    controllers = [
        {"ctrlr": "rp1.sock", "socket": "/v/rp1.sock", "sessions": [{}], "backend_specific": {"block": {"bdev": "rp1", "readonly": True}}}
    ]
    return Forest(answer, EXPORTS["vhost_get_controllers"](controllers))


def test_what_stands_on_several_is_shown_whole_once() -> None:
    forest = stacked()
    assert drawn(forest) == ["a", "└─ r", "   └─ rp1", "      └─ rp1.sock", "b", "└─ r *", "alone"]
    assert drawn(forest, inverse=True) == ["rp1.sock", "└─ rp1", "   └─ r", "      ├─ a", "      └─ b", "alone"]
    assert drawn(forest, chosen=forest.connected(["b"])) == ["b", "└─ r", "   └─ rp1", "      └─ rp1.sock"]
    assert drawn(forest, chosen=forest.connected(["alone"])) == ["alone"]


def test_who_claims_and_what_state_are_told() -> None:
    bdevs = stacked().bdevs
    assert {name: found.claimed_by for name, found in bdevs.items()} == {"a": "raid", "b": "raid", "r": "gpt", "rp1": None, "alone": None}
    assert bdevs["r"].told == "raid1 online, 1 of 2 bases"
    assert bdevs["r"].users == ["rp1"]
    [export] = bdevs["rp1"].exports
    assert (export.kind, export.detail) == ("vhost", "/v/rp1.sock, 1 connected, read-only")


def test_bdevs_that_name_each_other_are_shown_all_the_same() -> None:
    ring = Forest([bdev("a", {"x": {"base_bdev": "b"}}), bdev("b", {"x": {"base_bdev": "a"}})], [])
    assert drawn(ring) == ["a", "└─ b", "   └─ a *"]


@pytest.mark.parametrize(
    ("method", "answer", "found"),
    [
        (
            "nvmf_get_subsystems",
            [{"nqn": "nqn.d", "subtype": "Discovery"}, {"nqn": "nqn.x", "listen_addresses": [{"trtype": "TCP", "traddr": "::1", "trsvcid": "4420"}],
              "namespaces": [{"nsid": 2, "bdev_name": "a"}]}],
            ("nvmf", "nqn.x ns 2", "a", "tcp://::1:4420"),
        ),
        ("iscsi_get_target_nodes", [{"name": "iqn.x", "luns": [{"bdev_name": "a", "lun_id": 3}]}], ("iscsi", "iqn.x lun 3", "a", "")),
        ("nbd_get_disks", [{"nbd_device": "/dev/nbd0", "bdev_name": "a"}], ("nbd", "/dev/nbd0", "a", "")),
        ("ublk_get_disks", [{"ublk_device": "/dev/ublkb1", "bdev_name": "a", "id": 1}], ("ublk", "/dev/ublkb1", "a", "")),
        (
            "vhost_get_controllers",
            [{"ctrlr": "s", "backend_specific": {"scsi": [{"scsi_dev_num": 5, "luns": [{"id": 0, "bdev_name": "a"}]}]}}],
            ("vhost", "s target 5", "a", "0 connected"),
        ),
    ],
)  # fmt: skip
def test_every_way_of_exporting_is_known(method: str, answer: Any, found: tuple[str, ...]) -> None:
    [export] = EXPORTS[method](answer)
    assert (export.kind, export.name, export.bdev, export.detail) == found
    assert drawn(Forest([bdev("a")], [export])) == ["a", f"└─ {export.name}"]


def test_rates_are_by_the_servers_own_clock_and_a_reset_is_no_negative_rate() -> None:
    def counted(ticks: int, reads: int) -> dict[str, Any]:
        entry = {"num_read_ops": reads, "bytes_read": reads * 4096, "num_write_ops": 10, "bytes_written": 40960}
        return {"tick_rate": 1000, "ticks": ticks, "bdevs": [{"name": "a", **entry}]}

    found = rates(counted(0, 0), counted(500, 1000))["a"]
    assert (found.read_iops, found.write_iops, found.read_mb_per_s, found.write_mb_per_s) == (2000.0, 0.0, 8.192, 0.0)
    assert rates(counted(0, 1000), counted(500, 0))["a"].read_iops == 0.0
    assert rates(counted(500, 0), counted(500, 1)) == {}


SPDK_ANSWERS = {
    "rpc_get_methods": ["bdev_get_bdevs", "bdev_get_iostat", "nvmf_get_subsystems", "iscsi_get_target_nodes", "rpc_get_methods"],
    "bdev_get_bdevs": [
        bdev("Nvme0n1", {"nvme": [{"pci_address": "0000:00:04.0"}]}, claimed=True, product="NVMe disk", blocks=1 << 31),
        bdev("lvs/vol", {"lvol": {"base_bdev": "Nvme0n1"}}, product="Logical Volume"),
    ],
    "bdev_get_iostat": {"tick_rate": 2_000_000_000, "ticks": 1, "bdevs": [{"name": "Nvme0n1"}]},
    "nvmf_get_subsystems": [{"nqn": "nqn.2016-06.io.spdk:c", "listen_addresses": [], "namespaces": [{"nsid": 1, "bdev_name": "lvs/vol"}]}],
}


@pytest.fixture
async def spdk_like(socket_path: str) -> AsyncIterator[str]:
    """A server that answers as SPDK does, with its own set of methods, and refuses one of them."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = ""
        while data := await reader.read(1 << 16):
            text += data.decode()
            try:
                request = json.loads(text)
            except ValueError:
                continue
            text = ""
            reply: dict[str, Any] = {"jsonrpc": "2.0", "id": request["id"]}
            if request["method"] in SPDK_ANSWERS:
                reply["result"] = SPDK_ANSWERS[request["method"]]
            else:
                reply["error"] = {"code": -32601, "message": "Method not found"}
            writer.write(json.dumps(reply).encode() + b"\n")
        writer.close()

    server = await asyncio.start_unix_server(answer, socket_path)
    yield socket_path
    server.close()


async def test_it_works_with_spdks_own_answers(spdk_like: str, client: Any, qpair_command: list[str]) -> None:
    code, out, err = await client(*qpair_command, "ls", "-r", spdk_like, "-i", "0")
    assert (code, err) == (0, "")
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "NAME SIZE BLOCK PRODUCT CLAIMED BY DETAIL",
        "Nvme0n1 1 TiB 512 NVMe disk lvol",
        "└─ lvs/vol 1 MiB 512 Logical Volume -",
        "└─ nvmf nqn.2016-06.io.spdk:c ns 1",
    ]
    assert out.splitlines()[3].startswith("   └─ nvmf")
    assert len({line.index("512") for line in out.splitlines() if "512" in line}) == 1, "columns stand below each other"


async def test_the_tree_of_a_running_server(shell: Shell, tmp_path: Path) -> None:
    for name in ("m0", "m1"):
        await shell.rpc("bdev_malloc_create", name=name, num_blocks=131072, block_size=512)
    await shell.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    await shell.rpc("vhost_create_blk_controller", ctrlr="p0.sock", dev_name="p0")
    code, out, err = await shell("ls", "-i", "0.05")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == [
        "NAME",
        "SIZE",
        "BLOCK",
        "PRODUCT",
        "CLAIMED",
        "BY",
        "IOPS",
        "R",
        "IOPS",
        "W",
        "MB/s",
        "R",
        "MB/s",
        "W",
        "DETAIL",
    ]
    names = [line[: lines[0].index("SIZE") - 3].rstrip() for line in lines[1:]]
    assert names == ["m0", "└─ p0", "   └─ vhost p0.sock", "m1"]
    assert lines[1].split()[1:6] == ["64", "MiB", "512", "Malloc", "disk"]
    assert lines[3].endswith(f"{tmp_path}/p0.sock, 0 connected")

    code, out, _ = await shell("ls", "--json", "-i", "0.05", "p0")
    told = {item["name"]: item for item in json.loads(out)["bdevs"]}
    assert set(told) == {"m0", "p0"}
    assert told["p0"]["bases"] == ["m0"]
    assert told["m0"]["used_by"] == ["p0"]
    assert (told["m0"]["claimed"], told["m0"]["claimed_by"]) == (True, "passthru")
    assert told["p0"]["size_bytes"] == 64 << 20
    assert told["p0"]["exports"] == [{"kind": "vhost", "name": "p0.sock", "detail": f"{tmp_path}/p0.sock, 0 connected"}]
    assert told["m0"]["rates"] == {"read_iops": 0.0, "write_iops": 0.0, "read_mb_per_s": 0.0, "write_mb_per_s": 0.0}


async def test_rates_are_those_of_the_load(shell: Shell, qpair_command: list[str], tmp_path: Path) -> None:
    await shell.rpc("bdev_null_create", name="n0", num_blocks=1 << 20, block_size=512)
    await shell.rpc("vhost_create_blk_controller", ctrlr="n0.sock", dev_name="n0")
    load = await asyncio.create_subprocess_exec(
        *qpair_command, "perf", f"vhost:{tmp_path}/n0.sock", "-q", "8", "-t", "30", "--json", stdout=asyncio.subprocess.PIPE
    )
    try:
        for _ in range(100):
            _, out, _ = await shell("ls", "--json", "-i", "0.3")
            [told] = json.loads(out)["bdevs"]
            if told["rates"]["read_iops"] > 100 and told["exports"][0]["detail"].endswith("1 connected"):
                break
    finally:
        load.terminate()
        await load.wait()
    assert told["rates"]["read_mb_per_s"] == pytest.approx(told["rates"]["read_iops"] * 4096 / 1e6, rel=0.01)
    assert told["rates"]["write_iops"] == 0


async def test_watching_prints_again_and_json_is_a_line_each(shell: Shell) -> None:
    await shell.rpc("bdev_null_create", name="n0", num_blocks=8, block_size=512)
    code, out, _ = await shell("ls", "--watch", "-i", "0.05", "-n", "3")
    assert code == 0
    assert out.count("NAME") == 3
    code, out, _ = await shell("ls", "--watch", "-i", "0.05", "-n", "2", "--json")
    assert [[item["name"] for item in json.loads(line)["bdevs"]] for line in out.splitlines()] == [["n0"], ["n0"]]


async def test_what_is_not_there_is_refused_with_names_near_it(shell: Shell) -> None:
    code, out, err = await shell("ls", "-i", "0")
    assert (code, out, err) == (0, "", f"no bdevs on {shell.path}\n")
    for name in ("disk0", "disk1", "other"):
        await shell.rpc("bdev_null_create", name=name, num_blocks=8, block_size=512)
    code, out, err = await shell("ls", "dsk1", "-i", "0")
    assert (code, out) == (1, "")
    assert err == "qpair ls: no bdev is named 'dsk1'\n  did you mean disk1 or disk0?\n"
    code, out, err = await shell("ls", "quite-else", "-i", "0", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out) == {
        "error": {
            "code": -19,
            "message": "no bdev is named 'quite-else'",
            "hints": [f"bdevs there: disk0, disk1, other; all of them: qpair ls -r {shell.path}"],
        }
    }


async def test_without_a_server_it_says_so_and_exits_with_3(client: Any, qpair_command: list[str], socket_path: str) -> None:
    code, out, err = await client(*qpair_command, "ls", "-r", socket_path)
    assert (code, out) == (3, "")
    assert err.startswith(
        f"qpair ls: no server answers on {socket_path}: there is no such socket\n  start one: qpair serve -r {socket_path}\n"
    )
    code, out, _ = await client(*qpair_command, "ls", "-r", socket_path, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (3, -2)


async def test_on_a_terminal_it_fits_and_ctrl_c_ends_watching(shell: Shell, qpair_command: list[str]) -> None:
    for number in range(3):
        await shell.rpc("bdev_null_create", name=f"a-disk-with-some-name-{number}", num_blocks=8, block_size=4096)

    def watch(columns: int) -> tuple[int, list[str]]:
        terminal = Terminal(*qpair_command, "ls", "-r", shell.path, "--watch", "-i", "0.1", columns=columns)
        terminal.until("a-disk-with-some-name-2")
        terminal.interrupt()
        return terminal.end(), terminal.lines()

    for columns, product in ((120, True), (80, False)):
        code, lines = await asyncio.to_thread(watch, columns)
        assert code == 0
        heading = next(line for line in lines if line.startswith("NAME"))
        assert ("PRODUCT" in heading) is product
        assert heading.endswith(("MB/s W", "DETAIL"))
        assert not [line for line in lines if "…" in line]


def test_a_reader_that_leaves_is_no_traceback(qpair_command: list[str], socket_path: str) -> None:
    import subprocess

    done = subprocess.run(f"{' '.join(qpair_command)} --help | true", shell=True, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
