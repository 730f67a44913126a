"""Where the parts of the Linux guest lie, and whether they are all there.

Everything is kept in one folder, ``$QPAIR_GUEST_DIR`` (default ``/var/tmp/qpair-guest``), so that every
clone on a machine shares it. A part appears under its final name only when it is whole: a path that exists
is complete.
"""

import os
from dataclasses import dataclass
from pathlib import Path

DEFAULT_DIRECTORY = "/var/tmp/qpair-guest"


@dataclass(frozen=True)
class GuestPaths:
    """The parts that booting needs."""

    directory: Path

    @classmethod
    def default(cls) -> "GuestPaths":
        return cls(Path(os.environ.get("QPAIR_GUEST_DIR", DEFAULT_DIRECTORY)))

    @property
    def kernel(self) -> Path:
        """An uncompressed kernel (ELF, PVH entry): unpacking one under emulation costs seconds."""
        return self.directory / "boot" / "vmlinux"

    @property
    def initrd(self) -> Path:
        """busybox and the modules that find the root disk; the boot scripts are appended at each boot."""
        return self.directory / "boot" / "initrd.img"

    @property
    def rootfs(self) -> Path:
        """A read-only ext4 image of the guest's user space."""
        return self.directory / "rootfs.ext4"

    @property
    def qemu(self) -> Path:
        """A tree that holds QEMU's programs and all of their libraries."""
        return self.directory / "qemu"

    @property
    def lock(self) -> Path:
        return self.directory / "setup.lock"

    def missing(self) -> list[Path]:
        """The parts that set-up has yet to make; empty means ready."""
        parts = [self.kernel, self.initrd, self.rootfs, self.qemu / "usr/bin/qemu-system-x86_64"]
        return [part for part in parts if not part.exists()]
