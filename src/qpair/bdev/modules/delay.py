"""A bdev whose reads and writes come back later than its base's, by an average and a p99 latency.

The latencies can be changed while it is used, and are saved as they are. ``p99`` is what one I/O in a hundred has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from qpair.bdev.control import BdevSubsystem, Record, SimpleModule
from qpair.bdev.derive import delay_uuid
from qpair.bdev.model import BdevInfo, BdevModule
from qpair.bdev.modules.answers import BadParameters
from qpair.errors import InvalidArgument, NoSuchBdev, from_engine
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U64, Uuid

if TYPE_CHECKING:
    from qpair._engine import DelayControl
    from qpair.app.stack import Stack

__all__ = ["Delays", "make"]

LatencyType = Literal["avg_read", "p99_read", "avg_write", "p99_write"]


class Delays(SimpleModule):
    """The delay bdevs of one stack."""

    def __init__(self, room: BdevSubsystem) -> None:
        super().__init__(room, "delay", "delay")
        self._controls: dict[str, DelayControl] = {}

    def driver_specific(self, info: BdevInfo) -> dict[str, Any]:
        """As it would be made again."""
        record = self._room.records.get(info.name)
        return {"delay": record.params} if record is not None else {}

    async def create(self, name: str, base: str, latencies: dict[LatencyType, int], uuid: str | None = None) -> None:
        """Have ``name`` stand on ``base``, also if that comes later. ``latencies`` in microseconds, all four."""
        for kind, average, p99 in (
            ("read", latencies["avg_read"], latencies["p99_read"]),
            ("write", latencies["avg_write"], latencies["p99_write"]),
        ):
            if p99 < average:
                raise InvalidArgument(f"p99_{kind}_latency {p99}: at least avg_{kind}_latency, {average}")

        async def make_it() -> None:
            below = self._room.info(base)
            unique = uuid or delay_uuid(below.uuid)
            try:
                self._controls[name] = self._room.stack.engine.bdev_delay_create(name, below.name, uuid=unique, **latencies)
            except OSError as error:
                raise from_engine(error) from error
            params: dict[str, Any] = {"name": name, "base_bdev_name": below.name, "uuid": unique}
            params.update({f"{kind}_latency": micros for kind, micros in latencies.items()})
            self._room.record(name, Record("bdev_delay_create", params))

        await self._room.examiner.declare(name, base, make_it)

    def update(self, name: str, latency_type: LatencyType, latency_us: int) -> None:
        """Change one latency: it counts for what comes back from now on."""
        info = self._room.info(name)
        record, control = self._room.records.get(info.name), self._controls.get(info.name)
        if info.module != self.name or record is None or control is None:
            raise NoSuchBdev(f"bdev {info.name!r} is no delay bdev")
        try:
            control.set(latency_type, latency_us)
        except OSError as error:
            raise from_engine(error) from error
        record.params[f"{latency_type}_latency"] = latency_us


def make(room: BdevSubsystem) -> BdevModule:
    """The delay bdevs of a stack."""
    return Delays(room)


def _delays(stack: Stack) -> Delays:
    module = stack.bdevs.module_named("delay")
    assert isinstance(module, Delays)
    return module


class DelayCreate(Params):
    """Latencies in microseconds; ``base_bdev_name`` may appear later."""

    name: str
    base_bdev_name: str
    avg_read_latency: U64
    p99_read_latency: U64
    avg_write_latency: U64
    p99_write_latency: U64
    uuid: Uuid | None = None


@method("bdev_delay_create", params=DelayCreate)
async def bdev_delay_create(stack: Stack, params: DelayCreate) -> str:
    """A bdev that holds reads and writes for a time; the answer is its name."""
    latencies: dict[LatencyType, int] = {
        "avg_read": params.avg_read_latency,
        "p99_read": params.p99_read_latency,
        "avg_write": params.avg_write_latency,
        "p99_write": params.p99_write_latency,
    }
    await _delays(stack).create(params.name, params.base_bdev_name, latencies, params.uuid)
    return params.name


class DelayDelete(Params):
    """One delay bdev by name."""

    name: str


@method("bdev_delay_delete", params=DelayDelete)
async def bdev_delay_delete(stack: Stack, params: DelayDelete) -> bool:
    """Remove a delay bdev; its base is free again."""
    await stack.bdevs.delete(params.name, module="delay")
    return True


class DelayUpdate(Params):
    """``latency_us`` in microseconds."""

    delay_bdev_name: str
    latency_type: LatencyType
    latency_us: U64


@method("bdev_delay_update_latency", params=DelayUpdate)
async def bdev_delay_update_latency(stack: Stack, params: DelayUpdate) -> bool:
    """Change one latency of a delay bdev while it is used."""
    try:
        _delays(stack).update(params.delay_bdev_name, params.latency_type, params.latency_us)
    except NoSuchBdev as error:
        raise BadParameters("The requested bdev does not exist.", errno=error.errno) from error
    return True
