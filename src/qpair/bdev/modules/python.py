"""Python bdevs: in this process (``stack.add``), in processes of their own (``qpair_python_create``), and how they show themselves and are saved."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from qpair.app.subsystems import ConfigEntry
from qpair.bdev.control import BdevSubsystem, Record, blocks_of, checked_name, new_uuid
from qpair.bdev.model import BdevInfo, BdevModule
from qpair.bdev.python import Bdev, PythonBdevRunner
from qpair.bdev.worker import Policy, Worker
from qpair.errors import AlreadyExists, InvalidArgument, NoSuchBdev, from_engine
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U32, Uuid

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["add", "add_worker", "create_worker", "make", "target_of"]

METHOD = "qpair_python_create"
TIMEOUT_MS_MAX = 86_400_000
RESTARTS_MAX = 1_000_000


class PythonModule:
    """Kept are those in processes: one of this process exists as long as its object does."""

    name = "python"
    product_name = "Python disk"

    def __init__(self, room: BdevSubsystem) -> None:
        self._room = room

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """``{"python": {"class": ..., "process": pid or None}}``."""
        server = self._room.server(info.name)
        if isinstance(server, Worker):
            return {"python": {"class": server.target, "state": server.state, "pid": server.pid}}
        target = server.target if isinstance(server, PythonBdevRunner) else None
        return {"python": {"class": None if target is None else type(target).__qualname__, "state": "in process", "pid": None}}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """One call a bdev that a process serves."""
        return [{"method": record.method, "params": record.params} for record in self._room.records.values() if record.method == METHOD]


def make(room: BdevSubsystem) -> BdevModule:
    """The module of one stack."""
    return PythonModule(room)


def target_of(bdev_class: type[Bdev]) -> tuple[str, str | None]:
    """``module:Class``, and the script where the module is the one that was run."""
    if "<locals>" in bdev_class.__qualname__:
        raise InvalidArgument(f"class {bdev_class.__qualname__}: a worker process imports it, so it must be at the top of a module")
    module = bdev_class.__module__
    if module != "__main__":
        return f"{module}:{bdev_class.__qualname__}", None
    return f"{module}:{bdev_class.__qualname__}", getattr(sys.modules["__main__"], "__file__", None)


async def create_worker(
    room: BdevSubsystem,
    name: str,
    target: str,
    options: dict[str, Any],
    policy: Policy,
    *,
    uuid: str | None = None,
    script: str | None = None,
) -> Worker:
    """A bdev that a process of its own serves: ``target`` is ``module:Class``, made with ``name`` and ``options``."""
    if room.exists(name):
        raise AlreadyExists(f"bdev {name!r} exists")
    unique = uuid or new_uuid()
    worker = Worker(room.stack, name, target, {"name": name, **options}, policy, uuid=unique, script=script)
    await worker.start()
    room.serve(name, worker)
    params = {"name": name, "class": target, "options": options, "uuid": unique, **msgspec.to_builtins(policy)}
    room.record(name, Record(METHOD, params))
    return worker


async def add(room: BdevSubsystem, bdev: Bdev | type[Bdev], options: dict[str, Any]) -> str:
    """A bdev that this process serves, on this loop."""
    if isinstance(bdev, type) or options:
        raise InvalidArgument("stack.add takes an object; a class and its options go with process=True")
    if inspect.isawaitable(opened := bdev.open()):
        await opened
    stack, blocks = room.stack, blocks_of(bdev.name, bdev.size_bytes, None, bdev.block_size)
    try:
        ring = stack.engine.bdev_python_create(
            checked_name(bdev.name),
            num_blocks=blocks,
            block_size=bdev.block_size,
            depth=bdev.depth,
            max_io_bytes=bdev.max_io_bytes,
            uuid=new_uuid(),
            readonly=bdev.readonly,
        )
    except OSError as error:
        raise from_engine(error) from error
    room.serve(bdev.name, PythonBdevRunner(bdev.name, ring, bdev, lambda wake: stack.bridge.subscribe_work(ring.id, wake)))
    return bdev.name


async def add_worker(room: BdevSubsystem, bdev: Bdev | type[Bdev], options: dict[str, Any]) -> str:
    """As qpair_python_create, for a class at hand."""
    if not isinstance(bdev, type):
        raise InvalidArgument("with process=True, stack.add takes the class: the object is made in the worker")
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InvalidArgument("with process=True, stack.add needs name=")
    policy = msgspec.convert({field: options.pop(field) for field in Policy.__struct_fields__ if field in options}, Policy)
    target, script = target_of(bdev)
    await create_worker(room, checked_name(name), target, options, policy, script=script)
    return name


class PythonCreate(Params, rename={"class_": "class"}):
    """``class`` is ``module:Class``, made with ``name``, ``size`` if given, and ``options`` as keyword arguments. See `Policy` for the others."""

    name: str
    class_: Annotated[str, Meta(min_length=3, max_length=512)]
    size: int | str | None = None
    options: dict[str, Any] | None = None
    uuid: Uuid | None = None
    restart: Literal["never", "on-failure"] = "on-failure"
    restart_max: U32 = 5
    backoff_ms: U32 = 100
    backoff_max_ms: U32 = 10_000
    while_down: Literal["wait", "fail"] = "wait"
    timeout_ms: U32 = 30_000


@method(METHOD, params=PythonCreate)
async def qpair_python_create(stack: Stack, params: PythonCreate) -> str:
    """A bdev whose class runs in a process of its own; the answer is its name."""
    for field, value, limit in (
        ("restart_max", params.restart_max, RESTARTS_MAX),
        ("backoff_ms", params.backoff_ms, TIMEOUT_MS_MAX),
        ("backoff_max_ms", params.backoff_max_ms, TIMEOUT_MS_MAX),
        ("timeout_ms", params.timeout_ms, TIMEOUT_MS_MAX),
    ):
        if value > limit:
            raise InvalidArgument(f"parameter {field!r}: {value} is past {limit}")
    options = dict(params.options or {})
    if "name" in options:
        raise InvalidArgument("parameter 'options': 'name' is a parameter of its own")
    if params.size is not None:
        options["size"] = params.size
    policy = Policy(
        restart=params.restart,
        restart_max=params.restart_max,
        backoff_ms=params.backoff_ms,
        backoff_max_ms=params.backoff_max_ms,
        while_down=params.while_down,
        timeout_ms=params.timeout_ms,
    )
    await create_worker(stack.bdevs, params.name, params.class_, options, policy, uuid=params.uuid)
    return params.name


class PythonNamed(Params):
    """One Python bdev by name."""

    name: str


@method("qpair_python_delete", params=PythonNamed)
async def qpair_python_delete(stack: Stack, params: PythonNamed) -> bool:
    """Remove a Python bdev; its worker ends."""
    await stack.bdevs.delete(params.name, module="python")
    return True


class PythonGet(Params):
    """All, or one."""

    name: str | None = None


@method("qpair_python_get_bdevs", params=PythonGet)
async def qpair_python_get_bdevs(stack: Stack, params: PythonGet) -> list[dict[str, Any]]:
    """The workers: class, state, process, restarts, last failure, policy."""
    workers = [worker for worker in stack.bdevs.servers() if isinstance(worker, Worker)]
    if params.name is None:
        return [worker.describe() for worker in workers]
    found = [worker.describe() for worker in workers if worker.name == params.name]
    if not found:
        raise NoSuchBdev(f"no worker serves a bdev named {params.name!r:.256}")
    return found
