"""What is set and asked of any bdev while it works: limits and groups that share one, histograms, counters, queue depth, a time-out.

How it works: the engine does it per reactor without locks; here are names, units and SPDK's shapes. In Python, by ``stack.bdevs.measures``, limits are exact and in bytes;
SPDK's methods take megabytes and round up, I/Os to thousands. Ticks are nanoseconds.

A limit holds for a bdev on all reactors together. I/O beyond it waits; reads and writes count, as do zcopy and NVMe commands that move data. Each kind waits for its own rates alone: reads
pass writes that wait, and the other way round. A group is a limit that several bdevs share, beside their own; a bdev is in one group at most, and leaves it when it goes.

Errors: `NoSuchBdev`; `NoSuchFile` for a group that is not there; `AlreadyExists`; `Busy` for a bdev that is in another group; `InvalidArgument` by field, value and limit.

Limits: rates up to 2**32 I/Os and 2 TiB a second are kept, greater ones are none; granularity of a histogram 1 to 14.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from errno import EFAULT
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from qpair.app.rpc import TICKS_A_SECOND
from qpair.app.sizes import parse_size
from qpair.bdev.model import IO_TYPES, MIB, Limits, assigned
from qpair.errors import InvalidArgument, InvalidParameters, QpairError
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U8, U64, U64_MAX, ResetStatMode

if TYPE_CHECKING:
    from qpair._engine import BdevEvent
    from qpair.app.stack import Stack
    from qpair.app.subsystems import ConfigEntry
    from qpair.bdev.control import BdevSubsystem

__all__ = ["Histogram", "HistogramDisabled", "Limits", "Measures", "QosGroup"]

IOS_STEP = 1000
"""SPDK rounds I/Os a second up to multiples of it."""
NAMES_MAX = 1024
TIMEOUT_MAX_S = 7 * 86_400
GRANULARITY = 7
MIN_NS = 1000
MAX_NS = 120_000_000_000
# Those of SPDK's I/O types that the engine never does: a histogram of them stays empty.
NEVER_DONE = frozenset({"nvme_io_md", "get_zone_info", "abort", "nvme_iov_md", "nvme_nssr"})

ResetMode = Literal["none", "all", "maxmin", "error"]
Rates = tuple[int | None, int | None, int | None, int | None]


class HistogramDisabled(QpairError):
    """EFAULT: nobody enabled a histogram of that bdev. As SPDK, -32603 and "Bad address"."""

    errno_default = EFAULT
    rpc_code = -32603
    rpc_text = "Bad address"


class NoRates(InvalidArgument):
    """EINVAL: bdev_set_qos_limit without a limit. As SPDK, -22 and "No rate limits specified"."""

    rpc_text = "No rate limits specified"


class QosGroup(msgspec.Struct, frozen=True):
    """Bdevs that share ``limits``."""

    name: str
    limits: Limits
    bdevs: tuple[str, ...]


class Histogram(msgspec.Struct, frozen=True):
    """How long I/Os took, in nanoseconds. ``counts``: of each bucket, ``1 << granularity`` a range, from range ``min_range`` to ``max_range``."""

    granularity: int
    min_range: int
    max_range: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Histogram:
        """From the engine."""
        counts = memoryview(raw["buckets"]).cast("Q")
        return cls(granularity=raw["granularity"], min_range=raw["min_range"], max_range=raw["max_range"], counts=tuple(counts))

    @classmethod
    def from_rpc(cls, answer: Mapping[str, Any]) -> Histogram:
        """From the answer of bdev_get_histogram, qpair's or SPDK's. Times are then ticks of ``tsc_rate``."""
        return cls.of({**answer, "buckets": base64.b64decode(answer["histogram"])})

    def to_rpc(self) -> dict[str, Any]:
        """As bdev_get_histogram answers."""
        packed = b"".join(count.to_bytes(8, "little") for count in self.counts)
        return {
            "histogram": base64.b64encode(packed).decode(),
            "granularity": self.granularity,
            "min_range": self.min_range,
            "max_range": self.max_range,
            "tsc_rate": TICKS_A_SECOND,
        }

    @property
    def total(self) -> int:
        """I/Os counted."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Each bucket as (first value, first value past it, count). The first has all that is less, the last all that is more."""
        start = 0
        for place, count in enumerate(self.counts):
            end = self._end(place)
            yield start, end, count
            start = end

    def percentile(self, percent: float) -> int:
        """A time in nanoseconds that ``percent`` of all I/Os did not reach or just reached: the end of their last bucket. 0 if there were none."""
        if not 0 <= percent <= 100:
            raise InvalidArgument(f"percent {percent}: 0 to 100")
        wanted, so_far = self.total * percent / 100, 0
        for _, end, count in self:
            so_far += count
            if count and so_far >= wanted:
                return end
        return 0

    def cumulated(self, borders: Sequence[int]) -> list[int]:
        """How many I/Os took no longer than each of the ascending ``borders`` (nanoseconds, to the bucket), and last, how many there were."""
        counts = [0] * (len(borders) + 1)
        at = so_far = 0
        for start, _, count in self:
            so_far += count
            while at < len(borders) and start > borders[at]:
                at += 1
                counts[at] = counts[at - 1]
            counts[at] = so_far
        return counts[: at + 1] + [so_far] * (len(borders) - at)

    def _end(self, place: int) -> int:
        within = (place & ((1 << self.granularity) - 1)) + 1
        bucket_range = self.min_range + (place >> self.granularity)
        if bucket_range == 0:
            return within
        return (1 << (bucket_range + self.granularity - 1)) + (within << (bucket_range - 1))


class Measures:
    """``stack.bdevs.measures``."""

    def __init__(self, room: BdevSubsystem) -> None:
        self._room = room
        self._histograms: dict[str, dict[str, Any]] = {}
        self._timeouts: dict[str, int] = {}

    def on_event(self, event: BdevEvent) -> None:
        """Called by the room."""
        if event.kind == "removed":
            self._histograms.pop(event.name, None)
            self._timeouts.pop(event.name, None)

    # -- limits -----------------------------------------------------------------------------------

    async def set_limits(
        self,
        name: str,
        *,
        rw_ios: int | None = None,
        rw_bytes: int | str | None = None,
        r_bytes: int | str | None = None,
        w_bytes: int | str | None = None,
    ) -> None:
        """Limit a bdev to so many I/Os and bytes a second. None leaves a limit as it is, 0 takes it away; holds when this returns, also under load."""
        await self._room.call("bdev_set_limits", self._room.info(name).name, _rates(rw_ios, rw_bytes, r_bytes, w_bytes))

    def limits(self, name: str) -> Limits:
        """A bdev's own limits."""
        return self._room.info(name).limits

    async def create_group(
        self,
        group: str,
        *,
        rw_ios: int | None = None,
        rw_bytes: int | str | None = None,
        r_bytes: int | str | None = None,
        w_bytes: int | str | None = None,
    ) -> None:
        """A group without bdevs."""
        await self._room.call("qos_group_create", group, _rates(rw_ios, rw_bytes, r_bytes, w_bytes))

    async def set_group(
        self,
        group: str,
        *,
        rw_ios: int | None = None,
        rw_bytes: int | str | None = None,
        r_bytes: int | str | None = None,
        w_bytes: int | str | None = None,
    ) -> None:
        """Change what its bdevs share, as `set_limits`."""
        await self._room.call("qos_group_set", group, _rates(rw_ios, rw_bytes, r_bytes, w_bytes))

    async def delete_group(self, group: str) -> None:
        """Its bdevs stay, without that limit."""
        await self._room.call("qos_group_delete", group)

    async def add_to_group(self, group: str, bdev: str) -> None:
        """Let a bdev share the group's limits."""
        await self._room.call("qos_group_add", group, self._room.info(bdev).name)

    async def remove_from_group(self, group: str, bdev: str) -> None:
        """Let it go."""
        await self._room.call("qos_group_remove", group, self._room.info(bdev).name)

    def groups(self) -> list[QosGroup]:
        """All groups by name."""
        raw = self._room.stack.engine.qos_groups()
        return [QosGroup(name=group["name"], limits=Limits(*group["limits"]), bdevs=tuple(group["bdevs"])) for group in raw]

    # -- histograms, counters ---------------------------------------------------------------------

    async def enable_histogram(
        self,
        name: str,
        enable: bool = True,
        *,
        io_type: str | None = None,
        granularity: int = GRANULARITY,
        min_ns: int = MIN_NS,
        max_ns: int = MAX_NS,
    ) -> None:
        """Begin a histogram of a bdev's I/O anew, or end it. ``io_type``: only of that type, by SPDK's name."""
        if io_type is not None and io_type not in IO_TYPES:
            raise InvalidArgument(f"I/O type {io_type!r:.64}: one of {', '.join(IO_TYPES)}")
        found = self._room.info(name).name
        ops = None if io_type is None else [io_type] if io_type not in NEVER_DONE else []
        await self._room.call("bdev_enable_histogram", found, enable, ops=ops, granularity=granularity, min_ns=min_ns, max_ns=max_ns)
        if enable:
            self._histograms[found] = {"opc": io_type, "granularity": granularity, "min_nsec": min_ns, "max_nsec": max_ns}
        else:
            self._histograms.pop(found, None)

    async def histogram(self, name: str) -> Histogram:
        """The histogram so far; `HistogramDisabled`."""
        try:
            return Histogram.of(await self._room.call("bdev_histogram", self._room.info(name).name))
        except QpairError as error:
            if error.errno == EFAULT:
                raise HistogramDisabled(str(error)) from None
            raise

    async def iostat(self, name: str | None = None, *, reset: ResetMode = "none") -> list[dict[str, Any]]:
        """The engine's counters, one dict a bdev in the order of `BdevSubsystem.infos`, see ``Engine.bdev_iostat``; and then reset them."""
        raw: list[dict[str, Any]] = await self._room.call("bdev_iostat", name, reset=reset)
        if len(raw) > 1:
            order = {info.name: place for place, info in enumerate(self._room.infos())}
            raw.sort(key=lambda entry: order.get(entry["name"], len(order)))
        return raw

    async def set_sampling(self, name: str, period_us: int) -> None:
        """Look at a bdev's queue depth once in so many microseconds; 0: not any more. Each look wakes all reactors."""
        await self._room.call("bdev_set_sampling", self._room.info(name).name, period_us)

    async def set_timeout(self, name: str, seconds: int) -> None:
        """Tell it as `Failed` when an I/O of a bdev takes longer, whoever submitted it; the I/O is left alone. 0: not any more. Each look, four in a time-out and at
        least one a second, wakes all reactors."""
        if not 0 <= seconds <= TIMEOUT_MAX_S:
            raise InvalidArgument(f"timeout_in_sec is {seconds}, must be from 0 to {TIMEOUT_MAX_S}")
        found = self._room.info(name).name
        await self._room.call("bdev_set_overdue", found, seconds * 1000)
        if seconds:
            self._timeouts[found] = seconds
        else:
            self._timeouts.pop(found, None)

    # -- configuration ----------------------------------------------------------------------------

    def config(self) -> list[ConfigEntry]:
        """The calls that set all this anew, for bdevs that are there."""
        entries: list[ConfigEntry] = []
        for info in self._room.infos():
            if info.limits != Limits():
                entries.append(_limits_call(info.name, info.limits))
            if (options := self._histograms.get(info.name)) is not None:
                given = {key: value for key, value in options.items() if value is not None}
                entries.append({"method": "bdev_enable_histogram", "params": {"name": info.name, "enable": True, **given}})
            if (seconds := self._timeouts.get(info.name)) is not None:
                entries.append({"method": "qpair_bdev_set_timeout", "params": {"name": info.name, "timeout_in_sec": seconds}})
        for group in self.groups():
            entries.append({"method": "qpair_bdev_qos_group_create", "params": {"name": group.name, **_exact(group.limits)}})
            for bdev in group.bdevs:
                entries.append({"method": "qpair_bdev_qos_group_add_bdev", "params": {"name": group.name, "bdev_name": bdev}})
        return entries


def _rates(rw_ios: int | None, *sizes: int | str | None) -> tuple[int | None, ...]:
    return (rw_ios, *(None if size is None else parse_size(size, what="bytes a second") for size in sizes))


def _exact(limits: Limits) -> dict[str, int]:
    return {f"{field}_per_sec": value for field, value in msgspec.structs.asdict(limits).items() if value}


def _limits_call(name: str, limits: Limits) -> ConfigEntry:
    """SPDK's method where it can say that."""
    sizes = (limits.rw_bytes, limits.r_bytes, limits.w_bytes)
    if limits.rw_ios % IOS_STEP or any(size % MIB for size in sizes):
        return {"method": "qpair_bdev_set_limits", "params": {"name": name, **_exact(limits)}}
    shown = {field: value for field, value in assigned(limits).items() if value}
    return {"method": "bdev_set_qos_limit", "params": {"name": name, **shown}}


# -- JSON-RPC ---------------------------------------------------------------------------------------


class SetQosLimit(Params):
    """Those not given stay as they are; 0 means unlimited. At least one is given."""

    name: str
    rw_ios_per_sec: U64 | None = None
    rw_mbytes_per_sec: U64 | None = None
    r_mbytes_per_sec: U64 | None = None
    w_mbytes_per_sec: U64 | None = None


@method("bdev_set_qos_limit", params=SetQosLimit)
async def bdev_set_qos_limit(stack: Stack, params: SetQosLimit) -> bool:
    """Limit a bdev. I/Os are rounded up to multiples of 1000, as SPDK does."""
    name = stack.bdevs.info(params.name).name
    given = (params.rw_ios_per_sec, params.rw_mbytes_per_sec, params.r_mbytes_per_sec, params.w_mbytes_per_sec)
    # SPDK's own mark of what is not given.
    ios, *megabytes = (None if value == U64_MAX else value for value in given)
    if ios is None and all(value is None for value in megabytes):
        raise NoRates("no rate limits specified: rw_ios_per_sec, rw_mbytes_per_sec, r_mbytes_per_sec or w_mbytes_per_sec is needed")
    steps = None if ios is None else -(-ios // IOS_STEP) * IOS_STEP
    sizes = [None if value is None else min(value, U64_MAX // MIB) * MIB for value in megabytes]
    await stack.bdevs.call("bdev_set_limits", name, (steps if steps is None else min(steps, U64_MAX), *sizes))
    return True


class Exact(Params):
    """Rates a second, kept exactly; those not given stay as they are, 0 means unlimited."""

    name: str
    rw_ios_per_sec: U64 | None = None
    rw_bytes_per_sec: U64 | None = None
    r_bytes_per_sec: U64 | None = None
    w_bytes_per_sec: U64 | None = None

    def rates(self) -> Rates:
        """As the engine takes them."""
        return (self.rw_ios_per_sec, self.rw_bytes_per_sec, self.r_bytes_per_sec, self.w_bytes_per_sec)


@method("qpair_bdev_set_limits", params=Exact)
async def qpair_bdev_set_limits(stack: Stack, params: Exact) -> bool:
    """As bdev_set_qos_limit, in bytes and without rounding."""
    await stack.bdevs.call("bdev_set_limits", stack.bdevs.info(params.name).name, params.rates())
    return True


@method("qpair_bdev_qos_group_create", params=Exact)
async def qpair_bdev_qos_group_create(stack: Stack, params: Exact) -> bool:
    """A group of bdevs that share limits; ``name`` is the group's."""
    await stack.bdevs.call("qos_group_create", params.name, params.rates())
    return True


@method("qpair_bdev_qos_group_set_limits", params=Exact)
async def qpair_bdev_qos_group_set_limits(stack: Stack, params: Exact) -> bool:
    """Change what a group's bdevs share."""
    await stack.bdevs.call("qos_group_set", params.name, params.rates())
    return True


class Named(Params):
    """By name."""

    name: str


@method("qpair_bdev_qos_group_delete", params=Named)
async def qpair_bdev_qos_group_delete(stack: Stack, params: Named) -> bool:
    """Take a group away; its bdevs stay."""
    await stack.bdevs.measures.delete_group(params.name)
    return True


class Member(Params):
    """A group and a bdev."""

    name: str
    bdev_name: str


@method("qpair_bdev_qos_group_add_bdev", params=Member)
async def qpair_bdev_qos_group_add_bdev(stack: Stack, params: Member) -> bool:
    """Let a bdev share a group's limits."""
    await stack.bdevs.measures.add_to_group(params.name, params.bdev_name)
    return True


@method("qpair_bdev_qos_group_remove_bdev", params=Member)
async def qpair_bdev_qos_group_remove_bdev(stack: Stack, params: Member) -> bool:
    """Take a bdev out of a group."""
    await stack.bdevs.measures.remove_from_group(params.name, params.bdev_name)
    return True


@method("qpair_bdev_qos_get_groups")
async def qpair_bdev_qos_get_groups(stack: Stack, params: None) -> list[dict[str, Any]]:
    """All groups: name, limits, bdevs."""
    every = ("rw_ios_per_sec", "rw_bytes_per_sec", "r_bytes_per_sec", "w_bytes_per_sec")
    return [
        {"name": group.name, **dict.fromkeys(every, 0), **_exact(group.limits), "bdevs": list(group.bdevs)}
        for group in stack.bdevs.measures.groups()
    ]


class SetTimeout(Params):
    """``timeout_in_sec``: 0 ends it."""

    name: str
    timeout_in_sec: U64


@method("qpair_bdev_set_timeout", params=SetTimeout)
async def qpair_bdev_set_timeout(stack: Stack, params: SetTimeout) -> bool:
    """Tell it as a failure of the bdev when an I/O takes longer."""
    await stack.bdevs.measures.set_timeout(params.name, params.timeout_in_sec)
    return True


class EnableHistogram(Params):
    """``opc``: only I/Os of that type. Times from ``min_nsec`` up to ``max_nsec`` are told apart."""

    name: str
    enable: bool
    opc: str | None = None
    granularity: U8 | None = None
    min_nsec: U64 | None = None
    max_nsec: U64 | None = None


@method("bdev_enable_histogram", params=EnableHistogram)
async def bdev_enable_histogram(stack: Stack, params: EnableHistogram) -> bool:
    """Begin a latency histogram of a bdev anew, or end it."""
    if params.opc is not None and params.opc not in IO_TYPES:
        raise InvalidParameters(f"parameter 'opc': {params.opc!r:.64}; one of {', '.join(IO_TYPES)}")
    await stack.bdevs.measures.enable_histogram(
        params.name,
        params.enable,
        io_type=params.opc,
        granularity=GRANULARITY if params.granularity is None else params.granularity,
        min_ns=MIN_NS if params.min_nsec is None else params.min_nsec,
        max_ns=MAX_NS if params.max_nsec is None else params.max_nsec,
    )
    return True


@method("bdev_get_histogram", params=Named)
async def bdev_get_histogram(stack: Stack, params: Named) -> dict[str, Any]:
    """The buckets as base64 of 64-bit little-endian counts; ticks are nanoseconds."""
    return (await stack.bdevs.measures.histogram(params.name)).to_rpc()


class HistogramBorders(Params):
    """``borders``: ascending, in microseconds."""

    name: str
    borders: list[U64]


@method("bdev_get_histogram_borders", params=HistogramBorders)
async def bdev_get_histogram_borders(stack: Stack, params: HistogramBorders) -> dict[str, list[int]]:
    """How many I/Os took no longer than each border, and how many there were."""
    if not 0 < len(params.borders) <= NAMES_MAX:
        raise InvalidParameters(f"parameter 'borders': {len(params.borders)} of them; 1 to {NAMES_MAX}")
    if sorted(params.borders) != params.borders:
        raise InvalidParameters("parameter 'borders': not ascending")
    histogram = await stack.bdevs.measures.histogram(params.name)
    return {"borders_count": histogram.cumulated([border * 1000 for border in params.borders])}


class SetSampling(Params):
    """``period`` in microseconds; 0 ends it."""

    name: str
    period: U64


@method("bdev_set_qd_sampling_period", params=SetSampling)
async def bdev_set_qd_sampling_period(stack: Stack, params: SetSampling) -> bool:
    """Look at a bdev's queue depth from time to time; bdev_get_iostat then tells it."""
    await stack.bdevs.measures.set_sampling(params.name, params.period)
    return True


class GetIostat(Params):
    """``per_channel``: of one bdev, each reactor's own. ``reset_mode``: what to reset after reading."""

    names: list[str] | None = None
    per_channel: bool | None = None
    reset_mode: ResetStatMode | None = None


@method("bdev_get_iostat", params=GetIostat)
async def bdev_get_iostat(stack: Stack, params: GetIostat) -> dict[str, Any]:
    """Counters and latency sums since creation or the last reset; ticks are nanoseconds."""
    measures, reset = stack.bdevs.measures, params.reset_mode or "none"
    if params.per_channel and len(params.names or ()) != 1:
        raise InvalidArgument("parameter 'per_channel': needs 'names' with one bdev")
    if params.names is None:
        raw = await measures.iostat(reset=reset)
    else:
        if len(params.names) > NAMES_MAX:
            raise InvalidParameters(f"parameter 'names': {len(params.names)} names are more than {NAMES_MAX}")
        found = [stack.bdevs.info(name).name for name in params.names]  # all of them exist before any is reset
        raw = [entry for name in found for entry in await measures.iostat(name, reset=reset)]
    now = {"tick_rate": TICKS_A_SECOND, "ticks": time.monotonic_ns()}
    if params.per_channel:
        return {**now, "name": raw[0]["name"], "channels": [_of_channel(stack, channel) for channel in raw[0]["channels"]]}
    return {**now, "bdevs": [{"name": entry["name"], **counters(entry), **_sampled(entry)} for entry in raw]}


class ResetIostat(Params):
    """Without ``name``: all bdevs."""

    name: str | None = None
    mode: ResetStatMode | None = None


@method("bdev_reset_iostat", params=ResetIostat)
async def bdev_reset_iostat(stack: Stack, params: ResetIostat) -> bool:
    """Set counters to zero."""
    name = None if params.name is None else stack.bdevs.info(params.name).name
    await stack.bdevs.measures.iostat(name, reset=params.mode or "all")
    return True


def _of_channel(stack: Stack, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The thread by its number and name in thread_get_stats."""
    lcore = raw["lcore"]
    return {"thread_id": stack.cores.index(lcore) + 1, "thread_name": f"reactor_{lcore}", **counters(raw)}


def _sampled(raw: Mapping[str, Any]) -> dict[str, int]:
    if raw["sampled"] is None:
        return {}
    return dict(zip(("queue_depth_polling_period", "queue_depth", "io_time", "weighted_io_time"), raw["sampled"], strict=True))


def counters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What an element of bdev_get_iostat's ``bdevs`` or ``channels`` counts."""
    shown: dict[str, Any] = {}
    for kind, done in (("read", "read"), ("write", "written"), ("unmap", "unmapped"), ("copy", "copied")):
        shown[f"bytes_{done}"] = raw[f"{kind}_bytes"]
        shown[f"num_{kind}_ops"] = raw[f"{kind}_ios"]
    for kind in ("read", "write", "unmap", "copy"):
        shown[f"{kind}_latency_ticks"] = raw[f"{kind}_ns"]
        shown[f"max_{kind}_latency_ticks"] = raw[f"max_{kind}_ns"]
        shown[f"min_{kind}_latency_ticks"] = raw[f"min_{kind}_ns"]
    shown["io_error"] = dict(raw["errors"])
    return shown
