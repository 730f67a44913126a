"""The units that ``qpair serve --print-unit`` prints, under a real systemd: started as an ordinary user without rights, watched, restarted, stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.process import CORE, PROGRAM, until
from interop.booted import Booted, lacking
from missing import missing

RPC = "/run/qpair/rpc.sock"
DISK = "/run/qpair/disk0"
EXPOSURE_MAX = 20
"""Of systemd-analyze's 100 tenths: "OK" ends at 4.0."""


def printed(kind: str) -> str:
    return subprocess.run([PROGRAM, "serve", "--print-unit", kind], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Booted]:
    if (lack := lacking()) is not None:
        missing("a systemd of one's own", lack)
    # The clone may lie where a hardened service sees nothing, and /dev of a namespace cannot be made anew; a shorter patience than an operator's.
    changes = f"[Service]\nProtectHome=no\nPrivateTmp=no\nPrivateDevices=no\nWatchdogSec=2s\nTimeoutAbortSec=2s\nEnvironment='QPAIR_OPTIONS=-m [{CORE}]'\n"
    units = {
        "qpair.service": printed("service"),
        "qpair.service.d/test.conf": changes,
        "qpair.socket": printed("socket").replace("# A line", f"ListenStream={DISK}\n# A line"),
    }
    with Booted(tmp_path / "systemd", units, users=("qpair",)) as booted:
        yield booted


def call(systemd: Booted, method: str, *words: str) -> str:
    return systemd.run(PROGRAM, "rpc", "-r", RPC, method, *words)


def export(systemd: Booted) -> None:
    call(systemd, "bdev_malloc_create", "--name", "m0", "--num-blocks", "2048", "--block-size", "512")
    call(systemd, "vhost_create_blk_controller", "--ctrlr", "disk0", "--dev-name", "m0")


def test_a_server_under_systemd_lives_and_is_brought_back(systemd: Booted) -> None:
    until(lambda: systemd.show("qpair.service", "ActiveState") == "active", "READY is told", timeout_s=60)
    assert RPC in systemd.show("qpair.service", "StatusText")
    pid = systemd.show("qpair.service", "MainPID")
    status = dict(line.split(":\t", 1) for line in systemd.run("cat", f"/proc/{pid}/status").splitlines())
    assert status["Uid"].split() == ["990"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    export(systemd)
    systemd.run(PROGRAM, "perf", f"vhost:{DISK}", "--time", "0.5", "--json")
    assert systemd.run("stat", "-c", "%a %U", RPC).split() == ["660", "qpair"]

    # An upgrade: what it serves is there afterwards, and so is the one who is watched.
    systemd.run("systemctl", "reload", "qpair.service")
    until(lambda: systemd.show("qpair.service", "MainPID") not in (pid, "0"), "the successor is the service", timeout_s=30)
    assert systemd.show("qpair.service", "ActiveState") == "active"
    assert json.loads(call(systemd, "bdev_get_bdevs"))[0]["name"] == "m0"
    systemd.run(PROGRAM, "perf", f"vhost:{DISK}", "--time", "0.5", "--json")
    pid = systemd.show("qpair.service", "MainPID")
    time.sleep(3)
    assert systemd.show("qpair.service", "MainPID") == pid, "the watchdog is told"
    assert systemd.show("qpair.service", "NRestarts") == "0"

    # It hangs: nobody is refused meanwhile, and the next one answers.
    systemd.run("kill", "-STOP", pid)
    begin = time.monotonic()
    assert json.loads(call(systemd, "bdev_get_bdevs")) == [], "another server, which has not been told of disks"
    assert time.monotonic() - begin < 30
    assert systemd.show("qpair.service", "NRestarts") == "1"
    assert systemd.show("qpair.service", "MainPID") != pid
    export(systemd)
    systemd.run(PROGRAM, "perf", f"vhost:{DISK}", "--time", "0.5", "--json")

    systemd.run("systemctl", "stop", "qpair.service")
    assert systemd.show("qpair.service", "Result") == "success"
    assert systemd.show("qpair.service", "ExecMainStatus") == "0"
    # Who comes now starts it.
    assert "qpair" in call(systemd, "spdk_get_version")
    assert systemd.show("qpair.service", "ActiveState") == "active"


@pytest.mark.parametrize("kind", ["service", "socket"])
def test_the_units_are_without_fault(kind: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze", "it is not installed")
    for each in ("service", "socket"):
        (tmp_path / f"qpair.{each}").write_text(printed(each))
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / f"qpair.{kind}")], capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "qpair" in line] == []


def test_the_service_is_confined(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze", "it is not installed")
    (tmp_path / "qpair.service").write_text(printed("service"))
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", str(tmp_path / "qpair.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout.splitlines()[-1]
