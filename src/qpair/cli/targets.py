"""What `qpair perf` and `qpair dd` work on: a text of the command line becomes a bdev of the command's own stack.

* ``malloc:SIZE``, ``null:SIZE``: made for the occasion.
* ``file:PATH``: a file or block device.
* ``python:MODULE:CLASS``: a `qpair.Bdev` that is made without arguments.
* ``vhost:PATH``, or the path of a socket: any vhost-user-blk server, by our own initiator.
* ``bdev:NAME``: a bdev of a running server (qpair's or SPDK's), by way of a vhost controller that exists as long as the command needs it.

Errors: `InvalidArgument` names the form; `NoSuchBdev`; those of the initiator and of the RPC client. A controller that could not be deleted is logged.

Limits: ``bdev:`` needs the server's vhost socket in a directory of this machine that this process may enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
import sys
from collections.abc import AsyncIterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qpair.errors import InvalidArgument, QpairError

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["FORMS", "attach", "is_socket"]

FORMS = "malloc:512MiB, null:1TiB, file:PATH, python:module:Class, vhost:SOCKET or bdev:NAME"
KINDS = ("malloc", "null", "file", "python", "vhost", "bdev")
LEAVING_S = 5.0

logger = logging.getLogger("qpair.cli")


@contextlib.asynccontextmanager
async def attach(
    stack: Stack, text: str, *, name: str, address: str, block_size: int = 512, write: bool = True, queue_size: int = 512
) -> AsyncIterator[str]:
    """The name of the bdev that ``text`` stands for, while the context lasts. ``name``: what to call it; ``address``: the server that ``bdev:``
    means; ``write``: False exports a server's bdev for reading only."""
    # what lies on a target belongs to its owner: partitions or a raid found there would claim it under the command's hands
    stack.bdevs.examiner.auto = False
    kind, separator, rest = text.partition(":")
    if kind not in KINDS and is_socket(text):
        kind, rest = "vhost", text
    elif not separator or not rest:
        raise InvalidArgument(f"target {text!r}: write {FORMS}")
    if kind == "bdev":
        async with _exported(rest, address=address, write=write) as socket:
            await stack.virtio.attach(name, socket, queue_size=queue_size, loss_timeout_s=0)
            try:
                yield name
            finally:
                await stack.virtio.detach(name)
    elif kind == "vhost":
        await stack.virtio.attach(name, rest, queue_size=queue_size, loss_timeout_s=0)
        yield name
    elif kind == "malloc":
        yield (await stack.malloc(name, rest, block_size=block_size)).name
    elif kind == "null":
        yield (await stack.null(name, rest, block_size=block_size)).name
    elif kind == "file":
        yield (await stack.file(name, rest, readonly=not write)).name
    elif kind == "python":
        yield (await stack.add(_python_bdev(rest))).name
    else:
        raise InvalidArgument(f"target {text!r}: {kind!r} is no kind of target; write {FORMS}")


def is_socket(path: str) -> bool:
    """Whether ``path`` is a Unix socket."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


@contextlib.asynccontextmanager
async def _exported(bdev: str, *, address: str, write: bool) -> AsyncIterator[str]:
    """The socket of a controller on ``bdev``, which the server at ``address`` makes for us."""
    from qpair.rpc.client import RpcClient

    controller = f"qpair-{os.getpid()}-{os.urandom(4).hex()}.sock"
    with await asyncio.to_thread(RpcClient, address) as client:

        async def call(method: str, **params: Any) -> Any:
            return await asyncio.to_thread(lambda: client.call(method, **params))

        await call("vhost_create_blk_controller", ctrlr=controller, dev_name=bdev, readonly=not write)
        try:
            found = await call("vhost_get_controllers", name=controller)
            socket = str(found[0]["socket"])
            if not is_socket(socket):
                raise InvalidArgument(
                    f"bdev {bdev!r}: its server made the vhost socket {socket}, which is not to be seen from here", errno=errno.ENOTSOCK
                )
            yield socket
        finally:
            await _delete(call, controller)


async def _delete(call: Any, controller: str) -> None:
    """A server notices in its own time that we left: until then the controller is busy."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + LEAVING_S
    while True:
        try:
            await call("vhost_delete_controller", ctrlr=controller)
            return
        except QpairError as error:
            if error.errno != errno.EBUSY or loop.time() > deadline:
                logger.error(
                    "controller %s stays behind: %s; delete it: qpair rpc vhost_delete_controller --ctrlr %s", controller, error, controller
                )
                return
        await asyncio.sleep(0.02)


def _python_bdev(text: str) -> Any:
    from qpair.bdev.python import Bdev

    module, separator, name = text.partition(":")
    if not separator or not name:
        raise InvalidArgument(f"target python:{text}: write python:module:Class")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise InvalidArgument(f"target python:{text}: {error}; it must name a class that is made without arguments") from error
    if not isinstance(made, Bdev):
        raise InvalidArgument(f"target python:{text}: {name} is no qpair.Bdev")
    return made
