"""Boots the Linux guest under emulation, runs jobs in it and brings back what it said.

A *job* is a shell script that runs as root in the guest; several can share one boot. A job says results by
``say KEY VALUE`` (a function that every job has), which `Outcome.values` collects as ``{"job:key": value}``. A job that
calls ``pause`` prints GUEST-PAUSED and waits for `RunningGuest.resume`, so that a test can look at the other side meanwhile.
Files appear in ``/job/``. The root disk is ``/dev/vda``; disks that `qemu_args` bring follow it.

The guest's memory is a shared memfd called ``mem``, as vhost-user and vfio-user need it. Under user-mode networking
10.0.2.2 is the host's loopback.

Limits: emulated, no KVM, so a check of behaviour and never of speed; up in 3 to 7 s. A guest that outlives its time
limit is ended, by `timeout(1)` even when this process has died.
"""

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Self

from . import cpio
from .paths import GuestPaths

BOOT_SCRIPTS = Path(__file__).parent / "boot"
KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off tsc=reliable random.trust_cpu=on nokaslr audit=0 selinux=0 apparmor=0"
)
# How long QEMU may take to end after it was asked to.
KILL_AFTER_S = 5
# What timeout(1) exits with when it had to end the guest.
TIMED_OUT = 124
_SAID = re.compile(r"^SAY (\S+) ?(.*)$")
_JOB = re.compile(r"^GUEST-JOB (\S+)$")
_JOB_RC = re.compile(r"^GUEST-JOB-RC (\S+)=(\d+)$")
_RC = re.compile(r"^GUEST-RC=(\d+)$")
PREAMBLE = """set -eu -o pipefail
say() { echo "SAY $1 ${*:2}"; }
pause() { echo GUEST-PAUSED; read -r _ < /dev/console; }
"""


@dataclass
class Outcome:
    """What a guest said until it was gone."""

    console: str = ""
    rc: int | None = None
    """The first non-zero exit status of a job, 0 if all succeeded, None if the guest never got to the end."""
    job_rc: dict[str, int] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    """What jobs said, by ``"job:key"`` (the job without its ``.sh``)."""
    elapsed_s: float = 0.0
    timed_out: bool = False

    def note(self, line: str, job: str) -> str:
        """Takes one console line in; returns the job that later lines belong to."""
        self.console += line + "\n"
        if said := _SAID.match(line):
            self.values[f"{job}:{said[1]}"] = said[2]
        elif started := _JOB.match(line):
            return started[1].removesuffix(".sh")
        elif ended := _JOB_RC.match(line):
            self.job_rc[ended[1].removesuffix(".sh")] = int(ended[2])
        elif last := _RC.match(line):
            self.rc = int(last[1])
        return job


class RunningGuest:
    """A guest under way. Leaving the ``with`` block ends it, whatever it is doing."""

    def __init__(
        self, process: subprocess.Popen[bytes], scratch: "tempfile.TemporaryDirectory[str]", on_line: Callable[[str], None] | None
    ) -> None:
        self._process = process
        self._scratch = scratch
        self._on_line = on_line
        self._started = time.monotonic()
        self._changed = threading.Condition()
        self._gone = False
        self.outcome = Outcome()
        self._reader = threading.Thread(target=self._read, name="guest-console", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        job = ""
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip("\r\n")
            with self._changed:
                job = self.outcome.note(line, job)
                self._changed.notify_all()
            if self._on_line:
                self._on_line(line)
        with self._changed:
            self.outcome.elapsed_s = time.monotonic() - self._started
            self._gone = True
            self._changed.notify_all()

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Until the console holds `text`. `TimeoutError` if it does not in time or the guest has gone, with what it held."""
        with self._changed:
            self._changed.wait_for(lambda: self._gone or text in self.outcome.console, timeout_s)
            if text not in self.outcome.console:
                raise TimeoutError(f"the guest did not say {text!r} within {timeout_s} s:\n{self.outcome.console[-4000:]}")

    def resume(self) -> None:
        """Lets a job that called ``pause`` go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def wait(self) -> Outcome:
        """Until the guest is gone (its time limit sees to that)."""
        self.outcome.timed_out = self._process.wait() == TIMED_OUT
        self._reader.join()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._scratch.cleanup()
        return self.outcome

    def kill(self) -> Outcome:
        """Ends the guest as a power cut would, and waits."""
        if self._process.poll() is None:
            self._process.terminate()  # timeout(1) passes it on, and kills after KILL_AFTER_S
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


class Guest:
    """How to boot: the parts (`paths`) and nothing else. One object may boot many guests, also at once."""

    def __init__(self, paths: GuestPaths) -> None:
        self.paths = paths

    def start(
        self,
        jobs: Sequence[Path],
        *,
        qemu_args: Sequence[str] = (),
        files: Sequence[Path] = (),
        variables: Mapping[str, str] | None = None,
        cpus: int = 2,
        memory: str = "1G",
        cpu: str = "max",
        append: str = "",
        timeout_s: int = 300,
        on_line: Callable[[str], None] | None = None,
    ) -> RunningGuest:
        """Boots and returns at once. `variables` are exported to every job; `append` goes on the kernel's command line;
        `on_line` is called, on a thread of its own, with each console line."""
        scratch = tempfile.TemporaryDirectory(prefix="qpair-guest-")
        initrd = Path(scratch.name) / "initrd.img"
        initrd.write_bytes(self.paths.initrd.read_bytes() + _job_archive(jobs, files, variables or {}))
        command = [
            *("timeout", f"--kill-after={KILL_AFTER_S}", str(timeout_s)),
            *self.qemu_command("qemu-system-x86_64"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
            *("-machine", "q35,memory-backend=mem", "-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", str(cpus), "-m", memory),
            *("-object", f"memory-backend-memfd,id=mem,size={memory},share=on"),
            *("-kernel", str(self.paths.kernel), "-initrd", str(initrd), "-append", f"{KERNEL_COMMAND_LINE} {append}"),
            *("-blockdev", f"driver=file,filename={self.paths.rootfs},node-name=rootf,read-only=on,locking=off"),
            *("-device", "virtio-blk-pci,drive=rootf,serial=root"),
            *qemu_args,
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        return RunningGuest(process, scratch, on_line)

    def run(
        self,
        jobs: Sequence[Path],
        *,
        qemu_args: Sequence[str] = (),
        files: Sequence[Path] = (),
        variables: Mapping[str, str] | None = None,
        timeout_s: int = 300,
        on_line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Boots, and waits until the guest has powered itself off."""
        with self.start(jobs, qemu_args=qemu_args, files=files, variables=variables, timeout_s=timeout_s, on_line=on_line) as running:
            return running.wait()

    # ---- QEMU's programs --------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """What QEMU's programs want in their environment."""
        return {**os.environ, "QEMU_MODULE_DIR": str(self.paths.qemu / "usr/lib/x86_64-linux-gnu/qemu")}

    def qemu_command(self, program: str) -> list[str]:
        """The words that start a program of the guest's QEMU (qemu-system-x86_64, qemu-io, qemu-img, qemu-storage-daemon):
        by its own loader and libraries, since the host's are older."""
        tree = self.paths.qemu
        libraries = tree / "usr/lib/x86_64-linux-gnu"
        library_path = ":".join(str(libraries / folder) for folder in ("", "ceph", "pulseaudio"))
        words = [str(tree / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", library_path, "--argv0", program]
        words.append(str((tree / "usr/bin" / program).resolve()))
        if program.startswith("qemu-system"):
            words += ["-L", str(tree / "usr/share/qemu"), "-L", str(tree / "usr/share/seabios")]
        return words


def vhost_user_blk_args(
    socket: Path,
    *,
    queues: int = 2,
    queue_size: int = 128,
    name: str = "disk0",
    packed: bool = False,
    server: bool = False,
    reconnect_ms: int = 0,
) -> list[str]:
    """QEMU arguments that attach a vhost-user-blk disk. ``packed``: the guest is offered packed rings if the server offers them; ``server``:
    QEMU listens and waits for the disk's server; ``reconnect_ms``: it tries so often to connect again, once it was connected."""
    role = ",server=on,wait=on" if server else f",reconnect-ms={reconnect_ms}" if reconnect_ms else ""
    device = f"vhost-user-blk-pci,id={name},chardev={name}-socket,num-queues={queues},queue-size={queue_size}"
    return [
        *("-chardev", f"socket,id={name}-socket,path={socket}{role}"),
        *("-device", f"{device}{',packed=on' if packed else ''}"),
    ]


def _job_archive(jobs: Sequence[Path], files: Sequence[Path], variables: Mapping[str, str]) -> bytes:
    prelude = PREAMBLE + "".join(f"export {name}={quote(value)}\n" for name, value in variables.items())
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise ValueError(f"jobs of one boot need different names, not {names}")
    entries = [
        cpio.Entry("init", (BOOT_SCRIPTS / "init").read_bytes()),
        cpio.directory("job"),
        cpio.Entry("job/main.sh", (BOOT_SCRIPTS / "main.sh").read_bytes()),
        cpio.Entry("job/order", "".join(f"{name}\n" for name in names).encode()),
        *(cpio.Entry(f"job/{job.name}", prelude.encode() + job.read_bytes()) for job in jobs),
        *(cpio.Entry(f"job/{file.name}", file.read_bytes()) for file in files),
    ]
    return cpio.archive(entries)
