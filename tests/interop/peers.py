"""The programs that the interoperability tests talk to, each started and ended here.

`StorageDaemon` is QEMU's own vhost-user-blk server: the yardstick for our target (a test that fails against it
too is wrong itself) and a foreign target for our initiator. `QpairServer` is ``qpair serve`` in a process of its own. `QemuIo` and
`QemuImg` are vhost-user-blk clients by way of libblkio, without a guest.

Every program is ended by its pid when its ``with`` block is left, whatever happened in it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from spdk.rpc.client import JSONRPCClient

from linux_guest import Guest

START_S = 20
STOP_S = 20


class Server:
    """A process that listens on a unix socket, with its output kept for the report of a failure."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path, ready: Callable[[], bool]) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self._wait_until(ready, command[0])

    def _wait_until(self, ready: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{name} is not ready (status {self.process.returncode}):\n{self.log.read_text()}")
            time.sleep(0.01)

    def stop(self) -> int:
        """SIGTERM, then SIGKILL after `STOP_S`; returns the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def kill(self) -> None:
        """SIGKILL, and waits until nothing of it is left."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class StorageDaemon(Server):
    """qemu-storage-daemon exporting one image file (or null-co) by vhost-user-blk."""

    def __init__(
        self,
        guest: Guest,
        folder: Path,
        image: Path | None,
        *,
        queues: int = 2,
        writable: bool = True,
        block_size: int = 512,
        size_bytes: int = 1 << 30,
    ) -> None:
        self.socket = folder / "storage-daemon.sock"
        node = f"driver=file,filename={image},node-name=disk,discard=unmap" if image else f"driver=null-co,size={size_bytes},node-name=disk"
        export = f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={self.socket},num-queues={queues},logical-block-size={block_size}"
        words = ["--blockdev", node, "--export", f"{export},writable={'on' if writable else 'off'}"]
        super().__init__(
            [*guest.qemu_command("qemu-storage-daemon"), *words], guest.environment, folder / "storage-daemon.log", self.socket.exists
        )


class QpairServer(Server):
    """``qpair serve`` with an RPC client of SPDK's connected to it."""

    def __init__(self, folder: Path, *options: str, cores: str = "0x3", log: str = "qpair.log") -> None:
        self.folder = folder
        self.rpc_socket = folder / "rpc.sock"
        program = str(Path(sys.executable).with_name("qpair"))
        command = [program, "serve", "-r", str(self.rpc_socket), "-m", cores, "-S", str(folder), *options]
        super().__init__(command, dict(os.environ), folder / log, self._answers)

    def _answers(self) -> bool:
        if not self.rpc_socket.exists():
            return False
        try:
            self.rpc("spdk_get_version")
        except Exception:
            return False
        return True

    def rpc(self, method: str, **params: Any) -> Any:
        """One call by SPDK's own client library."""
        client = JSONRPCClient(str(self.rpc_socket), timeout=30)
        try:
            return client.call(method, params or None)
        finally:
            client.close()

    def spdk_rpc(self, *words: str) -> str:
        """One call by the spdk-rpc command, as a script would."""
        command = [str(Path(sys.executable).with_name("spdk-rpc")), "-s", str(self.rpc_socket), *words]
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True, timeout=60).stdout

    def export_disk(self, name: str, bdev: str, **options: Any) -> Path:
        """Exports a bdev by vhost-user-blk; returns the socket."""
        self.rpc("vhost_create_blk_controller", ctrlr=name, dev_name=bdev, **options)
        return self.folder / name


class QemuTool:
    """qemu-io or qemu-img with a vhost-user-blk socket for an image."""

    def __init__(self, guest: Guest, program: str) -> None:
        self.guest = guest
        self.program = program

    def run(self, *words: str, timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
        """Runs to the end, stderr in stdout; the caller looks at the exit status."""
        return subprocess.run(
            [*self.guest.qemu_command(self.program), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            env=self.guest.environment,
        )


def image_options(socket: Path, *, read_only: bool = False) -> str:
    """What --image-opts wants for a vhost-user-blk socket."""
    return f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on" + (",read-only=on" if read_only else "")


class QemuIo(QemuTool):
    def __init__(self, guest: Guest) -> None:
        super().__init__(guest, "qemu-io")

    def commands(self, socket: Path, *commands: str, read_only: bool = False) -> str:
        """Runs qemu-io commands against the disk on `socket`, and fails the test unless every one succeeded."""
        words = [word for command in commands for word in ("-c", command)]
        done = self.run(*(["-r"] if read_only else []), "--image-opts", image_options(socket), *words)
        # qemu-io ends with 1 after a failed command, but a failed pattern check is only told in words.
        assert done.returncode == 0, done.stdout
        assert "Pattern verification failed" not in done.stdout, done.stdout
        return done.stdout


class QemuImg(QemuTool):
    def __init__(self, guest: Guest) -> None:
        super().__init__(guest, "qemu-img")

    def bench(self, socket: Path, *, count: int, depth: int, size_bytes: int, write: bool = False) -> str:
        words = ["bench", "-n", "-t", "none", "-c", str(count), "-d", str(depth), "-s", str(size_bytes), *(["-w"] if write else [])]
        done = self.run(*words, "--image-opts", image_options(socket))
        assert done.returncode == 0, done.stdout
        return done.stdout
