"""Configuration files that mean no good, and saving at a bad moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile.front_end import READ_IN, FrontEnd
from hostile.process import CORE, Serve

MIB = 1 << 20


def entry(method: str, **params: object) -> dict[str, object]:
    return {"method": method, "params": params}


def whole(*calls: object) -> bytes:
    return json.dumps({"subsystems": [{"subsystem": "bdev", "config": list(calls)}]}).encode()


MALLOC = entry("bdev_malloc_create", name="m", num_blocks=2048, block_size=512)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not JSON"),
    "no JSON": (b"\x7fELF" + bytes(1000), "not JSON"),
    "invalid UTF-8": (b'{"subsystems": "\xff"}', "not JSON"),
    "an array": (b"[]", "it must be an object with an array 'subsystems'"),
    "a comment that never ends": (b"/* " * 100_000, "not JSON"),
    "a string that never ends": (b'{"' + b"\\" * 1_000_001, "not JSON"),
    "a string of quotes that never ends": (b'{"' + b'\\"' * 500_000 + b"\\", "not JSON"),
    "deep nesting": (b'{"subsystems": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deep"),
    "17 MiB": (b" " * (17 * MIB), "longer than 16777216 bytes"),
    "70000 entries": (whole(*[entry("bdev_wait_for_examine")] * 70_000), "more than 65536 entries"),
    "an unknown method": (whole(MALLOC, entry("no_such")), "subsystem 'bdev', entry 2, method 'no_such': no such method"),
    "a wrong type": (whole(entry("bdev_malloc_create", num_blocks="x")), "entry 1, method 'bdev_malloc_create'"),
    "a name twice": (whole(MALLOC, MALLOC), "entry 2, method 'bdev_malloc_create': File exists"),
    "a bdev that is not there": (
        whole(entry("vhost_create_blk_controller", ctrlr="c", dev_name="gone")),
        "entry 1, method 'vhost_create_blk_controller': No such device",
    ),
    "a huge number": (b'{"subsystems": [{"subsystem": "bdev", "config": [' + b"9" * 10_000 + b"]}]}", "not JSON"),
    "2**64 blocks": (whole(entry("bdev_null_create", name="n", num_blocks=2**64, block_size=512)), "entry 1, method 'bdev_null_create'"),
    "2**63 blocks": (whole(entry("bdev_null_create", name="n", num_blocks=2**63, block_size=4096)), "entry 1, method 'bdev_null_create'"),
    "nested batches": (whole([[MALLOC]]), "batches do not nest"),
    "an entry with more": (whole({"method": "bdev_wait_for_examine", "evil": 1}), "unknown member 'evil'"),
    "a member twice": (b'{"subsystems": [], "subsystems": []}', "'subsystems' is given twice"),
    "subsystems of null": (b'{"subsystems": [null]}', "subsystems, element 1"),
    "half a character": (
        whole(entry("bdev_aio_create", name="a", filename="/\ud800", block_size=512)),
        "entry 1, method 'bdev_aio_create'",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_cannot_be_ends_the_start_by_name_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[what]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with Serve(tmp_path, "-c", str(file), wait=False) as server:
        assert server.process.wait(60) == 1
        assert reason in server.log(), server.log()[:2000]
        assert "Traceback" not in server.log(), server.log()
        assert len(server.log()) < 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "q.log"]


@pytest.mark.parametrize("what", ["missing", "a directory", "unreadable", "a pipe without a writer's end"])
def test_a_file_that_cannot_be_read_ends_the_start_by_name(what: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if what == "a directory":
        file.mkdir()
    elif what == "unreadable":
        file.symlink_to("/proc/self/mem")
    elif what != "missing":
        file.symlink_to("/dev/null")
    with Serve(tmp_path, "-c", str(file), wait=False) as server:
        assert server.process.wait(20) == 1
        assert str(file) in server.log()
        assert "Traceback" not in server.log(), server.log()


SPDK = {
    "subsystems": [
        {"subsystem": "keyring", "config": []},
        {"subsystem": "iobuf", "config": [entry("iobuf_set_options", small_pool_count=8192, large_pool_count=1024, small_bufsize=8192)]},
        {"subsystem": "sock", "config": [entry("sock_set_default_impl", impl_name="posix")]},
        {"subsystem": "vmd", "config": []},
        {"subsystem": "accel", "config": [entry("accel_set_options", small_cache_size=128, large_cache_size=16, task_count=2048)]},
        {
            "subsystem": "bdev",
            "config": [
                entry("bdev_set_options", bdev_io_pool_size=65535, bdev_io_cache_size=256, bdev_auto_examine=True),
                entry("bdev_malloc_create", name="Malloc0", num_blocks=8192, block_size=512, physical_block_size=512),
                entry("bdev_wait_for_examine"),
            ],
        },
        {"subsystem": "scsi", "config": None},
        {"subsystem": "scheduler", "config": [entry("framework_set_scheduler", name="static")]},
        {
            "subsystem": "vhost_blk",
            "config": [entry("vhost_create_blk_controller", ctrlr="blk0", dev_name="Malloc0", cpumask=f"{1 << CORE:x}", readonly=False)],
        },
    ]
}


def test_a_configuration_that_spdk_saved_serves_its_disk(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SPDK, indent=2))
    with Serve(tmp_path, "-c", str(file)) as server:
        with FrontEnd(tmp_path / "blk0").ready() as front_end:
            assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0
        assert server.end() == 0, server.log()


SAVER = """
import asyncio, sys
import qpair

async def main():
    async with qpair.Stack(cores=CORE, pin=False, vhost_dir=sys.argv[1]) as stack:
        names = [f"{'n' * 200}{number}" for number in range(400)]
        for name in names:
            await stack.null(name, "1MiB")
        run = await stack.perf(names[0], seconds=60, depth=8)
        stack.save_config(sys.argv[2])
        print("ready", flush=True)
        number = 0
        while True:
            number += 1
            await stack.null(f"x{number}", "1MiB")
            stack.save_config(sys.argv[2])
            await asyncio.sleep(0)

asyncio.run(main())
"""


def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    counts = []
    for round_number in range(12):
        command = [sys.executable, "-c", SAVER.replace("CORE", str(CORE)), str(tmp_path), str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.01 + 0.0137 * round_number)
            process.send_signal(signal.SIGKILL)
        saved = json.loads(file.read_text())
        (calls,) = [subsystem["config"] for subsystem in saved["subsystems"] if subsystem["subsystem"] == "bdev"]
        counts.append(len([call for call in calls if call["method"] == "bdev_null_create"]))
        assert counts[-1] >= 400
    assert max(counts) > 400, "no save was under way"
    assert os.stat(file).st_mode & 0o777 == 0o600
    with Serve(tmp_path, "-c", str(file)) as server:
        assert len(server.rpc("bdev_get_bdevs")) == counts[-1]
        assert server.end() == 0
