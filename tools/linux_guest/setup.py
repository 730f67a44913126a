"""Makes the Linux guest: a kernel, a root file system and a QEMU, all from Debian's own packages.

How it works: Debian's stable suite named in `SUITE` is read through the mirror that this machine's apt already
uses, in an apt root of its own, so nothing of it is installed on the host. The host needs only `HOST_TOOLS`
(tools/setup-apt.sh brings them). The guest's root and QEMU's tree are unpacked at the same time.

QEMU is not the host's: Debian 12's emulation miscompiles cmpxchg16b, and its qemu-io has no libblkio driver.

Errors: `SetupError` with one sentence that says what to do. Needs root (chroot) and some 1.6 GB of disk;
takes one to two minutes, once a machine.
"""

import fcntl
import lzma
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from . import cpio
from .paths import GuestPaths

SUITE = "trixie"
HOST_TOOLS = ("apt-get", "mmdebstrap", "mke2fs", "zstd")
GUEST_PACKAGES = (
    "fio,e2fsprogs,xfsprogs,util-linux,kmod,iproute2,python3,sg3-utils,lsscsi,pciutils,procps,strace,xxd,busybox-static,"
    "nvme-cli,open-iscsi,nbd-client,libnbd-bin,libiscsi-bin,netcat-openbsd,fuse3"
)
QEMU_PACKAGES = "qemu-system-x86,qemu-utils,qemu-block-extra,seabios,libblkio1"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
ROOTFS_BYTES = 2 << 30
# What finds the root disk; everything else is loaded from there.
INITRD_MODULES = ("virtio_blk", "overlay")
INITRD_TOOLS = ("sh", "mount", "switch_root", "insmod", "mkdir", "cat", "ls", "sleep")
# How a bzImage may hold its ELF image, by the first bytes of the compressed stream.
KERNEL_COMPRESSIONS: Mapping[bytes, Sequence[str]] = {b"\x28\xb5\x2f\xfd": ("zstd", "-dcq"), b"\x1f\x8b\x08": ("gzip", "-dcq")}
XZ_MAGIC = b"\xfd7zXZ\0"

Say = Callable[[str], None]


class SetupError(RuntimeError):
    """The guest cannot be made here; the message says why and what to do."""


def ensure(paths: GuestPaths | None = None, say: Say = print) -> GuestPaths:
    """Returns the guest's parts, after making those that are missing. Safe to call from several processes."""
    paths = paths or GuestPaths.default()
    if not paths.missing():
        return paths
    _refuse_if_impossible(paths)
    paths.directory.mkdir(parents=True, exist_ok=True)
    with _locked(paths.lock, say):
        if paths.missing():
            started = time.monotonic()
            _make(paths, say)
            say(f"guest: ready in {paths.directory} after {time.monotonic() - started:.0f} s")
    return paths


def _refuse_if_impossible(paths: GuestPaths) -> None:
    lacking = f"the Linux guest in {paths.directory} lacks {', '.join(part.name for part in paths.missing())}"
    if os.geteuid() != 0:
        raise SetupError(f"{lacking}: run `PYTHONPATH=tools python3 -m linux_guest setup` once as root")
    tools = [tool for tool in HOST_TOOLS if shutil.which(tool) is None]
    if tools:
        raise SetupError(f"{lacking}, and making it needs {', '.join(tools)}: run tools/setup-apt.sh on a Debian or Ubuntu host")


@contextmanager
def _locked(lock: Path, say: Say) -> Iterator[None]:
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"guest: another process is setting it up (lock {lock}), waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(paths: GuestPaths, say: Say) -> None:
    work = paths.directory / "work"
    _discard(work)  # what an interrupted set-up left
    (paths.directory / "boot").mkdir(exist_ok=True)
    work.mkdir()
    mirror = _mirror()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_make_qemu, paths, work, mirror, say), pool.submit(_make_guest, paths, work, mirror, say)]
        for job in jobs:
            job.result()
    _discard(work)


def _discard(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)


def _run(command: Sequence[str | Path]) -> str:
    """Runs a command to its end; its whole output goes into the error if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise SetupError(f"`{' '.join(str(word) for word in command)}` ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def _mirror() -> str:
    """The Debian archive that this machine's apt uses (never the security archive, which has other paths)."""
    output = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages"])
    for line in output.splitlines():
        if line.rstrip("/").endswith("/debian"):
            return line.rstrip("/")
    raise SetupError("apt names no Debian archive (no source ends in /debian): add one to /etc/apt/sources.list")


# ---- QEMU ---------------------------------------------------------------------------------------------


def _make_qemu(paths: GuestPaths, work: Path, mirror: str, say: Say) -> None:
    if paths.qemu.exists():
        return
    say(f"guest: unpacking QEMU from {SUITE}")
    tree = work / "qemu"
    _run(["mmdebstrap", "--variant=extract", f"--include={QEMU_PACKAGES}", SUITE, tree, mirror])
    _discard(tree / "usr/share/doc")
    tree.rename(paths.qemu)
    say("guest: QEMU is there")


# ---- the guest itself -----------------------------------------------------------------------------------


def _make_guest(paths: GuestPaths, work: Path, mirror: str, say: Say) -> None:
    if paths.kernel.exists() and paths.initrd.exists() and paths.rootfs.exists():
        return
    say(f"guest: installing the root file system from {SUITE}")
    root = work / "rootfs"
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("man", "doc", "locale")]
    _run(["mmdebstrap", "--variant=minbase", *excluded, f"--include={GUEST_PACKAGES}", SUITE, root, mirror])

    say("guest: fetching the kernel")
    kernel = _unpack_kernel(work, mirror)
    [image] = (kernel / "boot").glob("vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    [modules] = kernel.glob(f"**/lib/modules/{release}")
    shutil.copytree(modules, root / "usr/lib/modules" / release, symlinks=True)
    # The emulated processor would spend seconds on each compressed module.
    _expand_modules(root / "usr/lib/modules" / release)
    _run(["chroot", root, "depmod", release])

    say("guest: writing its disk")
    for folder in ("var/cache/apt", "var/lib/apt/lists"):
        _discard(root / folder)
    disk = work / "rootfs.ext4"
    with disk.open("wb") as handle:
        handle.truncate(ROOTFS_BYTES)
    _run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, disk])
    initrd = work / "initrd.img"
    initrd.write_bytes(_initrd(root, release))
    vmlinux = work / "vmlinux"
    vmlinux.write_bytes(extract_vmlinux(image.read_bytes()))

    vmlinux.rename(paths.kernel)
    initrd.rename(paths.initrd)
    disk.rename(paths.rootfs)
    say(f"guest: Linux {release} is there")


def _unpack_kernel(work: Path, mirror: str) -> Path:
    """Downloads the suite's current cloud kernel by an apt root of its own and unpacks it."""
    root = work / "apt"
    for folder in ("etc/apt/apt.conf.d", "lists/partial", "cache/archives/partial"):
        (root / folder).mkdir(parents=True)
    (root / "status").touch()
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (root / "sources.list").write_text(f"deb [signed-by={keyring} arch=amd64] {mirror} {SUITE} main\n")
    settings = {
        "Dir::Etc::sourcelist": root / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": root,
        "Dir::State::lists": root / "lists",
        "Dir::State::status": root / "status",
        "Dir::Cache": root / "cache",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    _run(["apt-get", *options, "update"])
    # The name without a version depends on the newest one.
    depends = _run(["apt-cache", *options, "depends", "--important", KERNEL_PACKAGE])
    names = [line.split(":", 1)[1].strip() for line in depends.splitlines() if line.strip().startswith("Depends: linux-image-")]
    if len(names) != 1:
        raise SetupError(f"{KERNEL_PACKAGE} of {SUITE} should depend on one kernel, not on {names}")
    _run(["sh", "-c", 'cd "$1" && shift && apt-get "$@"', "sh", work, *options, "download", "-q", names[0]])
    [package] = work.glob("linux-image-*.deb")
    _run(["dpkg-deb", "-x", package, work / "kernel"])
    return work / "kernel"


def _expand_modules(folder: Path) -> None:
    def expand(packed: Path) -> None:
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()

    with ThreadPoolExecutor(2) as pool:  # lzma lets go of the GIL
        list(pool.map(expand, folder.rglob("*.ko.xz")))


def _initrd(root: Path, release: str) -> bytes:
    entries = [cpio.directory(name) for name in ("bin", "dev", "proc", "sys", "mnt", "new", "m", "rw")]
    entries.append(cpio.Entry("bin/busybox", (root / "usr/bin/busybox").read_bytes()))
    entries += [cpio.symlink(f"bin/{tool}", "busybox") for tool in INITRD_TOOLS]
    for name in INITRD_MODULES:
        [module] = (root / "usr/lib/modules" / release).rglob(f"{name}.ko")
        entries.append(cpio.Entry(f"m/{name}.ko", module.read_bytes()))
    return cpio.archive(entries)


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage. `SetupError` if no known compression yields one."""
    for magic, command in KERNEL_COMPRESSIONS.items():
        for start in _positions(image, magic):
            # Bytes follow the stream, so the tool's exit status says nothing.
            kernel = subprocess.run(command, input=image[start:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            if kernel.startswith(b"\x7fELF"):
                return kernel
    for start in _positions(image, XZ_MAGIC):
        try:
            kernel = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(image[start:])
        except lzma.LZMAError:
            continue
        if kernel.startswith(b"\x7fELF"):
            return kernel
    raise SetupError("the kernel image holds no zstd, gzip or xz stream that is an ELF file")


def _positions(data: bytes, pattern: bytes) -> Iterator[int]:
    start = data.find(pattern)
    while start >= 0:
        yield start
        start = data.find(pattern, start + 1)
