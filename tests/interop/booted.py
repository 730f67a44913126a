"""A systemd of its own: process 1 of its namespaces, with /run and control groups of its own.

It knows no unit but those it is given (the machine's own would clean /tmp and set the kernel's switches, for everybody), and finds every file system read-only but /run.

`Booted.run` calls a program where that systemd's services are. Ends with all it started, and leaves no control group behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
GROUPS = Path("/sys/fs/cgroup")
PROGRAMS = ("unshare", "nsenter", "systemctl")
START_S = 60

_BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
cp -r {folder}/units /run/units
cat /etc/passwd {folder}/passwd > /run/passwd
cat /etc/group {folder}/group > /run/group
mount --bind /run/passwd /etc/passwd
mount --bind /run/group /etc/group
{shown}
mount -o remount,bind,ro /
export container=qpair-test SYSTEMD_UNIT_PATH=/run/units
exec {systemd} --system --unit=test.target --log-target=null --show-status=no
"""
_TARGET = "[Unit]\nDescription=what is tested\nDefaultDependencies=no\nAllowIsolate=yes\nWants={wants}\n"
_EMPTY_TARGET = "[Unit]\nDescription=nothing\nDefaultDependencies=no\n"
#: What units depend on unless they say otherwise.
_TARGETS = ("sysinit", "basic", "shutdown", "sockets", "local-fs", "multi-user", "umount", "exit")


def _shown(folders: list[Path]) -> str:
    """Shell lines that let ordinary users reach folders below one that is its owner's alone, as /root is."""
    keep, hide, show = [], [], []
    for number, folder in enumerate(folders):
        private = [parent for parent in reversed(folder.parents) if not parent.stat().st_mode & 0o001]
        if private:
            keep.append(f"mkdir -p /run/shown/{number} && mount --bind {folder} /run/shown/{number}")
            hide.append(f"mount -t tmpfs -o mode=755 tmpfs {private[0]}")
            show.append(f"mkdir -p {folder} && mount --bind /run/shown/{number} {folder}")
    return "\n".join([*keep, *dict.fromkeys(hide), *show])


def lacking() -> str | None:
    """What is not here that a systemd of one's own needs."""
    if os.geteuid() != 0:
        return "root"
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    return ", ".join(programs) or (None if SYSTEMD.exists() else str(SYSTEMD))


class Booted:
    """``with Booted(folder, {"qpair.service": text}) as systemd: systemd.run("systemctl", ...)``; ``users``: names to be known inside."""

    def __init__(self, folder: Path, units: dict[str, str], users: tuple[str, ...] = ()) -> None:
        (folder / "units").mkdir(parents=True)
        wants = " ".join(name for name in units if "/" not in name)
        empty = {f"{name}.target": _EMPTY_TARGET for name in _TARGETS}
        for name, text in {**empty, **units, "test.target": _TARGET.format(wants=wants)}.items():
            (folder / "units" / name).parent.mkdir(exist_ok=True)
            (folder / "units" / name).write_text(text)
        (folder / "passwd").write_text("".join(f"{user}:x:{990 - at}:{990 - at}::/:/bin/false\n" for at, user in enumerate(users)))
        (folder / "group").write_text("".join(f"{user}:x:{990 - at}:\n" for at, user in enumerate(users)))
        self._groups = [group / f"qpair-test-{os.getpid()}" for group in GROUPS.iterdir() if (group / "cgroup.procs").exists()] or [
            GROUPS / f"qpair-test-{os.getpid()}"
        ]
        self.log = folder / "boot.log"
        script = _BOOT.format(folder=folder, systemd=SYSTEMD, shown=_shown([Path(sys.base_prefix), ROOT]))
        for group in self._groups:
            group.mkdir(exist_ok=True)
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--uts",
            "--ipc",
            "--cgroup",
            "--mount-proc",
            "bash",
            "-c",
            script,
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=self._join_groups
            )
        self.pid = 0

    def _join_groups(self) -> None:
        for group in self._groups:
            with contextlib.suppress(OSError):  # one that was not set up (cpuset) takes nobody, and systemd does without
                (group / "cgroup.procs").write_text("0")

    def __enter__(self) -> Self:
        try:
            end = time.monotonic() + START_S
            while self._failed_to_answer():
                if time.monotonic() > end or self._process.poll() is not None:
                    raise RuntimeError(f"systemd does not answer: {self.log.read_text()}")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _failed_to_answer(self) -> bool:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return True
        self.pid = int(children[0])
        return self.run("systemctl", "is-active", "test.target", check=False).strip() != "active"

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and with it, by --kill-child, process 1 and so all of its namespace
        self._process.wait()
        end = time.monotonic() + 10
        for group in self._groups:
            while group.exists():
                for path, _, _ in os.walk(group, topdown=False):
                    try:
                        os.rmdir(path)
                    except OSError:
                        time.sleep(0.05)
                if time.monotonic() > end:
                    raise RuntimeError(f"{group} is still in use")

    def run(self, *command: str, check: bool = True) -> str:
        """What a program says that runs beside the services."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--cgroup", "--", *command]
        done = subprocess.run(inside, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def show(self, unit: str, field: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--property", field, "--value", unit).strip()
