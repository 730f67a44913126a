"""RAID bdevs: raid0, raid1 and concat, with SPDK's methods, superblock and figures.

How it works: the engine has the arrays, also those that wait for members: what must be on stable media before a write is acknowledged cannot wait for an interpreter.
Here are the methods, and how arrays are shown and saved. A bdev that appears is offered to the engine, which knows what its superblock says and which
arrays wait for its name.

An array with superblocks is not saved in the configuration: its members bring it back.

Errors: SPDK's codes, and its sentences with the reason behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from qpair.bdev.control import BdevSubsystem
from qpair.bdev.model import BdevInfo, BdevModule
from qpair.bdev.modules.answers import InternalError
from qpair.errors import InvalidArgument, NoSuchDevice, QpairError
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U32, Uuid

if TYPE_CHECKING:
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry

__all__ = ["Raids", "make"]

# SPDK takes these and the same in any case; its schema names them so.
LEVELS = {"raid0": "raid0", "0": "raid0", "raid1": "raid1", "1": "raid1", "raid5f": "raid5f", "5f": "raid5f", "concat": "concat"}
WINDOW_KB_DEFAULT = 1024


class Raids:
    """The arrays of one stack."""

    name = "raid"
    product_name = "Raid Volume"

    def __init__(self, room: BdevSubsystem) -> None:
        self._room = room
        self.window_kb = WINDOW_KB_DEFAULT
        self.bandwidth_mb = 0
        self._told = True

    async def call(self, name: str, *args: Any, **options: Any) -> Any:
        """One call of the engine, which by then has the options that were set before it was there."""
        if not self._told:
            self._tell()
        return await self._room.call(name, *args, **options)

    def _tell(self) -> None:
        engine = self._room.stack.engine
        engine.bdev_raid_set_options(process_window_size_kb=self.window_kb, process_max_bandwidth_mb_sec=self.bandwidth_mb)
        self._told = True

    def arrays(self) -> list[dict[str, Any]]:
        """All of them, as SPDK's JSON shows them."""
        return [_shown(raw) for raw in self._room.stack.engine.bdev_raid_info()]

    def find(self, name: str) -> dict[str, Any] | None:
        """One by name."""
        return next((array for array in self.arrays() if array["name"] == name), None)

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """The array behind an online bdev."""
        array = self.find(info.name)
        return {"raid": {key: value for key, value in array.items() if key != "name"}} if array is not None else {}

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """The options, and the arrays that no superblock brings back."""
        entries: list[ConfigEntry] = []
        if (self.window_kb, self.bandwidth_mb) != (WINDOW_KB_DEFAULT, 0):
            params = {"process_window_size_kb": self.window_kb, "process_max_bandwidth_mb_sec": self.bandwidth_mb}
            entries.append({"method": "bdev_raid_set_options", "params": params})
        entries.extend({"method": "bdev_raid_create", "params": _saved(array)} for array in self.arrays() if not array["superblock"])
        return entries

    async def examine(self, stack: Stack, info: BdevInfo) -> None:
        """Offer a bdev that nobody claimed: by its superblock, or because an array waits for it."""
        if info.zoned is None and info.supported.get("read", False):
            await self.call("bdev_raid_examine", info.name)

    async def stop(self) -> None:
        """Nobody is missed any more: the process ends."""
        self._room.stack.engine.bdev_raid_shut_down()

    def set_options(self, window_kb: int | None, bandwidth_mb: int | None) -> None:
        """For rebuilds that begin from now on; None leaves one as it is."""
        if window_kb == 0:
            raise InvalidArgument("process_window_size_kb 0: at least 1")
        self.window_kb = self.window_kb if window_kb is None else window_kb
        self.bandwidth_mb = self.bandwidth_mb if bandwidth_mb is None else bandwidth_mb
        self._told = False


def _shown(raw: dict[str, Any]) -> dict[str, Any]:
    """In SPDK's order; ``process`` only while there is one."""
    array = {key: value for key, value in raw.items() if key not in ("process", "base_bdevs")}
    if raw["process"] is not None:
        target, done, total = raw["process"]
        array["process"] = {"type": "rebuild", "target": target, "progress": {"blocks": done, "percent": done * 100 // max(total, 1)}}
    array["base_bdevs_list"] = raw["base_bdevs"]
    return array


def _saved(array: dict[str, Any]) -> dict[str, Any]:
    bases = [base["name"] or f"removed_base_bdev_{slot}" for slot, base in enumerate(array["base_bdevs_list"])]
    strip = {"strip_size_kb": array["strip_size_kb"]} if array["strip_size_kb"] else {}
    return {
        "name": array["name"],
        "uuid": array["uuid"],
        **strip,
        "raid_level": array["raid_level"],
        "superblock": False,
        "base_bdevs": bases,
    }


def make(room: BdevSubsystem) -> BdevModule:
    """The arrays of a stack."""
    return Raids(room)


def _raids(stack: Stack) -> Raids:
    module = stack.bdevs.module_named("raid")
    assert isinstance(module, Raids)
    return module


@contextmanager
def _said(beginning: str) -> Iterator[None]:
    """SPDK's sentence, the errno's text, and why; the code stays."""
    try:
        yield
    except QpairError as error:
        error.message = f"{beginning}: {error.text} ({error.message})"
        raise


class RaidCreate(Params):
    """``strip_size_kb``: for raid0 and concat, a power of two. ``base_bdevs``: those that are not there are waited for."""

    name: str
    raid_level: Literal["raid0", "0", "raid1", "1", "raid5f", "5f", "concat"]
    base_bdevs: Annotated[list[str], Meta(max_length=255)]
    strip_size_kb: U32 = 0
    uuid: Uuid | None = None
    superblock: bool = False


@method("bdev_raid_create", params=RaidCreate)
async def bdev_raid_create(stack: Stack, params: RaidCreate) -> bool:
    """Make an array; it is a bdev as soon as all its members are there."""
    if "" in params.base_bdevs:
        raise InvalidArgument("The base bdev name cannot be empty: Invalid argument")
    with _said(f"Failed to create RAID bdev {params.name}"):
        await _raids(stack).call(
            "bdev_raid_create",
            params.name,
            level=LEVELS[params.raid_level],
            base_bdevs=params.base_bdevs,
            strip_size_kb=params.strip_size_kb,
            uuid=params.uuid,
            superblock=params.superblock,
        )
    return True


class RaidDelete(Params):
    """``clear_sb``: and have its members forget it."""

    name: str
    clear_sb: bool = False


@method("bdev_raid_delete", params=RaidDelete)
async def bdev_raid_delete(stack: Stack, params: RaidDelete) -> bool:
    """Remove an array; its members are free again."""
    if _raids(stack).find(params.name) is None:
        raise NoSuchDevice(f"raid bdev {params.name} not found")
    try:
        await _raids(stack).call("bdev_raid_delete", params.name, clear_superblock=params.clear_sb)
    except QpairError as error:
        raise InternalError(error.text, errno=error.errno) from error
    return True


class RaidGetBdevs(Params):
    """``category``: the state, or all."""

    category: Literal["all", "online", "configuring", "offline"]


@method("bdev_raid_get_bdevs", params=RaidGetBdevs)
async def bdev_raid_get_bdevs(stack: Stack, params: RaidGetBdevs) -> list[dict[str, Any]]:
    """Arrays with their members, and a rebuild's progress."""
    return [array for array in _raids(stack).arrays() if params.category in ("all", array["state"])]


class RaidAddBase(Params):
    """``base_bdev`` takes an empty slot of ``raid_bdev``."""

    raid_bdev: str
    base_bdev: str


@method("bdev_raid_add_base_bdev", params=RaidAddBase)
async def bdev_raid_add_base_bdev(stack: Stack, params: RaidAddBase) -> bool:
    """Add a member; an online mirror is rebuilt onto it."""
    if _raids(stack).find(params.raid_bdev) is None:
        raise NoSuchDevice(f"raid bdev {params.raid_bdev} is not found in config")
    with _said(f"Failed to add base bdev {params.base_bdev} to RAID bdev {params.raid_bdev}"):
        await _raids(stack).call("bdev_raid_add_base", params.raid_bdev, params.base_bdev)
    return True


class RaidRemoveBase(Params):
    """``name`` of the member."""

    name: str


@method("bdev_raid_remove_base_bdev", params=RaidRemoveBase)
async def bdev_raid_remove_base_bdev(stack: Stack, params: RaidRemoveBase) -> bool:
    """Have a member leave its array; one that cannot do without goes offline."""
    with _said("Failed to remove base bdev from raid bdev"):
        await _raids(stack).call("bdev_raid_remove_base", params.name)
    return True


class RaidStart(Params):
    """``name`` of a mirror that waits for members."""

    name: str


@method("qpair_raid_start", params=RaidStart)
async def qpair_raid_start(stack: Stack, params: RaidStart) -> bool:
    """Start a mirror without the members it waits for; what they alone had is lost."""
    if _raids(stack).find(params.name) is None:
        raise NoSuchDevice(f"raid bdev {params.name} not found")
    with _said(f"Failed to start raid bdev {params.name}"):
        await _raids(stack).call("bdev_raid_start", params.name)
    return True


class RaidSetOptions(Params):
    """``process_window_size_kb``: what a rebuild has for itself at a time. ``process_max_bandwidth_mb_sec``: MiB a second; 0: no limit."""

    process_window_size_kb: U32 | None = None
    process_max_bandwidth_mb_sec: U32 | None = None


@method("bdev_raid_set_options", params=RaidSetOptions, startup=True)
async def bdev_raid_set_options(stack: Stack, params: RaidSetOptions) -> bool:
    """How rebuilds are done from now on."""
    _raids(stack).set_options(params.process_window_size_kb, params.process_max_bandwidth_mb_sec)
    return True
