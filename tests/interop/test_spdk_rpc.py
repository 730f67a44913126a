"""SPDK's spdk-rpc, unmodified: configurations as SPDK saves them, there and back, and qpair's own methods by its plug-in."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from missing import missing
from qpair.rpc.registry import REGISTRY

Run = Callable[..., Awaitable[Any]]
UUID = "5b6a5f0e-7f0a-4b5c-9f33-2f6f0a3f1a1"


@pytest.fixture
def spdk_rpc(client: Any, server: Any, socket_path: str) -> Run:
    """What a command printed, as JSON where it is JSON; with ``refused`` it must fail."""
    program = shutil.which("spdk-rpc", path=str(Path(sys.executable).parent))
    if program is None:
        missing("spdk-rpc", "pip install spdk")

    async def run(*words: str, address: str = socket_path, stdin: Any = None, refused: bool = False) -> Any:
        text = None if stdin is None else json.dumps(stdin).encode()
        code, out, err = await client(program, "-s", address, *words, stdin=text)
        assert code == int(refused), out + err
        if refused:
            return out + err
        try:
            return json.loads(out)
        except ValueError:
            return out.strip()

    return run


def call(method: str, **params: Any) -> dict[str, Any]:
    return {"method": method, "params": params}


# What a target of SPDK's saves that has one bdev of each kind that there is here: every subsystem, those that hold nothing by [] or null, options with all they say.
SAVED = {
    "subsystems": [
        {"subsystem": "fsdev", "config": [call("fsdev_set_opts", fsdev_io_pool_size=65535, fsdev_io_cache_size=256)]},
        {"subsystem": "keyring", "config": []},
        {"subsystem": "iobuf", "config": [call("iobuf_set_options", small_pool_count=8192, large_pool_count=1024, small_bufsize=8192)]},
        {"subsystem": "sock", "config": [call("sock_set_default_impl", impl_name="posix")]},
        {"subsystem": "vmd", "config": []},
        {"subsystem": "accel", "config": [call("accel_set_options", small_cache_size=128, large_cache_size=16, task_count=2048)]},
        {
            "subsystem": "bdev",
            "config": [
                call("bdev_set_options", bdev_io_pool_size=65535, bdev_io_cache_size=256, bdev_auto_examine=True),
                call("bdev_raid_set_options", process_window_size_kb=512, process_max_bandwidth_mb_sec=0),
                call("bdev_nvme_set_hotplug", period_us=100000, enable=False),
                call("bdev_malloc_create", name="m0", num_blocks=32768, block_size=512, uuid=UUID + "1", optimal_io_boundary=0, md_size=0),
                call("bdev_malloc_create", name="m1", num_blocks=32768, block_size=512, uuid=UUID + "2", physical_block_size=4096),
                call("bdev_null_create", name="n0", num_blocks=2048, block_size=512, uuid=UUID + "3", md_size=0, dif_type=0),
                call("bdev_split_create", base_bdev="m0", split_count=2, split_size_mb=4),
                call("bdev_delay_create", name="d0", base_bdev_name="m0p0", uuid=UUID + "4", avg_read_latency=10, p99_read_latency=20,
                     avg_write_latency=10, p99_write_latency=20),
                call("bdev_passthru_create", name="p0", base_bdev_name="d0", uuid=UUID + "5"),
                call("bdev_error_create", base_name="m0p1", uuid=UUID + "6"),
                call("bdev_raid_create", name="r0", uuid=UUID + "7", strip_size_kb=0, raid_level="raid1", superblock=False, base_bdevs=["m1", "late"]),
                call("bdev_set_qos_limit", name="n0", rw_ios_per_sec=20000, rw_mbytes_per_sec=0, r_mbytes_per_sec=0, w_mbytes_per_sec=0),
                {"method": "bdev_wait_for_examine"},
            ],
        },
        {"subsystem": "nbd", "config": []},
        {"subsystem": "scheduler", "config": [call("framework_set_scheduler", name="static")]},
        {"subsystem": "ublk", "config": []},
        {"subsystem": "vhost_blk", "config": [call("vhost_create_blk_controller", ctrlr="c0", dev_name="p0", cpumask="{mask:x}", readonly=True)]},
        {"subsystem": "scsi", "config": None},
        {"subsystem": "vhost_scsi", "config": []},
        {"subsystem": "nvmf", "config": [call("nvmf_set_max_subsystems", max_subsystems=1024)]},
        {"subsystem": "iscsi", "config": [call("iscsi_set_options", node_base="iqn.2016-06.io.spdk", max_sessions=128)]},
    ]
}  # fmt: skip
MADE = ["m0", "m1", "n0", "m0p0", "m0p1", "d0", "p0", "EE_m0p1"]


def saved(core: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(SAVED).replace("{mask:x}", f"{1 << core:x}"))
    return found


def calls(config: dict[str, Any], subsystem: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Parameters by method and object."""
    (entries,) = [part["config"] for part in config["subsystems"] if part["subsystem"] == subsystem]
    return {
        (entry["method"], next((str(entry.get("params", {})[key]) for key in ("name", "base_bdev", "base_name", "ctrlr") if key in entry.get("params", {})), "")):
        entry.get("params", {}) for entry in entries or []
    }  # fmt: skip


async def test_a_configuration_as_spdk_saves_it_is_loaded_and_saved_alike(spdk_rpc: Run, make_stack: Any, tmp_path: Path) -> None:
    texts = []
    given = saved(min(os.sched_getaffinity(0)))
    source: dict[str, Any] = given
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        async with make_stack(wait_for_rpc=True, vhost_dir=tmp_path / str(number)) as stack:
            address = str(tmp_path / f"{number}.sock")
            await stack.listen(address)
            assert await spdk_rpc("load_config", address=address, stdin=source) == ""
            assert set(MADE) <= {info.name for info in stack.bdevs.infos()}
            again = await spdk_rpc("save_config", address=address)
            shown = {disk["name"]: disk for disk in await spdk_rpc("bdev_get_bdevs", address=address)}
            assert [shown[name]["qpair"]["bases"] for name in ("m0p0", "d0", "p0")] == [["m0"], ["m0p0"], ["d0"]]
        for part in given["subsystems"]:
            mine = calls(again, part["subsystem"]) if part["config"] else {}
            for key, params in calls(given, part["subsystem"]).items():
                said = {name: value for name, value in params.items() if value or name in mine[key]}  # zeros may be left out
                assert {name: mine[key].get(name) for name in said} == said, key
        texts.append(json.dumps(again))
        source = again
    assert texts[0] == texts[1], "what is saved and loaded is saved alike"


async def test_one_subsystem_is_saved_and_loaded_into_a_running_stack(spdk_rpc: Run, make_stack: Any, tmp_path: Path) -> None:
    await spdk_rpc("bdev_malloc_create", "-b", "m0", "16", "512")
    await spdk_rpc("bdev_split_create", "m0", "2")
    part = await spdk_rpc("save_subsystem_config", "-n", "bdev")
    assert part["subsystem"] == "bdev"
    async with make_stack() as stack:
        other = str(tmp_path / "other.sock")
        await stack.listen(other)
        assert await spdk_rpc("load_subsystem_config", address=other, stdin=part) == ""
        assert [info.name for info in stack.bdevs.infos()] == ["m0", "m0p0", "m0p1"]


async def test_a_configuration_with_what_is_not_there_is_refused_before_anything_is_made(
    spdk_rpc: Run, make_stack: Any, tmp_path: Path
) -> None:
    config = {
        "subsystems": [
            {"subsystem": "bdev", "config": [call("bdev_null_create", name="n0", num_blocks=8, block_size=512), call("bdev_ocf_create")]}
        ]
    }
    async with make_stack(wait_for_rpc=True) as stack:
        other = str(tmp_path / "other.sock")
        await stack.listen(other)
        told = await spdk_rpc("load_config", address=other, stdin=config, refused=True)
        assert "Unknown method" in told
        assert stack.bdevs.records == {}
        assert stack.state == "startup"


PLUGIN = ("--plugin", "qpair.rpc.spdk_plugin")


async def test_the_plug_in_calls_each_of_our_own_methods(spdk_rpc: Run, stack: Any, tmp_path: Path) -> None:
    told = await spdk_rpc(*PLUGIN, "--help")
    for name in REGISTRY.names():
        if name.startswith("qpair_"):
            assert name in told
    await spdk_rpc("bdev_null_create", "n0", "8", "512")
    await spdk_rpc(*PLUGIN, "qpair_bdev_qos_group_create", "--name", "g0", "--rw-ios-per-sec", "5000")
    await spdk_rpc(*PLUGIN, "qpair_bdev_qos_group_add_bdev", "--name", "g0", "--bdev-name", "n0")
    (group,) = await spdk_rpc(*PLUGIN, "qpair_bdev_qos_get_groups")
    assert (group["name"], group["bdevs"]) == ("g0", ["n0"])
    told = await spdk_rpc(*PLUGIN, "qpair_bdev_qos_group_delete", "--name", "none", refused=True)
    assert '"code": -2' in told


async def test_the_plug_in_makes_and_deletes_python_bdevs(
    spdk_rpc: Run, stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugged.py").write_text(
        "import qpair\n\n\nclass Ram(qpair.Bdev):\n    def __init__(self, name, size, note):\n"
        "        super().__init__(name, size)\n        self.held = bytearray(self.size_bytes)\n"
        "    def read(self, requests):\n        for each in requests:\n            each.data[:] = self.held[each.offset : each.end]\n"
        "    def write(self, requests):\n        for each in requests:\n            self.held[each.offset : each.end] = each.data\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    made = await spdk_rpc(
        *PLUGIN,
        "qpair_python_create",
        "--class",
        "plugged:Ram",
        "--name",
        "py0",
        "--size",
        "2097152",
        "--options",
        '{"note": "by spdk-rpc"}',
    )
    assert made == "py0"
    (found,) = await spdk_rpc(*PLUGIN, "qpair_python_get_bdevs")
    assert found["name"] == "py0"
    (shown,) = await spdk_rpc("bdev_get_bdevs", "-b", "py0")
    assert shown["num_blocks"] * shown["block_size"] == 2 << 20
    await spdk_rpc(*PLUGIN, "qpair_python_delete", "--name", "py0")
    assert await spdk_rpc("bdev_get_bdevs") == []
