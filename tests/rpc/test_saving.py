"""What spdk-rpc saves while everything changes: whole, loadable, and never half of a change."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from missing import missing
from qpair.errors import NoSuchBdev, NoSuchDevice, QpairError

SPDK_RPC = Path(sys.executable).parent / "spdk-rpc"


@pytest.fixture
def spdk_rpc(client: Any, server: Any, socket_path: str) -> Any:
    if not SPDK_RPC.exists():
        missing("spdk-rpc", "pip install spdk")

    async def run(*arguments: str, stdin: bytes | None = None) -> str:
        code, out, err = await client(str(SPDK_RPC), "-s", socket_path, *arguments, stdin=stdin)
        assert code == 0, err + out
        return str(out)

    return run


async def change_all_the_time(stack: Any, seed: int) -> None:
    """Pairs: a bdev with a controller on it. Whoever reads the bdevs before and the controllers after sees controllers on nothing."""
    choose = random.Random(seed)
    made: list[str] = []
    for number in range(1_000_000):
        try:
            if len(made) < 4 or choose.random() < 0.5:
                name = f"pair{seed}_{number}"
                await stack.null(name, "1MiB")
                await stack.rpc("vhost_create_blk_controller", ctrlr=f"c_{name}", dev_name=name)
                made.append(name)
            else:
                name = made.pop(choose.randrange(len(made)))
                await stack.rpc("vhost_delete_controller", ctrlr=f"c_{name}")
                await stack.bdevs.resize(name, "2MiB")
                await stack.delete(name)
        except QpairError as error:
            raise AssertionError(f"{name}: {error}") from error
        await asyncio.sleep(0)


def dangling(config: dict[str, Any]) -> list[str]:
    calls = [call for part in config["subsystems"] for call in part["config"] or []]
    bdevs = {call["params"]["name"] for call in calls if call["method"].startswith("bdev_") and "name" in call.get("params", {})}
    users = [call["params"]["dev_name"] for call in calls if call["method"] == "vhost_create_blk_controller"]
    return [name for name in users if name not in bdevs]


async def test_a_configuration_saved_while_io_and_changes_run_is_one_snapshot_and_loads(
    spdk_rpc: Any, stack: Any, make_stack: Any, tmp_path: Path
) -> None:
    await stack.malloc("busy", "4MiB")
    load = await stack.perf("busy", seconds=60)
    churn = [asyncio.ensure_future(change_all_the_time(stack, seed)) for seed in range(2)]
    try:
        saved = [json.loads(await spdk_rpc("save_config")) for _ in range(6)]
    finally:
        for task in churn:
            task.cancel()
        results = await asyncio.gather(*churn, return_exceptions=True)
        load.stop()
        await load.result()
    assert [result for result in results if not isinstance(result, asyncio.CancelledError)] == []
    assert [dangling(config) for config in saved] == [[]] * len(saved)
    assert len({json.dumps(config) for config in saved}) > 1, "things did change meanwhile"
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(saved[-1]))
    (tmp_path / "other").mkdir()
    async with make_stack(wait_for_rpc=True, vhost_dir=tmp_path / "other") as other:
        await other.load_config(path)
        other.save_config(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == saved[-1]


async def test_only_a_gathering_caller_reads_its_snapshot(server: Any, socket_path: str, stack: Any) -> None:
    reader, writer = await asyncio.open_unix_connection(socket_path)

    async def ask(method: str, **params: Any) -> Any:
        writer.write(json.dumps({"id": 1, "method": method, "params": params}).encode())
        return json.loads(await reader.readline())["result"]

    def creates(entries: list[Any]) -> int:
        return sum(entry["method"] == "bdev_null_create" for entry in entries)

    await ask("framework_get_subsystems")
    await stack.null("later", "1MiB")
    assert creates(await ask("framework_get_config", name="bdev")) == 0, "it began before"
    assert creates(await ask("framework_get_config", name="bdev")) == 1, "asked twice: it gathers no configuration"
    await ask("framework_get_subsystems")
    await stack.null("later2", "1MiB")
    await ask("spdk_get_version")
    assert creates(await ask("framework_get_config", name="bdev")) == 2, "something else was asked between"
    await ask("framework_get_subsystems")
    await ask("framework_get_config", name="vhost_blk")
    assert creates(await ask("framework_get_config", name="bdev")) == 2, "not in the order of the subsystems"
    assert creates(await stack.rpc("framework_get_config", name="bdev")) == 2
    writer.close()


async def test_bdevs_are_shown_while_they_come_and_go(stack: Any) -> None:
    churn = [asyncio.ensure_future(change_all_the_time(stack, seed)) for seed in range(2)]
    shown = 0
    for _ in range(200):
        disks = await stack.rpc("bdev_get_bdevs")
        assert len({disk["name"] for disk in disks}) == len(disks)
        shown += len(disks)
        await stack.rpc("bdev_get_iostat")
        await stack.rpc("vhost_get_controllers")
        await stack.rpc("notify_get_notifications")
        await asyncio.sleep(0.001)
    for task in churn:
        task.cancel()
    results = await asyncio.gather(*churn, return_exceptions=True)
    assert [result for result in results if not isinstance(result, asyncio.CancelledError)] == []
    assert shown > 0


async def test_a_bdev_whose_base_goes_while_it_is_shown_is_left_out(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await stack.null("stays", "1MiB")
    await stack.malloc("goes", "1MiB")

    def gone(info: Any) -> Any:
        raise NoSuchBdev("its base went")

    module = stack.bdevs.module(stack.bdevs.info("goes"))
    monkeypatch.setattr(module, "driver_specific", gone)
    assert [disk["name"] for disk in await stack.rpc("bdev_get_bdevs")] == ["stays"]
    with pytest.raises(NoSuchDevice):
        await stack.rpc("bdev_get_bdevs", name="goes")


BASES = [{"method": "bdev_malloc_create", "params": {"name": f"b{number}", "num_blocks": 16384, "block_size": 512}} for number in range(3)]
UUID = "5b6a5f0e-7f0a-4b5c-9f33-2f6f0a3f1a1"

# As SPDK documents and saves one bdev of each kind, with everything it says.
SAVED: dict[str, dict[str, Any]] = {
    "bdev_passthru_create": {"name": "p0", "base_bdev_name": "b0", "uuid": UUID + "1"},
    "bdev_split_create": {"base_bdev": "b0", "split_count": 2, "split_size_mb": 2},
    "bdev_delay_create": {
        "name": "d0",
        "base_bdev_name": "b0",
        "uuid": UUID + "2",
        "avg_read_latency": 100,
        "p99_read_latency": 200,
        "avg_write_latency": 300,
        "p99_write_latency": 400,
    },
    "bdev_error_create": {"base_name": "b0", "uuid": UUID + "3"},
    "bdev_zone_block_create": {"name": "z0", "base_bdev": "b0", "zone_capacity": 4096, "optimal_open_zones": 2},
    "bdev_raid_create": {
        "name": "r0",
        "uuid": UUID + "4",
        "strip_size_kb": 4,
        "raid_level": "raid0",
        "superblock": False,
        "base_bdevs": ["b0", "b1"],
    },
    "bdev_set_qos_limit": {
        "name": "b0",
        "rw_ios_per_sec": 20000,
        "rw_mbytes_per_sec": 100,
        "r_mbytes_per_sec": 50,
        "w_mbytes_per_sec": 50,
    },
}


@pytest.mark.parametrize("method", SAVED)
async def test_a_bdev_of_each_kind_loads_as_spdk_saves_it_and_is_saved_so(make_stack: Any, tmp_path: Path, method: str) -> None:
    calls = [*BASES, {"method": method, "params": SAVED[method]}, {"method": "bdev_wait_for_examine"}]
    (tmp_path / "first.json").write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": calls}]}))
    texts = []
    for source in ("first", "second"):
        async with make_stack(wait_for_rpc=True) as stack:
            await stack.load_config(tmp_path / f"{source}.json")
            await stack.rpc("bdev_wait_for_examine")
            shown = await stack.rpc("bdev_get_bdevs")
            stack.save_config(tmp_path / "second.json")
        texts.append((tmp_path / "second.json").read_text())
        (again,) = [call["params"] for call in await entries(tmp_path / "second.json") if call["method"] == method]
        assert {name: again.get(name) for name in SAVED[method]} == SAVED[method]
    assert texts[0] == texts[1], "what is saved and loaded is saved alike"
    assert len(shown) > 3 or method == "bdev_set_qos_limit", "something stands on the bases"


async def entries(path: Path) -> list[dict[str, Any]]:
    return [call for part in json.loads(path.read_text())["subsystems"] for call in part["config"] if part["subsystem"] == "bdev"]
