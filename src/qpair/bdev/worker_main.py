"""A worker process: one Python bdev with an interpreter of its own. Started by `qpair.bdev.worker`, as ``python -m qpair.bdev.worker_main FD``.

How it works: ``FD`` is a SOCK_SEQPACKET socket to the stack. It says which class and options; this side makes the object and answers with its geometry; it sends the
descriptors of the shared ring; this side serves. Data and requests never pass through the socket. The process ends when the ring is closed or the socket is.

Errors: what the class raises while it is made goes back as one sentence, and the exit code is 1. What its methods raise fails their requests, as in process.

Limits: one message is at most `MESSAGE_BYTES`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from typing import Any

import msgspec

from qpair.bdev.python.model import Bdev
from qpair.bdev.python.runner import PythonBdevRunner

__all__ = ["MESSAGE_BYTES", "Geometry", "Hello", "Refusal", "Serve", "main"]

MESSAGE_BYTES = 60_000
PR_SET_PDEATHSIG = 1


class Hello(msgspec.Struct, tag=True):
    """To the worker: make ``module:Class`` with these keyword arguments. ``script``: the file that was run as ``__main__``, where the class is from there."""

    target: str
    options: dict[str, Any]
    path: list[str]
    script: str | None = None


class Geometry(msgspec.Struct, tag=True, frozen=True):
    """From the worker: what was made."""

    size_bytes: int
    block_size: int
    depth: int
    max_io_bytes: int
    readonly: bool


class Refusal(msgspec.Struct, tag=True):
    """From the worker: why nothing was."""

    why: str


class Serve(msgspec.Struct, tag=True):
    """To the worker, with four descriptors: control, memory, work, done."""

    depth: int
    stride: int
    block_size: int


def load(hello: Hello) -> Any:
    """The class; `LookupError`, `ImportError` or what its module raises."""
    sys.path.extend(entry for entry in hello.path if entry not in sys.path)
    module_name, separator, name = hello.target.partition(":")
    if not separator or not module_name or not name:
        raise LookupError(f"class {hello.target!r}: it must be module:Class")
    if module_name == "__main__":
        if hello.script is None:
            raise LookupError(f"class {hello.target!r}: an interactive session has no file to import it from")
        import runpy

        found: Any = runpy.run_path(hello.script, run_name="__qpair_worker__")[name.split(".")[0]]
        names = name.split(".")[1:]
    else:
        found, names = import_module(module_name), name.split(".")
    target = reduce(getattr, names, found)
    if not (isinstance(target, type) and issubclass(target, Bdev)):
        raise TypeError(f"{hello.target} is no subclass of qpair.Bdev")
    return target


async def serve(channel: socket.socket) -> int:
    """One bdev, from the first message to the last request."""
    loop = asyncio.get_running_loop()
    hello = msgspec.msgpack.decode(await loop.sock_recv(channel, MESSAGE_BYTES), type=Hello)
    name = str(hello.options.get("name", "?"))
    try:
        bdev = load(hello)(**hello.options)
        if inspect.isawaitable(opened := bdev.open()):
            await opened
    except Exception as error:
        logging.getLogger("qpair.bdev").error("bdev %s: %s", name, error, exc_info=error)
        why = f"{type(error).__name__}: {error}"[:1000]
        await loop.sock_sendall(channel, msgspec.msgpack.encode(Refusal(why)))
        return 1
    geometry = Geometry(bdev.size_bytes, bdev.block_size, bdev.depth, bdev.max_io_bytes, bdev.readonly)
    await loop.sock_sendall(channel, msgspec.msgpack.encode(geometry))
    ring, work_fd = await _ring(loop, channel)
    ended = asyncio.Event()

    def subscribe(wake: Callable[[], None]) -> Callable[[], None]:
        def rung() -> None:
            ring.rung()
            if ring.closed:
                ended.set()
            else:
                wake()

        loop.add_reader(work_fd, rung)
        return lambda: (loop.remove_reader(work_fd), None)[1]

    loop.add_reader(channel, ended.set)  # nothing more is sent: it is closed
    runner = PythonBdevRunner(bdev.name, ring, bdev, subscribe)
    await ended.wait()
    loop.remove_reader(channel)
    await runner.finish()
    return 0


async def _ring(loop: asyncio.AbstractEventLoop, channel: socket.socket) -> tuple[Any, int]:
    from qpair._engine import PythonWorker

    readable = asyncio.Event()
    loop.add_reader(channel, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(channel)
    message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 4)
    if not message:
        raise SystemExit(0)  # not wanted after all
    told = msgspec.msgpack.decode(message, type=Serve)
    control, memory, work, done = descriptors
    ring = PythonWorker(control, memory, work, done, depth=told.depth, stride=told.stride, block_size=told.block_size)
    for descriptor in (control, memory, done):
        os.close(descriptor)
    return ring, work


def main() -> int:
    """The process."""
    # With the stack gone nobody could be served; the socket tells it to a loop that runs, this to one that hangs.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, meant for the stack
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.setblocking(False)
    with channel:
        return asyncio.run(serve(channel))


if __name__ == "__main__":
    sys.exit(main())
