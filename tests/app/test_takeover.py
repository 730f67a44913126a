"""``qpair serve --takeover``: the front end does not notice; who may not is refused; whatever breaks, somebody goes on serving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.process import PROGRAM, Perf, Serve, until
from missing import missing

PEER = Path(__file__).with_name("takeover_peer.py")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serve]:
    """A disk in memory, one in a file, one upon both; each exported."""
    with Serve(tmp_path) as server:
        server.malloc("ram", 16)
        (tmp_path / "disk.img").write_bytes(bytes(16 << 20))
        server.rpc("bdev_aio_create", name="file", filename=str(tmp_path / "disk.img"), block_size=512)
        server.rpc("bdev_passthru_create", name="upon", base_bdev_name="ram")
        server.export("ram0", "upon")
        server.export("file0", "file")
        yield server


def take(served: Serve, *options: str, check: bool = True) -> Serve:
    successor = Serve(served.folder, "--takeover", *options, name="q", wait=False)
    if check:
        successor.wait_ready()
    return successor


def config(server: Serve) -> Any:
    names = [entry["subsystem"] for entry in server.rpc("framework_get_subsystems")]
    return {name: server.rpc("framework_get_config", name=name) for name in names}


def by_name(server: Serve) -> dict[str, Any]:
    return {bdev["name"]: bdev for bdev in server.rpc("bdev_get_bdevs")}


def under_load(served: Serve, disk: str, seconds: int = 4) -> Perf:
    load = Perf(
        f"vhost:{served.folder / disk}", "-m", str(max(os.sched_getaffinity(0))), "-w", "randrw", "-q", "16", "-t", str(seconds), "--verify"
    )
    until(lambda: served.rpc("vhost_get_controllers", name=disk)[0]["sessions"], "the load is connected")
    until(lambda: reads(served, disk) > 1000, "the load runs")
    return load


def reads(server: Serve, disk: str) -> int:
    [session] = server.rpc("vhost_get_controllers", name=disk)[0]["sessions"]
    return int(sum(queue["requests"] for queue in session["queues"]))


def served_well(load: Perf) -> dict[str, Any]:
    result = load.result()
    assert load.process.returncode == 0, result
    assert result["errors"] == result["verify_errors"] == 0
    return result


# -- as it should be --------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", ["ram0", "file0"])
def test_a_front_end_under_load_goes_on_and_its_data_are_there(served: Serve, disk: str) -> None:
    before = config(served)
    load = under_load(served, disk)
    with take(served) as successor:
        assert served.process.wait(20) == 0
        assert config(successor) == before
        until(lambda: reads(successor, disk) > 1000, "I/O goes on at the successor")
        with take(served) as third:
            assert successor.process.wait(20) == 0, "and so it does at a third"
            served_well(load)
            again = Perf(f"vhost:{served.folder / disk}", "-t", "0.2")
            assert again.result()["ios"] > 0, "and newcomers find it where it was"
            assert third.end() == 0
    assert not served.socket.exists(), "the last one leaves no socket"
    assert not (served.folder / disk).exists()
    assert not served.lines("Traceback|ERROR|CRITICAL")


def test_data_in_memory_and_limits_and_names_come_along(served: Serve) -> None:
    image = served.folder / "data"
    image.write_bytes(os.urandom(8 << 20))
    subprocess.run([PROGRAM, "dd", f"--if={image}", f"--of=vhost:{served.folder / 'ram0'}"], check=True, capture_output=True)
    served.rpc("bdev_set_qos_limit", name="ram", rw_ios_per_sec=100_000)
    before = by_name(served)
    with take(served) as successor:
        assert served.process.wait(20) == 0
        assert by_name(successor) == before
        copy = served.folder / "copy"
        subprocess.run(
            [PROGRAM, "dd", f"--if=vhost:{served.folder / 'ram0'}", f"--of={copy}", "--count", "16384", "--bs", "512"],
            check=True,
            capture_output=True,
        )
        assert copy.read_bytes()[: 8 << 20] == image.read_bytes()


def test_a_mirror_with_superblocks_and_its_parts_are_there_afterwards(served: Serve) -> None:
    for number in range(2):
        image = served.folder / f"leg{number}.img"
        image.write_bytes(bytes(16 << 20))
        served.rpc("bdev_aio_create", name=f"leg{number}", filename=str(image), block_size=512)
    served.rpc("bdev_raid_create", name="mirror", raid_level="raid1", base_bdevs=["leg0", "leg1"], superblock=True)
    served.rpc("bdev_split_create", base_bdev="mirror", split_count=2)
    served.export("half0", "mirrorp0")
    load = under_load(served, "half0")
    before = by_name(served)
    with take(served) as successor:
        assert served.process.wait(20) == 0
        assert by_name(successor) == before
        served_well(load)
        [array] = successor.rpc("bdev_raid_get_bdevs", category="online")
        assert array["num_base_bdevs_operational"] == 2
    assert not served.lines("ERROR|CRITICAL|Traceback")


def test_the_pid_file_is_the_successors(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with Serve(tmp_path, "-f", str(pid_file)) as served, take(served, "-f", str(pid_file)) as successor:
        assert served.process.wait(20) == 0
        assert pid_file.read_text() == f"{successor.pid}\n"
        assert successor.end() == 0
        assert not pid_file.exists()


def test_a_signal_starts_a_successor_with_the_same_options(tmp_path: Path) -> None:
    disk = {"method": "bdev_null_create", "params": {"name": "n", "num_blocks": 8, "block_size": 512}}
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": [disk]}]}))
    with Serve(tmp_path, "-c", str(saved), "-f", str(tmp_path / "pid")) as served:
        served.rpc("bdev_null_delete", name="n")
        served.malloc("ram")
        served.process.send_signal(signal.SIGUSR2)
        assert served.process.wait(20) == 0
        until(lambda: (tmp_path / "pid").exists(), "the successor has started")
        pid = int((tmp_path / "pid").read_text())
        assert pid != served.pid
        until(lambda: alive_rpc(served), "it answers")
        assert [bdev["name"] for bdev in served.rpc("bdev_get_bdevs")] == ["ram"], "what is, not what the file says"
        os.kill(pid, signal.SIGTERM)
        until(lambda: not served.socket.exists(), "it ends")


# -- who may not ------------------------------------------------------------------------------------


def refusal(served: Serve, step: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, PEER, str(served.socket), step], capture_output=True, text=True, timeout=60, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return answer["error"]


def test_a_version_that_cannot_is_refused_by_name(served: Serve) -> None:
    assert "protocol versions [99] were asked for" in str(refusal(served, "version"))
    assert served.rpc("bdev_get_bdevs")


def test_another_user_is_refused_by_name(served: Serve) -> None:
    if os.geteuid() != 0:
        missing("another user", "it takes root to become somebody else")
    served.socket.chmod(0o666)
    served.folder.chmod(0o755)
    for parent in served.folder.parents:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    # What nobody may not read is imported before.
    become = 'if __name__ == "__main__":\n    os.setgid(65534)\n    os.setuid(65534)'
    script = PEER.read_text().replace('if __name__ == "__main__":', become)
    done = subprocess.run([sys.executable, "-", str(served.socket), "x"], input=script, capture_output=True, text=True, timeout=60)
    assert "belongs to user 65534, this one to user 0" in done.stdout, done
    assert served.rpc("bdev_get_bdevs")


def test_what_cannot_be_taken_over_is_named(tmp_path: Path) -> None:
    done = subprocess.run([PROGRAM, "serve", "--takeover", "-r", str(tmp_path / "none.sock")], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "no server answers on" in done.stderr


def test_a_second_taker_waits_for_nothing(served: Serve) -> None:
    first = subprocess.Popen([sys.executable, PEER, str(served.socket), "wait at offer"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.readline()
    try:
        error = refusal(served, "leave at once")
        assert "a takeover is under way" in str(error)
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    until(lambda: alive_rpc(served), "RPC is back")


def alive_rpc(served: Serve) -> bool:
    try:
        return bool(served.rpc("bdev_get_bdevs"))
    except OSError:
        return False


# -- what breaks ------------------------------------------------------------------------------------

STEPS = [
    "leave at once",
    *(f"{what} at {where}" for where in ("offer", "handover") for what in ("die", "fail", "nonsense", "close")),
    "ready at offer",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_taker_that_breaks_off_leaves_all_as_it_was(served: Serve, step: str) -> None:
    before = config(served)
    load = under_load(served, "ram0", seconds=3 if step.startswith(("die", "fail", "leave")) else 5)
    peer = subprocess.Popen([sys.executable, PEER, str(served.socket), step], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: served.lines("takeover (given up|failed)"), "the giver notices", timeout_s=30)
        if "at handover" in step and not step.startswith("fail"):
            until(lambda: peer.poll() is not None, "a taker that does not let go is ended")
        until(lambda: alive_rpc(served), "RPC is back")
        assert config(served) == before
        served_well(load)
    finally:
        peer.kill()
        peer.wait()
    with take(served) as successor:
        assert served.process.wait(20) == 0, "and a good one may have it later"
        assert config(successor) == before


def test_a_giver_that_dies_before_it_gave_is_no_success(served: Serve) -> None:
    served.process.send_signal(signal.SIGSTOP)
    successor = take(served, check=False)
    with successor:
        served.process.kill()
        served.process.send_signal(signal.SIGCONT)
        assert successor.process.wait(30) == 1


def test_a_successor_that_cannot_make_it_all_again_rolls_back(served: Serve) -> None:
    load = under_load(served, "ram0", seconds=5)
    mark = served.mark()
    # As a version would that has lost a method.
    script = served.folder / "taker.py"
    script.write_text(
        "import os, sys\n"
        "from qpair.app import config\n"
        "real = config.load_runtime\n"
        "async def broken(stack, given):\n"
        "    given.entries = [e for e in given.entries if e.method != 'bdev_passthru_create']\n"
        "    await real(stack, given)\n"
        "import qpair.app.takeover.taker as taker\n"
        "taker.load_runtime = broken\n"
        "from qpair.cli import main\n"
        f"sys.argv = ['qpair', 'serve', '--takeover', '-r', {str(served.socket)!r}]\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "upon" in done.stderr
    assert served.lines("takeover failed, going on: process .*upon", since=mark)
    until(lambda: alive_rpc(served), "RPC is back")
    served_well(load)
