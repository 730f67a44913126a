"""``qpair serve`` is killed while a guest writes, and started again with what was its configuration: the guest notices a pause, and nothing else.

``QPAIR_CRASH_ROUNDS``: how often it is killed (default 3; `make soak`: 50).
"""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from interop.peers import QpairServer
from interop.records import Records
from linux_guest import Guest, RunningGuest, vhost_user_blk_args

JOBS = Path(__file__).parent / "jobs"
ROUNDS = int(os.environ.get("QPAIR_CRASH_ROUNDS", "3"))
WRITERS, BLOCKS = 8, 32768
DISK_BYTES = 16 << 20


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder on tmpfs: what is written there is written, kill or not, and costs no disk."""
    folder = Path(tempfile.mkdtemp(prefix="qpair-crash-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def fresh(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as image:
        image.truncate(size_bytes)
    return path


def sockets_args(folder: Path, *, packed: bool, listens: bool) -> list[str]:
    """Two disks, each with a connection that is made again: by the guest's machine, or by the server if the machine ``listens``."""
    role: dict[str, Any] = {"server": True} if listens else {"reconnect_ms": 100}
    disks = [vhost_user_blk_args(folder / name, name=name, packed=packed, **role) for name in ("verified", "recorded")]
    return [word for words in disks for word in words]


def wait_until(condition: Callable[[], bool], what: str, machine: RunningGuest, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}\n{machine.outcome.console[-2000:]}"
        time.sleep(0.02)


@pytest.mark.parametrize(("packed", "listens"), [(False, False), (True, False), (True, True)], ids=["split", "packed", "packed-listening"])
def test_a_guest_of_a_server_that_is_killed_sees_no_error_and_loses_and_doubles_no_acknowledged_write(
    guest: Guest, memory_folder: Path, tmp_path: Path, packed: bool, listens: bool
) -> None:
    records = Records(memory_folder / "recorded.img", WRITERS, BLOCKS)
    fresh(records.image, records.image_bytes)
    fresh(memory_folder / "verified.img", DISK_BYTES)
    draw = random.Random(20261128)
    server = QpairServer(tmp_path)
    try:
        for name in ("verified", "recorded"):
            server.rpc("bdev_aio_create", name=name, filename=str(memory_folder / f"{name}.img"), block_size=512)
            params = {"ctrlr": name, "dev_name": name, "packed_ring": packed}
            server.rpc("qpair_vhost_create_blk_controller", **params, client=True) if listens else server.export_disk(
                name, name, packed_ring=packed
            )
        config = tmp_path / "config.json"
        config.write_text(server.spdk_rpc("save_config"))
        variables = {"DISK": "vdb", "RECORDS": "vdc", "WRITERS": str(WRITERS), "BLOCKS": str(BLOCKS)}
        with guest.start(
            [JOBS / "crash.sh"],
            files=[JOBS / "records.py"],
            qemu_args=sockets_args(tmp_path, packed=packed, listens=listens),
            variables=variables,
            timeout_s=120 + 10 * ROUNDS,
        ) as machine:
            machine.wait_for("GUEST-PAUSED", timeout_s=120)
            for number in range(ROUNDS):
                wait_until(records.grew, f"round {number}: a record", machine)
                time.sleep(draw.uniform(0, 1.5))
                server.kill()
                records.look()
                server = QpairServer(tmp_path, "-c", str(config))
            wait_until(records.grew, "a record after the last start", machine)
            machine.resume()
            outcome = machine.wait()
    finally:
        server.stop()
    assert outcome.rc == 0, outcome.console
    assert outcome.values["crash:complaints"] == "0", outcome.console
    assert int(outcome.values["crash:rounds"]) > 0
    records.look([int(count) for count in outcome.values["crash:records"].split()])
