"""``python -m qpair.demo``: a disk from a file, served over vhost-user, attached by our own initiator, measured.

``python -m qpair.demo vm``: the same disk in a real Linux virtual machine. Nothing is left running, and no file behind.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from qpair.demo.server import DemoFailed, DemoServer, heading

DISK_BYTES = 256 << 20
SECONDS = "3"


def main(words: list[str]) -> int:
    try:
        if words == ["vm"]:
            from qpair.demo.vm import demonstrate

            return demonstrate()
        if words:
            print(f"python -m qpair.demo: {' '.join(words)!r} is no demonstration; write nothing, or vm", file=sys.stderr)
            return 2
        return on_this_machine()
    except DemoFailed as failure:
        print(f"\nThe demonstration failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def on_this_machine() -> int:
    usable = sorted(os.sched_getaffinity(0))
    server_core, client_core = str(usable[0]), str(usable[-1])
    heading("1. A server: one reactor, asleep until somebody wants something")
    with DemoServer(cores=server_core) as server:
        image = server.folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        heading(f"2. A disk from a file of {DISK_BYTES >> 20} MiB, and one in memory, each behind a vhost-user socket")
        server.rpc("bdev_aio_create", name="disk0", filename=image, block_size=512)
        server.rpc("vhost_create_blk_controller", ctrlr="disk0.sock", dev_name="disk0")
        server.rpc("bdev_malloc_create", name="ram0", num_blocks=DISK_BYTES // 512, block_size=512)
        server.rpc("vhost_create_blk_controller", ctrlr="ram0.sock", dev_name="ram0")

        heading("3. Our own initiator on another core attaches to the file's socket, writes with verification, then reads")
        disk, ram = f"vhost:{server.folder}/disk0.sock", f"vhost:{server.folder}/ram0.sock"
        common = ["--time", SECONDS, "--cores", client_core]
        server.perf(disk, "--pattern", "randwrite", "--depth", "32", "--verify", *common)
        server.perf(disk, "--pattern", "randread", "--depth", "32", *common)
        heading("4. The disk in memory: what the way itself costs")
        server.perf(ram, "--pattern", "randread", "--depth", "128", *common)
        server.perf(ram, "--pattern", "randread", "--depth", "1", *common)
        heading("5. Stopping the server: nothing is left running")
    print_qemu_line()
    return 0


def print_qemu_line() -> None:
    heading("A virtual machine of yours, by hand")
    command = "qpair" if shutil.which("qpair") else os.path.relpath(Path(sys.executable).with_name("qpair"))
    print(
        f"""  $ {command} serve -m 0x1 -r /tmp/qpair.sock -S /tmp &
  $ {command} rpc -s /tmp/qpair.sock bdev_malloc_create --name disk0 --num_blocks 524288 --block_size 512
  $ {command} rpc -s /tmp/qpair.sock vhost_create_blk_controller --ctrlr disk0.sock --dev_name disk0
  $ qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem \\
        -chardev socket,id=c0,path=/tmp/disk0.sock -device vhost-user-blk-pci,chardev=c0,num-queues=2 ...

`make demo-vm` does that with a real Linux guest."""
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
