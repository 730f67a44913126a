"""Configuration files: SPDK's format in, refusals by name, atomic on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpair.app.config import parse
from qpair.app.rooms import load_rpc
from qpair.errors import ConfigError, NoSuchFile

load_rpc()

# What a release of SPDK writes with two disks and nothing else configured, shortened to one entry a method.
SAVED_BY_SPDK = """{
  "subsystems": [
    {"subsystem": "fsdev", "config": [{"method": "fsdev_set_opts", "params": {"fsdev_io_pool_size": 65535, "fsdev_io_cache_size": 256}}]},
    {"subsystem": "keyring", "config": [{"method": "keyring_linux_set_options", "params": {"enable": false}}]},
    {"subsystem": "iobuf", "config": [{"method": "iobuf_set_options", "params": {"small_pool_count": 8192, "large_pool_count": 1024,
      "small_bufsize": 8192, "large_bufsize": 135168, "enable_numa": false}}]},
    {"subsystem": "sock", "config": [
      {"method": "sock_set_default_impl", "params": {"impl_name": "posix"}},
      {"method": "sock_impl_set_options", "params": {"impl_name": "ssl", "recv_buf_size": 4096, "enable_zerocopy_send": true}},
      {"method": "sock_impl_set_options", "params": {"impl_name": "posix", "recv_buf_size": 2097152, "enable_ktls": false}}]},
    {"subsystem": "vmd", "config": []},
    {"subsystem": "accel", "config": [{"method": "accel_set_options", "params": {"small_cache_size": 128, "task_count": 2048}},
      {"method": "dsa_scan_accel_module", "params": {"config_kernel_mode": true}},
      {"method": "accel_assign_opc", "params": {"opname": "crc32c", "module": "dsa"}}]},
    {"subsystem": "bdev", "config": [
      {"method": "bdev_set_options", "params": {"bdev_io_pool_size": 65535, "bdev_io_cache_size": 256, "bdev_auto_examine": true}},
      {"method": "bdev_raid_set_options", "params": {"process_window_size_kb": 1024, "process_max_bandwidth_mb_sec": 0}},
      {"method": "bdev_iscsi_set_options", "params": {"timeout_sec": 30}},
      {"method": "bdev_nvme_set_options", "params": {"action_on_timeout": "none", "dhchap_digests": ["sha256"], "bdev_retry_count": 3}},
      {"method": "bdev_nvme_set_hotplug", "params": {"period_us": 100000, "enable": false}},
      {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 8192, "block_size": 512, "physical_block_size": 512,
        "uuid": "5b6a5f0e-7f0a-4b5c-9f33-2f6f0a3f1a11", "optimal_io_boundary": 0, "md_size": 0, "dif_type": 0, "dif_is_head_of_md": false,
        "dif_pi_format": 0, "numa_id": -1}},
      {"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 2048, "block_size": 512, "physical_block_size": 512, "md_size": 0,
        "dif_type": 0, "uuid": "1c2f2f5e-0c43-4a39-b1c5-6d38a0b9e0d2", "preferred_write_granularity": 0}},
      {"method": "bdev_wait_for_examine"}]},
    {"subsystem": "nbd", "config": []},
    {"subsystem": "scheduler", "config": [{"method": "framework_set_scheduler", "params": {"name": "static"}}]},
    {"subsystem": "nvmf", "config": [
      {"method": "nvmf_set_config", "params": {"discovery_filter": "match_any", "admin_cmd_passthru": {"identify_ctrlr": false}}},
      {"method": "nvmf_set_max_subsystems", "params": {"max_subsystems": 1024}},
      {"method": "nvmf_set_crdt", "params": {"crdt1": 0, "crdt2": 0, "crdt3": 0}}]},
    {"subsystem": "iscsi", "config": [{"method": "iscsi_set_options", "params": {"node_base": "iqn.2016-06.io.spdk", "max_sessions": 128}}]}
  ]
}"""


async def test_a_configuration_saved_by_spdk_loads_and_is_saved_again(make_stack: Any, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", logger="qpair")
    path = tmp_path / "spdk.json"
    path.write_text("// saved by hand\n" + SAVED_BY_SPDK.replace('"vmd"', '/* nothing */ "vmd"'))
    async with make_stack(wait_for_rpc=True) as stack:
        await stack.load_config(path)
        assert [info.name for info in stack.bdevs.infos()] == ["Malloc0", "Null0"]
        assert caplog.text.count("sock_impl_set_options is remembered for save_config and has no effect here") == 1
        stack.save_config(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    calls = {name["subsystem"]: name["config"] for name in again["subsystems"]}
    assert [call["params"]["impl_name"] for call in calls["sock"]] == ["posix", "ssl", "posix"]
    assert [call["method"] for call in calls["bdev"]] == [
        "bdev_set_options",
        "bdev_iscsi_set_options",
        "bdev_nvme_set_options",
        "bdev_nvme_set_hotplug",
        "bdev_malloc_create",
        "bdev_null_create",
        "bdev_wait_for_examine",
    ]
    async with make_stack(wait_for_rpc=True) as stack:
        await stack.load_config(tmp_path / "again.json")
        stack.save_config(tmp_path / "third.json")
    assert json.loads((tmp_path / "third.json").read_text()) == again


def entry(text: str) -> bytes:
    return f'{{"subsystems": [{{"subsystem": "bdev", "config": [{text}]}}]}}'.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cfg: not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[]", "cfg: it must be an object with an array 'subsystems'"),
        (b'{"subsystems": {}}', "cfg: it must be an object with an array 'subsystems'"),
        (b'{"subsystems": [5]}', "cfg: subsystems, element 1: it must be an object with a string 'subsystem'"),
        (b'{"subsystems": [{"subsystem": "bdev", "config": 5}]}', "cfg: subsystem 'bdev': 'config' must be an array or null"),
        (entry("5"), "cfg: subsystem 'bdev', entry 1: it must be an object with 'method'"),
        (entry("[[]]"), "cfg: subsystem 'bdev', entry 1: it must be an object with 'method' (batches do not nest)"),
        (entry('{"params": {}}'), "cfg: subsystem 'bdev', entry 1: 'method' must be a string"),
        (entry('{"method": "m", "x": 1}'), "cfg: subsystem 'bdev', entry 1: unknown member 'x'; an entry has 'method' and 'params'"),
        (entry('{"method": "no_such"}'), "cfg: subsystem 'bdev', entry 1, method 'no_such': no such method"),
        (
            entry(
                '{"method": "bdev_wait_for_examine"}, {"method": "bdev_malloc_create", "params": {"block_size": 512, "num_blocks": "8"}}'
            ),
            (
                "cfg: subsystem 'bdev', entry 2, method 'bdev_malloc_create': bdev_malloc_create: parameter 'num_blocks': "
                "Expected `int`, got `str`"
            ),
        ),
        (
            entry('{"method": "bdev_get_bdevs", "params": {"timeout": "\\ud800"}}'),
            (
                "cfg: subsystem 'bdev', entry 1, method 'bdev_get_bdevs': bdev_get_bdevs: a text holds '\\ud800', which is half of a character"
            ),
        ),
        (entry('{"method": "a", "method": "b"}'), "cfg: 'method' is given twice in one object"),
        (b'{"a":' * 5000, "cfg: not JSON: "),
    ],
)
def test_a_bad_entry_is_refused_by_name_before_anything_is_called(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(data, source="cfg")
    assert str(refused.value).startswith(message)


@given(st.binary(max_size=100) | st.text('{}[]"subsystem:config,/* \\', max_size=80).map(str.encode))
def test_any_bytes_parse_or_are_refused_by_name(data: bytes) -> None:
    refusal = ""
    try:
        parse(data, source="cfg")
    except ConfigError as error:
        refusal = str(error)
    assert refusal == "" or refusal.startswith("cfg: ")


async def test_what_the_engine_refuses_is_named_too(make_stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    twice = '{"method": "bdev_null_create", "params": {"name": "n", "num_blocks": 8, "block_size": 512}}'
    path.write_bytes(entry(f"{twice}, {twice}"))
    async with make_stack(wait_for_rpc=True) as stack:
        with pytest.raises(ConfigError, match=r"c.json: subsystem 'bdev', entry 2, method 'bdev_null_create': File exists: "):
            await stack.load_config(path)
    async with make_stack() as stack:
        with pytest.raises(NoSuchFile, match="nothing: no such file"):
            await stack.load_config(tmp_path / "nothing")


async def test_a_batch_in_a_configuration_is_its_calls(make_stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    calls = [{"method": "bdev_null_create", "params": {"name": f"n{number}", "num_blocks": 8, "block_size": 512}} for number in range(3)]
    path.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": [calls]}]}))
    async with make_stack() as stack:
        await stack.load_config(path)
        assert [info.name for info in stack.bdevs.infos()] == ["n0", "n1", "n2"]


async def test_a_save_that_fails_leaves_the_old_file(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.json"
    stack.save_config(path)
    before = path.read_text()
    await stack.null("n", "1MiB")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as refused:
        stack.save_config(path)
    assert refused.value.errno == 28
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["c.json"]


async def test_a_saved_file_is_private_and_whole(stack: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    await stack.null("n", "1MiB")
    stack.save_config(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert "bdev_null_create" in path.read_text()


async def test_a_save_is_synced_before_it_takes_the_name_and_the_name_is_synced_too(
    stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.json"
    path.write_text("old")
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append("sync " + ("folder" if name == str(tmp_path) else "file"))
        assert name == str(tmp_path) or "bdev_null_create" in Path(name).read_text(), "all of it is there to be synced"
        real_sync(descriptor)

    def replace(source: str, target: str) -> None:
        steps.append("rename")
        assert Path(target).read_text() == "old", "until then, the old one"
        real_replace(source, target)

    await stack.null("n", "1MiB")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    stack.save_config(path)
    assert steps == ["sync file", "rename", "sync folder"]
    assert json.loads(path.read_text())["subsystems"]
    assert os.listdir(tmp_path) == ["c.json"]
