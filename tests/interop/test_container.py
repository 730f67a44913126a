"""A server in a container without privileges: namespaces of its own, no capabilities, no network, and a seccomp profile that knows no io_uring."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.process import CORE, PROGRAM, until
from missing import missing

CONFINED = Path(__file__).with_name("confined.py")
NAMESPACES = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "--net",
    "--ipc",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
NO_RIGHTS = ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
DISK = """
import qpair

class Mine(qpair.Bdev):
    def __init__(self, name, size="1MiB"):
        super().__init__(name, size)
        self.bytes = bytearray(self.size_bytes)
    def read(self, requests):
        for request in requests:
            request.data[:] = self.bytes[request.offset : request.offset + request.length]
    def write(self, requests):
        for request in requests:
            self.bytes[request.offset : request.offset + request.length] = request.data
"""


def client(*words: str) -> str:
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"
    return done.stdout


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    for name in ("unshare", "setpriv"):
        if shutil.which(name) is None:
            missing(name, "it is not installed")
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode != 0:
        missing("namespaces for ordinary users", "unshare --user is refused")
    serve = [PROGRAM, "serve", "-r", str(tmp_path / "q.sock"), "-S", str(tmp_path), "-m", f"[{CORE}]"]
    command = [*NAMESPACES, *NO_RIGHTS, "env", f"PYTHONPATH={tmp_path}", sys.executable, str(CONFINED), *serve]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=tmp_path) as process,
    ):
        yield process
        process.kill()


def first_line(server: subprocess.Popen[str], log: Path) -> str:
    assert server.stdout is not None
    lines = [server.stdout.readline(), server.stdout.readline()]
    assert lines[1] == "ready\n", lines[0] + log.read_text()
    return lines[0]


def test_everything_is_served_from_a_container_without_privileges(server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert "epoll reactors" in first_line(server, tmp_path / "log")
    (inside,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{inside}/status").read_text().splitlines())
    assert (int(status["CapEff"], 16), status["NoNewPrivs"], status["Seccomp"]) == (0, "1", "2")

    def call(method: str, **params: Any) -> Any:
        return client("rpc", "-r", str(tmp_path / "q.sock"), method, "--json", json.dumps(params))

    (tmp_path / "disk.img").write_bytes(bytes(4 << 20))
    (tmp_path / "mine.py").write_text(DISK)
    call("bdev_malloc_create", name="memory", num_blocks=8192, block_size=512)
    call("bdev_aio_create", name="file", filename=str(tmp_path / "disk.img"), block_size=512)
    call("qpair_python_create", name="python", **{"class": "mine:Mine"})
    for bdev in ("memory", "file", "python"):
        call("vhost_create_blk_controller", ctrlr=f"{bdev}.vhost", dev_name=bdev)
        result = json.loads(client("perf", f"vhost:{tmp_path / bdev}.vhost", "--pattern", "randrw", "--verify", "--time", "0.5", "--json"))
        assert result["errors"] == 0, bdev
        assert result["ios"] > 100, bdev
    subprocess.run(["kill", "-TERM", inside], check=True)
    assert server.wait(30) == 0, (tmp_path / "log").read_text()
    until(lambda: not (tmp_path / "q.sock").exists(), "the socket is gone")


def test_what_is_forbidden_there_is_forbidden_here() -> None:
    """Lest the test above be one of a server that may do all."""
    look = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); print(libc.syscall(425, 1, None), ctypes.get_errno())"
    done = subprocess.run([sys.executable, str(CONFINED), sys.executable, "-c", look], capture_output=True, text=True, timeout=30)
    assert done.stdout == "-1 1\n", done.stderr
