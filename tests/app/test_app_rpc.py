"""Methods of the process: threads, logging, scheduling, keys, options of bdevs; what each answers and refuses."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from qpair.app import logs
from qpair.errors import AlreadyExists, InvalidArgument, InvalidParameters, NoSuchFile, NotPermitted


async def test_a_reactor_is_the_same_thread_in_every_method(stack: Any) -> None:
    await stack.null("n", "1MiB")
    await stack.measure("n", ios=100)
    (reactor,) = (await stack.rpc("framework_get_reactors"))["reactors"]
    while True:
        (stats,) = (await stack.rpc("thread_get_stats"))["threads"]
        (polled,) = (await stack.rpc("thread_get_pollers"))["threads"]
        (again,) = (await stack.rpc("thread_get_stats"))["threads"]
        if stats["active_pollers_count"] == again["active_pollers_count"]:  # the load's poller may just be going
            break
    (thread,) = reactor["lw_threads"]
    identity = {"name": f"reactor_{stack.cores[0]}", "id": 1}
    for seen in (thread, stats, polled):
        assert {key: seen[key] for key in identity} == identity
    assert stats["cpumask"] == thread["cpumask"]
    assert stats["active_pollers_count"] == len(polled["active_pollers"])
    for poller in polled["active_pollers"]:
        assert poller["state"] in ("running", "waiting")
        assert 0 <= poller["busy_count"] <= poller["run_count"]


async def test_a_thread_has_a_channel_of_each_bdev_that_is_used_on_it(stack: Any) -> None:
    await stack.null("used", "1MiB")
    await stack.null("unused", "1MiB")
    await stack.rpc("bdev_wait_for_examine")  # who looks for partitions uses them for a moment
    async with await stack.open("used") as disk:
        await disk.read(0, 512)
        (thread,) = (await stack.rpc("thread_get_io_channels"))["threads"]
        assert thread == {"name": f"reactor_{stack.cores[0]}", "io_channels": [{"name": "bdev_used", "ref": 1}]}
    await stack.delete("used")
    assert (await stack.rpc("thread_get_io_channels"))["threads"][0]["io_channels"] == []


async def test_thread_set_cpumask_binds_the_thread_that_stats_name(make_stack: Any) -> None:
    usable = sorted(os.sched_getaffinity(0))[:2]
    if len(usable) < 2:
        pytest.skip("two cores and the real engine are needed")
    async with make_stack(cores=usable, pin=True) as stack:
        first, second = (await stack.rpc("thread_get_stats"))["threads"]
        assert [first["cpumask"], second["cpumask"]] == [format(1 << core, "x") for core in usable]
        assert await stack.rpc("thread_set_cpumask", id=first["id"], cpumask=f"[{usable[1]}]") is True
        reactors = (await stack.rpc("framework_get_reactors"))["reactors"]
        assert os.sched_getaffinity(reactors[0]["tid"]) == {usable[1]}
        assert [thread["cpumask"] for thread in (await stack.rpc("thread_get_stats"))["threads"]] == [format(1 << usable[1], "x")] * 2
        assert [reactor["lcore"] for reactor in reactors] == usable, "it keeps its name"
        for wrong, message in (
            ({"id": 0, "cpumask": "0x1"}, "Thread 0 does not exist"),
            ({"id": 3, "cpumask": "0x1"}, "Thread 3 does not exist"),
            ({"id": 1, "cpumask": "zz"}, "parameter 'cpumask': core mask 'zz' is neither"),
            ({"id": 1, "cpumask": "[1000]"}, "parameter 'cpumask': No CPU is selected from reactor mask "),
        ):
            with pytest.raises(InvalidParameters, match=message.replace("(", r"\(")):
                await stack.rpc("thread_set_cpumask", **wrong)


async def test_log_flags_are_set_cleared_and_refused_by_name(stack: Any) -> None:
    try:
        await stack.rpc("log_set_flag", flag="all")
        flags = await stack.rpc("log_get_flags")
        assert set(flags) == set(logs.FLAGS)
        assert all(flags.values())
        assert logging.getLogger("qpair.bdev").isEnabledFor(logging.DEBUG)
        await stack.rpc("log_clear_flag", flag="bdev")
        assert (await stack.rpc("log_get_flags"))["bdev"] is False
    finally:
        await stack.rpc("log_clear_flag", flag="all")
    assert not any((await stack.rpc("log_get_flags")).values())
    with pytest.raises(InvalidParameters, match="invalid log flag: parameter 'flag': 'nvme' is none of app, bdev"):
        await stack.rpc("log_set_flag", flag="nvme")


async def test_printed_lines_have_the_time_only_while_that_is_enabled(
    stack: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logging.StreamHandler()
    monkeypatch.setattr(logs, "_handler", handler)
    record = logging.LogRecord("qpair.app", logging.WARNING, "", 0, "hello", (), None)
    assert await stack.rpc("log_enable_timestamps", enabled=False) is True
    assert handler.format(record) == "WARNING qpair.app: hello"
    await stack.rpc("log_enable_timestamps", enabled=True)
    assert handler.format(record).endswith(" WARNING qpair.app: hello")
    assert handler.format(record)[:2] == "20"


async def test_the_scheduler_is_what_was_said(make_stack: Any) -> None:
    async with make_stack(wait_for_rpc=True) as stack:
        assert await stack.rpc("framework_get_scheduler") == {
            "scheduler_name": "static",
            "scheduler_period": 0,
            "isolated_core_mask": "",
            "scheduling_core": stack.cores[0],
        }
        await stack.rpc("framework_set_scheduler", name="dynamic", period=1000000)
        await stack.rpc("framework_start_init")
        assert (await stack.rpc("framework_get_scheduler"))["scheduler_name"] == "dynamic"
        assert await stack.rpc("framework_get_governor") == {}
        assert await stack.rpc("framework_get_pci_devices") == []
        assert await stack.rpc("framework_disable_cpumask_locks") is True


async def test_bdev_options_are_checked_saved_and_take_effect(make_stack: Any) -> None:
    async with make_stack(wait_for_rpc=True) as stack:
        with pytest.raises(InvalidParameters, match=r"Pool size 100 too small for cache size 256: .* at least 512"):
            await stack.rpc("bdev_set_options", bdev_io_pool_size=100)
        assert stack.bdevs.examiner.auto is True
        await stack.rpc("bdev_set_options", bdev_io_pool_size=4096)
        await stack.rpc("bdev_set_options", bdev_auto_examine=False)
        assert stack.bdevs.examiner.auto is False
        await stack.rpc("framework_start_init")
        options = (await stack.rpc("framework_get_config", name="bdev"))[0]
        assert options == {
            "method": "bdev_set_options",
            "params": {
                "bdev_io_pool_size": 4096,
                "bdev_io_cache_size": 256,
                "bdev_auto_examine": False,
                "iobuf_small_cache_size": 128,
                "iobuf_large_cache_size": 16,
            },
        }


async def test_file_keys_are_checked_listed_saved_and_forgotten(stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("NVMeTLSkey-1:...")
    path.chmod(0o640)
    with pytest.raises(NotPermitted, match="its mode is 640, nobody but its owner may have access"):
        await stack.rpc("keyring_file_add_key", name="k0", path=str(path))
    path.chmod(0o600)
    with pytest.raises(NotPermitted, match="the path must be absolute"):
        await stack.rpc("keyring_file_add_key", name="k0", path="key")
    with pytest.raises(NoSuchFile):
        await stack.rpc("keyring_file_add_key", name="k0", path=str(tmp_path / "nothing"))
    with pytest.raises(InvalidArgument, match="no ':' in their names"):
        await stack.rpc("keyring_file_add_key", name="ring:k0", path=str(path))
    assert await stack.rpc("keyring_file_add_key", name="k0", path=str(path)) is True
    with pytest.raises(AlreadyExists):
        await stack.rpc("keyring_file_add_key", name="k0", path=str(path))
    assert await stack.rpc("keyring_get_keys") == [
        {"name": "k0", "module": "keyring_file", "removed": False, "probed": False, "refcnt": 1, "path": str(path)}
    ]
    assert await stack.rpc("framework_get_config", name="keyring") == [
        {"method": "keyring_file_add_key", "params": {"name": "k0", "path": str(path)}}
    ]
    assert await stack.rpc("keyring_file_remove_key", name="k0") is True
    assert await stack.rpc("framework_get_config", name="keyring") == []
    with pytest.raises(NoSuchFile, match="no key is named 'k0'"):
        await stack.rpc("keyring_file_remove_key", name="k0")


async def test_crypto_keys_are_kept_and_their_digits_told_to_nobody_who_did_not_ask(stack: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="qpair")
    secret, other = "00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"
    await stack.rpc("accel_crypto_key_create", cipher="AES_XTS", key=secret, key2=other, name="k")
    refused = []
    for wrong in (
        {"cipher": "AES_XTS", "key": secret, "name": "x"},
        {"cipher": "AES_XTS", "key": secret, "key2": secret.upper(), "name": "x"},
        {"cipher": "AES_XTS", "key": secret, "key2": other[:-2], "name": "x"},
        {"cipher": "AES_CBC", "key": secret, "key2": other, "name": "x"},
        {"cipher": "AES_CBC", "key": secret[:-1], "name": "x"},
        {"cipher": "AES_CBC", "key": secret * 9, "name": "x"},
        {"cipher": "AES_CBC", "key": "", "name": "x"},
        {"cipher": "AES_CBC", "key": secret, "name": "k"},
    ):
        with pytest.raises(InvalidParameters) as refusal:
            await stack.rpc("accel_crypto_key_create", **wrong)
        refused.append(str(refusal.value))
    assert secret[:8] not in caplog.text + "".join(refused)
    (kept,) = await stack.rpc("accel_crypto_keys_get", key_name="k")
    assert kept == {"name": "k", "cipher": "AES_XTS", "key": secret, "key2": other, "tweak_mode": "SIMPLE_LBA"}
    assert await stack.rpc("framework_get_config", name="accel") == [{"method": "accel_crypto_key_create", "params": kept}]
    assert await stack.rpc("accel_crypto_key_destroy", key_name="k") is True
    assert await stack.rpc("accel_crypto_keys_get") == []
    with pytest.raises(InvalidParameters, match="No key object found: 'k'"):
        await stack.rpc("accel_crypto_key_destroy", key_name="k")


async def test_operations_belong_to_software_unless_assigned(make_stack: Any) -> None:
    async with make_stack(wait_for_rpc=True) as stack:
        await stack.rpc("accel_assign_opc", opname="crc32c", module="dsa")
        await stack.rpc("sock_set_default_impl", impl_name="uring")
        await stack.rpc("framework_start_init")
        assigned = await stack.rpc("accel_get_opc_assignments")
        assert assigned["crc32c"] == "dsa"
        assert assigned["copy"] == "software"
        assert await stack.rpc("sock_get_default_impl") == {"impl_name": "uring"}
