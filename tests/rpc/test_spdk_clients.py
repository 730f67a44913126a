"""SPDK's own clients, unmodified from ``pip install spdk``, against our socket."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from missing import missing
from qpair.rpc.registry import REGISTRY

BIN = Path(sys.executable).parent


def tool(name: str) -> str:
    found = shutil.which(name, path=str(BIN)) or shutil.which(name)
    if found is None:
        missing(name, "pip install spdk")
    return found


@pytest.fixture
def spdk_rpc(client: Any, server: Any, socket_path: str) -> Any:
    program = tool("spdk-rpc")

    async def run(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        result: tuple[int, str, str] = await client(program, "-s", socket_path, *arguments, stdin=stdin)
        return result

    return run


async def ok(run: Any, *arguments: str, stdin: bytes | None = None) -> Any:
    code, out, err = await run(*arguments, stdin=stdin)
    assert code == 0, err
    try:
        return json.loads(out)
    except ValueError:
        return out.strip()


async def refused(run: Any, *arguments: str) -> tuple[int, str]:
    """The exit code, and all that was printed (releases differ in where errors go)."""
    code, out, err = await run(*arguments)
    return code, out + err


async def test_every_bdev_method_answers_spdk_rpc(spdk_rpc: Any, tmp_path: Path) -> None:
    backing = tmp_path / "disk.img"
    backing.write_bytes(bytes(1 << 20))
    assert await ok(spdk_rpc, "bdev_malloc_create", "-b", "m0", "4", "512") == "m0"
    assert (await ok(spdk_rpc, "bdev_malloc_create", "1", "4096")).startswith("Malloc")
    assert await ok(spdk_rpc, "bdev_null_create", "n0", "8", "512") == "n0"
    assert await ok(spdk_rpc, "bdev_aio_create", str(backing), "a0", "512") == "a0"
    assert await ok(spdk_rpc, "bdev_uring_create", str(backing), "u0", "512") == "u0"
    assert [disk["name"] for disk in await ok(spdk_rpc, "bdev_get_bdevs")] == ["m0", "Malloc0", "n0", "a0", "u0"]
    disk = (await ok(spdk_rpc, "bdev_get_bdevs", "-b", "m0"))[0]
    assert disk["num_blocks"] == 8192
    assert disk["product_name"] == "Malloc disk"
    assert disk["aliases"] == [disk["uuid"]]
    assert disk["supported_io_types"]["read"] is True
    assert disk["supported_io_types"]["nvme_admin"] is False
    await ok(spdk_rpc, "bdev_null_resize", "n0", "16")
    assert (await ok(spdk_rpc, "bdev_get_bdevs", "-b", "n0"))[0]["num_blocks"] == 32768
    with backing.open("ab") as file:
        file.truncate(2 << 20)
    await ok(spdk_rpc, "bdev_aio_rescan", "a0")
    await ok(spdk_rpc, "bdev_uring_rescan", "u0")
    assert (await ok(spdk_rpc, "bdev_get_bdevs", "-b", "a0"))[0]["num_blocks"] == 4096
    stat = await ok(spdk_rpc, "bdev_get_iostat", "--names", "m0")
    assert [entry["name"] for entry in stat["bdevs"]] == ["m0"]
    assert stat["tick_rate"] == 1_000_000_000
    await ok(spdk_rpc, "bdev_reset_iostat")
    await ok(spdk_rpc, "bdev_wait_for_examine")
    code, out = await refused(spdk_rpc, "bdev_examine", "-b", "m0")
    assert (code, '"code": -22' in out) == (1, True), "by hand only where bdev_auto_examine is off"
    for kind, name in (("malloc", "m0"), ("malloc", "Malloc0"), ("null", "n0"), ("aio", "a0"), ("uring", "u0")):
        await ok(spdk_rpc, f"bdev_{kind}_delete", name)
    assert await ok(spdk_rpc, "bdev_get_bdevs") == []


async def test_the_process_methods_answer_spdk_rpc(spdk_rpc: Any) -> None:
    assert set(await ok(spdk_rpc, "rpc_get_methods")) == set(REGISTRY.names())
    current = await ok(spdk_rpc, "rpc_get_methods", "--current")
    assert "framework_start_init" not in current
    assert "bdev_get_bdevs" in current
    assert (await ok(spdk_rpc, "spdk_get_version"))["fields"]["major"] == 0
    reactors = await ok(spdk_rpc, "framework_get_reactors")
    assert len(reactors["reactors"]) == 1
    assert {"lcore", "busy", "idle", "tid", "in_interrupt", "lw_threads"} <= set(reactors["reactors"][0])
    assert len((await ok(spdk_rpc, "thread_get_stats"))["threads"]) == 1
    subsystems = await ok(spdk_rpc, "framework_get_subsystems")
    assert {"subsystem": "accel", "depends_on": ["iobuf"]} in subsystems
    await ok(spdk_rpc, "framework_wait_init")
    await ok(spdk_rpc, "log_set_level", "INFO")
    assert await ok(spdk_rpc, "log_get_level") == "INFO"
    await ok(spdk_rpc, "log_set_print_level", "WARNING")
    await ok(spdk_rpc, "log_get_print_level")
    await ok(spdk_rpc, "log_set_flag", "bdev")
    assert (await ok(spdk_rpc, "log_get_flags"))["bdev"] is True
    await ok(spdk_rpc, "log_clear_flag", "bdev")


async def test_errors_read_as_spdks_clients_match_them(spdk_rpc: Any) -> None:
    code, err = await refused(spdk_rpc, "bdev_get_bdevs", "-b", "nothing")
    assert code != 0
    assert '"code": -19' in err
    assert '"message": "No such device"' in err
    await ok(spdk_rpc, "bdev_null_create", "n0", "8", "512")
    code, err = await refused(spdk_rpc, "bdev_null_create", "n0", "8", "512")
    assert '"code": -17' in err
    assert '"message": "File exists"' in err
    code, err = await refused(spdk_rpc, "bdev_malloc_delete", "n0")
    assert '"code": -19' in err
    code, err = await refused(spdk_rpc, "framework_get_config", "nothing")
    assert '"code": -32602' in err


async def test_a_saved_configuration_loads_into_a_waiting_stack(
    spdk_rpc: Any, client: Any, make_stack: Any, tmp_path: Path, stack: Any
) -> None:
    await ok(spdk_rpc, "bdev_malloc_create", "-b", "m0", "4", "512")
    await ok(spdk_rpc, "bdev_null_create", "n0", "8", "4096")
    await stack.rpc("bdev_nvme_set_options", bdev_retry_count=4)
    saved = await ok(spdk_rpc, "save_config")
    other = str(tmp_path / "other.sock")
    async with make_stack(wait_for_rpc=True) as second:
        await second.listen(other)
        code, out, err = await client(tool("spdk-rpc"), "-s", other, "load_config", stdin=json.dumps(saved).encode())
        assert (code, out) == (0, ""), err
        code, out, err = await client(tool("spdk-rpc"), "-s", other, "save_config")
        assert json.loads(out) == saved


async def test_threads_notifications_keys_and_the_scheduler_answer_spdk_rpc(spdk_rpc: Any, stack: Any, tmp_path: Path) -> None:
    await ok(spdk_rpc, "bdev_null_create", "n0", "8", "512")
    await ok(spdk_rpc, "bdev_null_delete", "n0")
    assert (await ok(spdk_rpc, "notify_get_types"))[:3] == ["bdev_register", "bdev_unregister", "bdev_resize"]
    assert await ok(spdk_rpc, "notify_get_notifications", "-i", "1", "-n", "5") == [{"type": "bdev_unregister", "ctx": "n0", "id": 1}]
    (thread,) = (await ok(spdk_rpc, "thread_get_stats"))["threads"]
    (polled,) = (await ok(spdk_rpc, "thread_get_pollers"))["threads"]
    assert (polled["name"], polled["id"]) == (thread["name"], thread["id"])
    assert polled["active_pollers"]
    await ok(spdk_rpc, "thread_set_cpumask", "-i", str(thread["id"]), "-m", f"[{stack.cores[0]}]")
    code, out = await refused(spdk_rpc, "thread_set_cpumask", "-i", "77", "-m", "0x1")
    assert (code, "Thread 77 does not exist" in out) == (1, True)
    assert (await ok(spdk_rpc, "framework_get_scheduler"))["scheduler_name"] == "static"
    assert await ok(spdk_rpc, "framework_get_governor") == {}
    assert await ok(spdk_rpc, "framework_get_pci_devices") == []
    await ok(spdk_rpc, "log_enable_timestamps", "--no-timestamps")
    await ok(spdk_rpc, "log_enable_timestamps", "--timestamps")
    await ok(spdk_rpc, "accel_crypto_key_create", "-c", "AES_CBC", "-k", "00112233445566778899aabbccddeeff", "-n", "k0")
    assert [key["name"] for key in await ok(spdk_rpc, "accel_crypto_keys_get")] == ["k0"]
    await ok(spdk_rpc, "accel_crypto_key_destroy", "-n", "k0")
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o600)
    await ok(spdk_rpc, "keyring_file_add_key", "k1", str(key))
    assert [found["path"] for found in await ok(spdk_rpc, "keyring_get_keys")] == [str(key)]
    await ok(spdk_rpc, "keyring_file_remove_key", "k1")
    assert (await ok(spdk_rpc, "accel_get_opc_assignments"))["copy"] == "software"
    (module,) = await ok(spdk_rpc, "accel_get_module_info")
    assert (module["module"], "crc32c" in module["supported ops"]) == ("software", True)
    counted = await ok(spdk_rpc, "accel_get_stats")
    assert (counted.pop("operations"), set(counted.values())) == ([], {0})
    assert await ok(spdk_rpc, "iobuf_get_stats") == []


async def test_spdk_rpc_sends_a_batch_of_commands_as_one_request(spdk_rpc: Any) -> None:
    commands = "\n".join(f"bdev_null_create n{number} 8 512" for number in range(20))
    code, out, err = await spdk_rpc("--batch-mode", stdin=commands.encode())
    assert code == 0, err + out
    assert [disk["name"] for disk in await ok(spdk_rpc, "bdev_get_bdevs")] == [f"n{number}" for number in range(20)]


async def test_spdk_cli_makes_lists_and_deletes_bdevs(client: Any, server: Any, socket_path: str, stack: Any) -> None:
    async def cli(*words: str) -> str:
        code, out, err = await client(tool("spdk-cli"), "-s", socket_path, *words)
        if code != 0 and "configshell" in err:
            missing("spdk-cli", "it needs configshell-fb")
        assert (code, "Traceback" in out + err) == (0, False), err
        return str(out)

    assert (await cli("/bdevs/malloc", "create", "16", "512", "m1")).strip() == "m1"
    assert (await cli("/bdevs/null", "create", "n1", "16", "512")).strip() == "n1"
    tree = await cli("ls", "/")
    assert "m1 " in tree
    assert "Size=16.0M, Not claimed" in tree
    await cli("/bdevs/malloc", "delete", "m1")
    assert [info.name for info in stack.bdevs.infos()] == ["n1"]
