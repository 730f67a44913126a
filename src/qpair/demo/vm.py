"""A real Linux guest, booted under emulation on a disk of ours: a file system, a file, and fio with verification.

Runs from a clone, where ``tools/linux_guest`` is. Without KVM a guest is a check of behaviour, not of speed.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from qpair.demo.server import DemoFailed, DemoServer, heading

DISK_BYTES = 256 << 20
TIMEOUT_S = 300

JOB = r"""
disk=/dev/vdb
echo "--- the disk, as Linux sees it"
lsblk -o NAME,SIZE,TYPE,SERIAL,LOG-SEC,RO $disk
echo "queues: $(ls /sys/block/vdb/mq | wc -l)"
echo "--- a file system"
mkfs.ext4 -q -F $disk && mkdir -p /mnt/t && mount $disk /mnt/t && df -h /mnt/t | tail -1
dd if=/dev/urandom of=/mnt/t/file bs=1M count=32 conv=fsync 2>&1 | tail -1
sum=$(sha256sum < /mnt/t/file); umount /mnt/t
echo 3 > /proc/sys/vm/drop_caches; mount -o ro $disk /mnt/t
[ "$sum" = "$(sha256sum < /mnt/t/file)" ] && echo "the file is the same after unmount and mount"
umount /mnt/t; fsck.ext4 -fn $disk 2>&1 | tail -1
echo "--- fio: random 4 KiB writes, each read back and verified"
fio --name=verify --filename=$disk --rw=randwrite --bs=4k --size=32M --iodepth=16 --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 \
  | grep -E 'IOPS|err='
"""


def demonstrate() -> int:
    try:
        guests: Any = importlib.import_module("linux_guest")
    except ImportError:
        raise DemoFailed("the guest's tools are not here; run `make demo-vm` in a clone") from None
    cores = sorted(os.sched_getaffinity(0))
    heading("1. A Linux guest (made once, some two minutes; then kept)")
    try:
        paths = guests.ensure()
    except guests.SetupError as error:
        raise DemoFailed(str(error)) from None
    heading("2. A server with a reactor on each core, and a disk of two queues")
    spread = ",".join(str(core) for core in cores[:2])
    with DemoServer(cores=spread) as server, tempfile.TemporaryDirectory(prefix="qpair-demo-job-") as scratch:
        image = server.folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        server.rpc("bdev_aio_create", name="disk0", filename=image, block_size=512)
        server.rpc("vhost_create_blk_controller", ctrlr="disk0.sock", dev_name="disk0")
        job = Path(scratch) / "demo.sh"
        job.write_text(JOB)
        heading("3. The guest boots on it; its own words:")
        with guests.Guest(paths).start(
            [job], qemu_args=guests.vhost_user_blk_args(str(server.folder / "disk0.sock")), timeout_s=TIMEOUT_S, on_line=say
        ) as machine:
            outcome = machine.wait()
        if outcome.rc != 0:
            raise DemoFailed(f"the guest ended with {outcome.rc}; the server said:\n{server.log()}")
        heading("4. The guest has powered off; stopping the server")
    return 0


def say(line: str) -> None:
    print(f"  | {line}", flush=True)
