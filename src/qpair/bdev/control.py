"""The bdevs of one stack: creating, finding, resizing and deleting them, and what a saved configuration says of them.

How it works: the engine holds the bdevs; this room holds how each was made, so that it can be made again. A record goes when the engine says that
its bdev is removed. A kind of bdev that another room makes (virtio) registers a `BdevModule`.

Errors: `NoSuchBdev`, `AlreadyExists`, `Busy` (claimed), `InvalidArgument` (geometry), `NoSuchFile`; each names the bdev and the field.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from errno import ENODEV
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import uuid4

import msgspec

from qpair.app.sizes import parse_size
from qpair.app.subsystems import ConfigEntry, Subsystem
from qpair.bdev.client import BdevHandle
from qpair.bdev.events import EventBus
from qpair.bdev.examine import Examiner
from qpair.bdev.measures import Measures
from qpair.bdev.model import BdevInfo, BdevModule, describe
from qpair.bdev.modules import make_modules
from qpair.errors import InvalidArgument, NoSuchBdev, NoSuchDevice, from_engine, from_errno

if TYPE_CHECKING:
    from qpair._engine import BdevEvent
    from qpair.app.stack import Stack
    from qpair.bdev.python import Bdev

__all__ = ["BdevSubsystem", "blocks_of", "checked_name", "new_uuid"]

BLOCK_SIZE_MAX = 1 << 20


class Record(msgspec.Struct):
    """How one bdev was made: the call, and what the file kinds show of it."""

    method: str
    params: dict[str, Any]
    shown: dict[str, Any] = msgspec.field(default_factory=dict)


class SimpleModule:
    """A kind of bdev whose configuration is one call a bdev."""

    def __init__(self, room: BdevSubsystem, name: str, product_name: str, *, shows: str | None = None) -> None:
        self.name = name
        self.product_name = product_name
        self._room = room
        self._shows = shows

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """``{"aio": {"filename": ...}}`` for file kinds, else nothing."""
        record = self._room.records.get(info.name)
        return {self._shows: record.shown} if self._shows is not None and record is not None else {}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """One call a bdev of this kind."""
        prefix = f"bdev_{self.name}_"
        return [
            {"method": record.method, "params": record.params} for record in self._room.records.values() if record.method.startswith(prefix)
        ]


class Server(Protocol):
    """What does a bdev's I/O in Python."""

    def close(self) -> None:
        """The bdev is gone: end soon."""

    async def finish(self, within_s: float = ...) -> None:
        """As `close`, and wait for the end."""


class BdevSubsystem(Subsystem):
    """``stack.bdevs``."""

    name = "bdev"
    depends_on = ("accel", "keyring", "vmd", "sock", "iobuf")

    def __init__(self) -> None:
        self._stack: Stack | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self.records: dict[str, Record] = {}
        self.events = EventBus()
        self.measures = Measures(self)
        self._lowest: dict[str, int] = {}
        self._servers: dict[str, Server] = {}
        self._changed: set[asyncio.Future[None]] = set()
        self._modules: dict[str, BdevModule] = {}
        self.examiner = Examiner(self)
        for module in (
            SimpleModule(self, "malloc", "Malloc disk"),
            SimpleModule(self, "null", "Null disk"),
            SimpleModule(self, "aio", "AIO disk", shows="aio"),
            SimpleModule(self, "uring", "URING bdev", shows="uring"),
            *make_modules(self),
        ):
            self.register_module(module)

    # -- life -------------------------------------------------------------------------------------

    async def start(self, stack: Stack) -> None:
        """Listen to the engine's bdev events."""
        self._stack = stack
        self.events.open(asyncio.get_running_loop())
        self._unsubscribe = stack.bridge.subscribe_bdev(self._on_event)

    async def stop(self, stack: Stack, deadline_ms: int) -> None:
        """Python bdevs first (their requests need this loop); the engine takes the others with it when it stops."""
        await self.examiner.stop()
        for module in self._modules.values():
            if (stop_module := getattr(module, "stop", None)) is not None:
                await stop_module()
        # Half the time to drain, a quarter for those who serve to end by themselves; what is left is for ending them.
        await asyncio.gather(*(self.delete(name, deadline_ms=deadline_ms // 2) for name in tuple(self._servers)), return_exceptions=True)
        self._unsubscribe()
        self.events.close()

    def config(self, stack: Stack) -> list[ConfigEntry]:
        entries = stack.inert.config(self.name)
        for module in self._modules.values():
            entries.extend(module.config(stack))
        return [*entries, {"method": "bdev_wait_for_examine"}, *self.measures.config()]

    def register_module(self, module: BdevModule) -> None:
        """Make another kind of bdev known. A room that starts again registers again: the later one counts."""
        self._modules[module.name] = module

    def _on_event(self, event: BdevEvent) -> None:
        if event.kind == "added":
            self.examiner.appeared(event.name)
        if event.kind == "removed":
            self.records.pop(event.name, None)
            self._freed(event.name)
            if (server := self._servers.pop(event.name, None)) is not None:
                server.close()
        self.measures.on_event(event)
        self.events.on_engine(event, self._size_bytes)
        for waiter in tuple(self._changed):
            if not waiter.done():
                waiter.set_result(None)

    def _size_bytes(self, name: str) -> int | None:
        try:
            return self.info(name).size_bytes
        except NoSuchBdev:
            return None

    @property
    def stack(self) -> Stack:
        """The stack, once started."""
        if self._stack is None:
            raise NoSuchDevice("the bdev subsystem has not started")
        return self._stack

    # -- finding ----------------------------------------------------------------------------------

    def infos(self) -> list[BdevInfo]:
        """All bdevs, in the engine's order."""
        return [BdevInfo.of(raw) for raw in self.stack.engine.bdev_info()]

    def info(self, name: str) -> BdevInfo:
        """The bdev of that name, alias or UUID; `NoSuchBdev`."""
        engine = self.stack.engine
        try:
            return BdevInfo.of(engine.bdev_info(name)[0])
        except OSError as error:
            if error.errno != ENODEV:
                raise from_engine(error) from error
        for raw in engine.bdev_info():
            if name == raw["uuid"] or name in raw["aliases"]:
                return BdevInfo.of(raw)
        raise NoSuchBdev(f"no bdev is named {name!r:.256}")

    def describe(self, info: BdevInfo) -> dict[str, Any]:
        """As bdev_get_bdevs shows it."""
        record = self.records.get(info.name)
        return describe(info, self.module(info), record.params if record is not None else {})

    def exists(self, name: str) -> bool:
        """Whether a bdev has that name, alias or UUID."""
        try:
            self.info(name)
        except NoSuchBdev:
            return False
        return True

    def module(self, info: BdevInfo) -> BdevModule | None:
        """The kind of a bdev."""
        return self._modules.get(info.module)

    def module_named(self, name: str) -> BdevModule:
        """The kind of that name; `KeyError` is a programming error."""
        return self._modules[name]

    def modules(self) -> list[BdevModule]:
        """All kinds."""
        return list(self._modules.values())

    def handle(self, name: str) -> BdevHandle:
        """A handle by name, alias or UUID; `NoSuchBdev`."""
        return BdevHandle(self.stack, self.info(name).name)

    async def wait_for(self, name: str, timeout_ms: int) -> BdevInfo:
        """As `info`, but wait up to ``timeout_ms`` for it to appear."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_ms / 1000
        while True:
            try:
                return self.info(name)
            except NoSuchBdev:
                left = deadline - loop.time()
                if left <= 0:
                    raise
            waiter: asyncio.Future[None] = loop.create_future()
            self._changed.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=left)
            finally:
                self._changed.discard(waiter)

    # -- making -----------------------------------------------------------------------------------

    async def create_malloc(
        self,
        name: str | None,
        size: int | str | None = None,
        *,
        num_blocks: int | None = None,
        block_size: int = 512,
        uuid: str | None = None,
        physical_block_size: int = 0,
        optimal_io_boundary: int = 0,
        metadata_bytes: int = 0,
    ) -> BdevHandle:
        """A bdev in memory; without a name, "Malloc0" and so on."""
        chosen = self._free_name("Malloc") if name is None else checked_name(name)
        blocks = blocks_of(chosen, size, num_blocks, block_size)
        unique = uuid or new_uuid()
        contents = self.stack.inherited_memory.pop(chosen, None)
        await self.call(
            "bdev_malloc_create",
            chosen,
            num_blocks=blocks,
            block_size=block_size,
            physical_block_size=physical_block_size,
            uuid=unique,
            optimal_io_boundary=optimal_io_boundary,
            metadata_bytes=metadata_bytes,
            **({} if contents is None else {"contents": contents.fileno()}),
        )
        params = {
            "name": chosen,
            "num_blocks": blocks,
            "block_size": block_size,
            "physical_block_size": physical_block_size or block_size,
            "uuid": unique,
            "optimal_io_boundary": optimal_io_boundary,
            "md_size": metadata_bytes,
        }
        return self.record(chosen, Record("bdev_malloc_create", params))

    async def create_null(
        self,
        name: str,
        size: int | str | None = None,
        *,
        num_blocks: int | None = None,
        block_size: int = 512,
        uuid: str | None = None,
        physical_block_size: int = 0,
        metadata_bytes: int = 0,
        hints: Mapping[str, int] | None = None,
    ) -> BdevHandle:
        """A bdev that keeps nothing. ``hints`` (preferred sizes, see `HINTS`) are shown to whoever asks and have no other effect."""
        blocks = blocks_of(checked_name(name), size, num_blocks, block_size)
        unique = uuid or new_uuid()
        await self.call(
            "bdev_null_create",
            name,
            num_blocks=blocks,
            block_size=block_size,
            uuid=unique,
            physical_block_size=physical_block_size,
            metadata_bytes=metadata_bytes,
        )
        params = {
            "name": name,
            "num_blocks": blocks,
            "block_size": block_size,
            "physical_block_size": physical_block_size or block_size,
            "uuid": unique,
            "md_size": metadata_bytes,
            **(hints or {}),
        }
        return self.record(name, Record("bdev_null_create", params))

    async def create_file(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        module: Literal["uring", "aio"] = "uring",
        size: int | str | None = None,
        block_size: int = 0,
        readonly: bool = False,
        fallocate: bool = False,
        nowait: bool = False,
        uuid: str | None = None,
    ) -> BdevHandle:
        """A bdev on a file or block device. ``size`` creates the file sparse, or grows it, first."""
        filename = os.path.abspath(os.fspath(path))
        checked_name(name)
        if size is not None:
            _grow_file(filename, parse_size(size))
        unique = uuid or new_uuid()
        await self.call(
            "bdev_file_create", name, filename, module=module, block_size=block_size, readonly=readonly, fallocate=fallocate, uuid=unique
        )
        params: dict[str, Any] = {"name": name, "filename": filename, "uuid": unique}
        shown: dict[str, Any] = {"filename": filename}
        if module == "aio":
            params.update(readonly=readonly, fallocate=fallocate, nowait=nowait)
            shown.update(block_size_override=bool(block_size), readonly=readonly, fallocate=fallocate, nowait=nowait)
        if block_size:
            params["block_size"] = block_size
        return self.record(name, Record(f"bdev_{module}_create", params, shown))

    async def add_python(self, bdev: Bdev | type[Bdev], *, process: bool = False, **options: Any) -> BdevHandle:
        """Put a Python bdev on the stack: an object, served on this loop, or a class, made with ``options`` in a process of its own."""
        from qpair.bdev.modules import python

        name = await (python.add_worker(self, bdev, options) if process else python.add(self, bdev, options))
        return BdevHandle(self.stack, name)

    def serve(self, name: str, server: Server) -> None:
        """``server`` does the I/O of bdev ``name``: told when that goes."""
        self._servers[name] = server

    def server(self, name: str) -> Server | None:
        """What `serve` was told."""
        return self._servers.get(name)

    def servers(self) -> list[Server]:
        """All of them."""
        return list(self._servers.values())

    def record(self, name: str, record: Record) -> BdevHandle:
        """Remember how ``name`` was made."""
        self.records[name] = record
        return BdevHandle(self.stack, name)

    def _free_name(self, prefix: str) -> str:
        """The lowest number that no bdev of that prefix has. All below what is remembered are taken."""
        number = self._lowest.get(prefix, 0)
        while self._exists(f"{prefix}{number}"):
            number += 1
        self._lowest[prefix] = number
        return f"{prefix}{number}"

    def _exists(self, name: str) -> bool:
        try:
            self.stack.engine.bdev_info(name)
        except OSError as error:
            if error.errno != ENODEV:
                raise from_engine(error) from error
            return False
        return True

    def _freed(self, name: str) -> None:
        for prefix, lowest in self._lowest.items():
            number = name.removeprefix(prefix)
            if number.isdecimal() and number.isascii() and len(number) < 20:
                self._lowest[prefix] = min(lowest, int(number))

    # -- changing ---------------------------------------------------------------------------------

    async def delete(self, name: str, *, module: str | None = None, deadline_ms: int = 10_000) -> None:
        """Stop new I/O, drain or abort, remove. ``module``: refuse another kind with `NoSuchBdev`, as SPDK's bdev_KIND_delete.

        Who serves a Python bdev has half of ``deadline_ms`` again to end, and at most what its kind allows.
        """
        if self.examiner.forget(name) and not self.exists(name):
            return  # asked for, but its base never came
        info = self._of_kind(name, module)
        self.examiner.forget(info.name)
        server = self._servers.get(info.name)
        await self.call("bdev_unregister", info.name, deadline_ms=deadline_ms)
        self.records.pop(info.name, None)
        self._servers.pop(info.name, None)
        if server is not None:
            await server.finish(deadline_ms / 2000)

    async def resize(self, name: str, size: int | str, *, module: str | None = None) -> None:
        """Grow or shrink to ``size`` bytes, a multiple of the block size."""
        info = self._of_kind(name, module)
        blocks = blocks_of(info.name, size, None, info.block_size)
        await self.call("bdev_resize", info.name, blocks)
        if (record := self.records.get(info.name)) is not None and "num_blocks" in record.params:
            record.params["num_blocks"] = blocks

    async def rescan(self, name: str, *, module: str | None = None) -> None:
        """Take the size that the file has now."""
        info = self._of_kind(name, module)
        if info.path is None:
            raise InvalidArgument(f"bdev {info.name!r} is no file: there is nothing to scan")
        size = _file_size(info.name, info.path)
        blocks = size // info.block_size
        if blocks != info.num_blocks:
            await self.call("bdev_resize", info.name, blocks)

    async def iostat(self, name: str | None = None, *, reset: bool = False) -> list[dict[str, Any]]:
        """As `Measures.iostat`."""
        return await self.measures.iostat(name, reset="all" if reset else "none")

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        """One asynchronous call of the engine, with errors of this package."""
        try:
            token = getattr(self.stack.engine, method)(*args, **options)
        except OSError as error:
            raise from_engine(error) from error
        return await self.stack.bridge.call(token)

    def _of_kind(self, name: str, module: str | None) -> BdevInfo:
        info = self.info(name)
        if module is not None and info.module != module:
            raise NoSuchBdev(f"bdev {info.name!r} is of module {info.module}, not {module}")
        return info


def new_uuid() -> str:
    """A random UUID."""
    return str(uuid4())


def checked_name(name: str) -> str:
    """``name``, if a bdev may be named so."""
    if not name or len(name) > 255 or not name.isprintable():
        raise InvalidArgument(f"bdev name {name!r:.80}: 1 to 255 printable characters")
    return name


def blocks_of(name: str, size: int | str | None, num_blocks: int | None, block_size: int) -> int:
    """The number of blocks, from either."""
    if not 0 < block_size <= BLOCK_SIZE_MAX:
        raise InvalidArgument(f"bdev {name!r}: block_size {block_size} is not from 1 to {BLOCK_SIZE_MAX}")
    if num_blocks is None:
        if size is None:
            raise InvalidArgument(f"bdev {name!r}: give a size")
        num_blocks, rest = divmod(parse_size(size), block_size)
        if rest:
            raise InvalidArgument(f"bdev {name!r}: size {size} is no multiple of block_size {block_size}")
    if num_blocks <= 0:
        raise InvalidArgument(f"bdev {name!r}: it would have {num_blocks} blocks; at least 1")
    if num_blocks > (2**63 - 1) // block_size:
        raise InvalidArgument(f"bdev {name!r}: {num_blocks} blocks of {block_size} bytes are more than {2**63 - 1} bytes")
    return num_blocks


def _grow_file(path: str, size: int) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size < size:
                os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_errno(error.errno or 5, f"file {path}: {error.strerror}") from error


def _file_size(name: str, path: str) -> int:
    """Of a file or a block device, in bytes."""
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise from_errno(error.errno or 5, f"bdev {name!r}: {path}: {error.strerror}") from error
