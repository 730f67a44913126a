"""A bdev that fails, keeps, spoils or puts off I/O of its base on request: ``EE_disk`` stands on ``disk``.

Injected errors are for a test that is going on: they are not saved. The base may come later; when it goes, the error bdev is forgotten, as in SPDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from qpair.bdev.control import BdevSubsystem, Record
from qpair.bdev.derive import part_uuid
from qpair.bdev.model import BdevInfo, BdevModule
from qpair.errors import AlreadyExists, InvalidArgument, NoSuchBdev, from_engine
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U8, U32, U64, Uuid

if TYPE_CHECKING:
    from qpair._engine import ErrorControl
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry

__all__ = ["ErrorBdevs", "make"]

IoType = Literal["clear", "read", "write", "unmap", "flush", "all"]
ErrorType = Literal["failure", "pending", "corrupt_data", "nomem", "nvme_failure"]


class Wanted(msgspec.Struct):
    """One base's. ``made``: it stood on it already."""

    base: str
    uuid: str | None
    made: bool = False


class ErrorBdevs:
    """The error bdevs of one stack."""

    name = "error"
    product_name = "Error Injection Disk"

    def __init__(self, room: BdevSubsystem) -> None:
        self._room = room
        self._wanted: dict[str, Wanted] = {}
        self._controls: dict[str, ErrorControl] = {}

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """What it stands on."""
        record = self._room.records.get(info.name)
        return {"error_disk": record.shown} if record is not None else {}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """One call a base, also for one that is not there yet."""
        entries: list[ConfigEntry] = []
        for wanted in self._wanted.values():
            if not self._ended(wanted):
                uuid = {"uuid": wanted.uuid} if wanted.uuid is not None else {}
                entries.append({"method": "bdev_error_create", "params": {"base_name": wanted.base, **uuid}})
        return entries

    def _ended(self, wanted: Wanted) -> bool:
        return wanted.made and not self._room.exists(_name(wanted.base))

    async def create(self, base: str, uuid: str | None = None) -> str:
        """Have ``EE_base`` stand on ``base``, also if that comes later; its name."""
        if (known := self._wanted.get(base)) is not None:
            if not self._ended(known):
                raise AlreadyExists(f"bdev {base!r} has an error bdev already")
            self._forget(known)
        wanted = Wanted(base, uuid)

        async def make_it() -> None:
            if wanted.made:
                self._forget(wanted)
            else:
                self._make(wanted)

        self._wanted[base] = wanted
        try:
            await self._room.examiner.declare(_name(base), base, make_it)
        except BaseException:
            self._wanted.pop(base, None)
            raise
        return _name(base)

    async def delete(self, name: str) -> None:
        """Remove one."""
        await self._room.delete(name, module="error")
        for wanted in tuple(self._wanted.values()):
            if _name(wanted.base) == name or self._ended(wanted):
                self._forget(wanted)

    def _forget(self, wanted: Wanted) -> None:
        self._wanted.pop(wanted.base, None)
        self._room.examiner.forget(_name(wanted.base))

    def _make(self, wanted: Wanted) -> None:
        below, name = self._room.info(wanted.base), _name(wanted.base)
        unique = wanted.uuid or part_uuid(below.uuid, 0, below.num_blocks)
        try:
            self._controls[name] = self._room.stack.engine.bdev_error_create(name, below.name, uuid=unique)
        except OSError as error:
            raise from_engine(error) from error
        wanted.made = True
        self._room.record(name, Record("bdev_error_create", {}, {"base_bdev": below.name}))

    def inject(self, name: str, io_type: IoType, error_type: ErrorType, **how: int) -> None:
        """Treat the next ``num`` I/Os of ``io_type`` so, see ``ErrorControl.inject``; "clear": none of any type."""
        control = self._control(name)
        nvme = how.get("nvme_sct", 0) or how.get("nvme_sc", 0)
        if bool(nvme) != (error_type == "nvme_failure"):
            raise InvalidArgument("nvme_sct or nvme_sc should be specified for NVMe error injection, and for no other")
        try:
            if io_type == "clear":
                control.clear()
            else:
                control.inject(io_type, error_type, **how)
        except OSError as error:
            raise from_engine(error) from error

    async def resume(self, name: str) -> None:
        """Keep no I/O any more, and let those go on that were kept."""
        try:
            token = self._control(name).resume()
        except OSError as error:
            raise from_engine(error) from error
        await self._room.stack.bridge.call(token)

    def _control(self, name: str) -> ErrorControl:
        info = self._room.info(name)
        control = self._controls.get(info.name)
        if info.module != self.name or control is None:
            raise NoSuchBdev(f"bdev {info.name!r} is no error bdev")
        return control


def _name(base: str) -> str:
    return f"EE_{base}"


def make(room: BdevSubsystem) -> BdevModule:
    """The error bdevs of a stack."""
    return ErrorBdevs(room)


def _errors(stack: Stack) -> ErrorBdevs:
    module = stack.bdevs.module_named("error")
    assert isinstance(module, ErrorBdevs)
    return module


class ErrorCreate(Params):
    """``base_name`` may appear later; the error bdev's name is ``EE_`` and that."""

    base_name: str
    uuid: Uuid | None = None


@method("bdev_error_create", params=ErrorCreate)
async def bdev_error_create(stack: Stack, params: ErrorCreate) -> bool:
    """A bdev that errors can be injected into."""
    await _errors(stack).create(params.base_name, params.uuid)
    return True


class ErrorNamed(Params):
    """One error bdev by its own name."""

    name: str


@method("bdev_error_delete", params=ErrorNamed)
async def bdev_error_delete(stack: Stack, params: ErrorNamed) -> bool:
    """Remove an error bdev; its base is free again."""
    await _errors(stack).delete(params.name)
    return True


class InjectError(Params):
    """``num``: how many I/Os; ``queue_depth``: only while so many are under way; ``corrupt_offset``: in bytes, of an I/O's data."""

    name: str
    io_type: IoType
    error_type: ErrorType
    nvme_sct: U32 | None = None
    nvme_sc: U32 | None = None
    num: U32 | None = None
    queue_depth: U64 | None = None
    corrupt_offset: U64 | None = None
    corrupt_value: U8 | None = None


@method("bdev_error_inject_error", params=InjectError)
async def bdev_error_inject_error(stack: Stack, params: InjectError) -> bool:
    """Have the next I/Os of a type fail, stay, change or wait."""
    how = {field: getattr(params, field) for field in ("nvme_sct", "nvme_sc", "num", "queue_depth", "corrupt_offset", "corrupt_value")}
    _errors(stack).inject(
        params.name, params.io_type, params.error_type, **{field: value for field, value in how.items() if value is not None}
    )
    return True


@method("bdev_error_resume_pending", params=ErrorNamed)
async def bdev_error_resume_pending(stack: Stack, params: ErrorNamed) -> bool:
    """Let I/Os that were kept go on."""
    await _errors(stack).resume(params.name)
    return True
