#!/usr/bin/env python3
"""``qpair serve`` where a program expects QEMU's storage daemon: its vhost-user-blk test, which starts what QTEST_QEMU_STORAGE_DAEMON_BINARY names.

How it works: ``--blockdev driver=file,node-name=N,filename=F`` becomes a bdev of aio, ``--export type=vhost-user-blk,...`` a controller; both go into a
configuration, with which this process becomes ``qpair serve``. An export on a descriptor (``addr.type=fd``) is a listening socket that
was opened before: it is handed on as a service manager does it.

Errors: what is not known here ends it with a sentence. Options that change nothing for the client (``id``, ``--chardev``, ``--monitor``) are passed over.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

FIRST_PASSED = 3
PASSED_OVER = ("--chardev", "--monitor", "--object", "--pidfile")


def refuse(why: str) -> NoReturn:
    sys.exit(f"storage_daemon_shim: {why}")


def pairs(words: str) -> dict[str, str]:
    """``a=b,c=d``."""
    return dict(part.partition("=")[::2] for part in words.split(","))


def options(words: list[str]) -> list[tuple[str, str]]:
    """``--name VALUE`` and ``--name=VALUE``."""
    found, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            refuse(f"{word!r} is no option")
        found.append((name, value if equals and "," not in name else next(rest, "")))
    return found


def bdev(node: dict[str, str]) -> dict[str, object]:
    if node.get("driver") != "file":
        refuse(f"--blockdev driver={node.get('driver')}: only file is known")
    params = {"name": node["node-name"], "filename": str(Path(node["filename"]).resolve()), "block_size": 512, "fallocate": True}
    return {"method": "bdev_aio_create", "params": params}


def controller(export: dict[str, str]) -> tuple[dict[str, object], int | None]:
    """The call, and the descriptor on which it listens."""
    if export.get("type") != "vhost-user-blk":
        refuse(f"--export type={export.get('type')}: only vhost-user-blk is known")
    fd = int(export["addr.str"]) if export.get("addr.type") == "fd" else None
    path = export["addr.path"] if fd is None else socket.socket(fileno=os.dup(fd)).getsockname()
    params = {
        "ctrlr": os.path.abspath(path),
        "dev_name": export["node-name"],
        "readonly": export.get("writable") != "on",
        "num_queues": int(export.get("num-queues", "1")),
    }
    return {"method": "qpair_vhost_create_blk_controller", "params": params}, fd


def main(words: list[str]) -> None:
    bdevs, controllers, descriptors = [], [], []
    for name, value in options(words):
        if name == "--blockdev":
            bdevs.append(bdev(pairs(value)))
        elif name == "--export":
            call, fd = controller(pairs(value))
            controllers.append(call)
            descriptors += [] if fd is None else [fd]
        elif name not in PASSED_OVER:
            refuse(f"{name} is not known")
    config = {"subsystems": [{"subsystem": "bdev", "config": bdevs}, {"subsystem": "vhost_blk", "config": controllers}]}
    # Far from where they have to be, so that none is overwritten before it was moved.
    above = [os.dup2(fd, 100 + number) for number, fd in enumerate(descriptors)]
    file = os.dup2(os.memfd_create("config"), 99)
    os.write(file, json.dumps(config).encode())
    for number, fd in enumerate(above):
        os.dup2(fd, FIRST_PASSED + number)
        os.close(fd)
    os.environ |= {"LISTEN_FDS": str(len(above)), "LISTEN_PID": str(os.getpid())}
    core = str(min(os.sched_getaffinity(0)))
    serve = ["serve", "-m", f"[{core}]", "-r", f"/tmp/qpair-shim-{os.getpid()}.sock", "-c", f"/proc/self/fd/{file}"]
    os.execv(sys.executable, [sys.executable, "-m", "qpair.cli", *serve])


if __name__ == "__main__":
    main(sys.argv[1:])
