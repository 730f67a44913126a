"""Trace points: which are on, what they told, and how long I/Os took at each bdev.

How it works: the engine keeps a ring of records on each reactor; an I/O leaves one at each point of every bdev that it comes through, under one name. A reader has a
cursor, one number a reactor, and takes nothing away from other readers; what was overwritten before it was read is counted. `TraceRecord` is what `decode` makes of the
engine's bytes, and what ``qpair_trace_get`` answers as JSON. `Summary` pairs starts with ends.

Who wants points on: ``trace_*`` methods and ``qpair serve -e`` by one mask, each `Trace` by its own; on is what anybody wants.

Times are the reactor's clock, read once a turn: what begins and ends within a turn takes no time.

Errors: `InvalidArgument` for a group or a point that is not there.

Limits: 65,536 records a reactor; `PAGE_MAX` at once.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import msgspec

from qpair.errors import InvalidArgument, StackStopped, from_engine

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = [
    "GROUPS",
    "LAYER_POINTS",
    "POINTS",
    "LayerTimes",
    "Summary",
    "Trace",
    "TracePage",
    "TraceRecord",
    "Tracing",
    "decode",
    "parse_groups",
]

GROUPS = {"bdev": 3}
"""Names of groups of trace points, and their bits in SPDK's masks."""
SPDK_GROUPS = frozenset(
    [
        "iscsi_conn",
        "scsi",
        "nvmf_rdma",
        "nvmf_tcp",
        "ftl",
        "nvmf_fc",
        "dsa",
        "thread",
        "nvme_pcie",
        "iaa",
        "nvme_tcp",
        "bdev_nvme",
        "sock",
        "blob",
        "bdev_raid",
        "scheduler",
    ]
)
"""Those that SPDK has and we have not."""
POINTS = ("BDEV_IO_START", "BDEV_IO_DONE", "BDEV_IOCH_CREATE", "BDEV_IOCH_DESTROY", "QPAIR_BDEV_IO_WAIT", "QPAIR_BDEV_IO_ISSUE")
"""Points of the group ``bdev`` by their bit. The first four are SPDK's."""
START, DONE, _, _, WAIT, ISSUE = POINTS
SET, LOST = "QPAIR_TRACE_SET", "QPAIR_TRACE_LOST"
"""Not to be turned off: other points are on from here; records are missing here (``blocks``: how many)."""
SET_NUMBER = 63
ALL = (1 << len(POINTS)) - 1
LAYER_POINTS = 1 << POINTS.index(START) | 1 << POINTS.index(DONE) | 1 << POINTS.index(WAIT) | 1 << POINTS.index(ISSUE)
"""What `Summary` needs."""
WAITS = {1: "limit", 2: "room", 3: "range", 4: "pause"}
OPS = [
    "read",
    "write",
    "flush",
    "unmap",
    "write_zeroes",
    "reset",
    "compare",
    "compare_and_write",
    "copy",
    "zcopy_start",
    "zcopy_end",
    "zone_append",
    "zone_management",
    "seek_data",
    "seek_hole",
    "nvme_io",
    "nvme_admin",
    "verify",
    "write_uncorrectable",
]
"""By the engine's numbers."""
MASK_MAX = NO_IO = 2**64 - 1
PAGE_MAX = 4096
STATUS_CODE = 0x7FF

_RECORD = struct.Struct("<5QIHBB")
_HEXADECIMAL = re.compile(r"(0[xX])?[0-9a-fA-F]+")


class TraceRecord(msgspec.Struct, frozen=True):
    """One moment of one I/O (or of a channel: ``io`` is None then)."""

    reactor: int
    """The core."""
    time_ns: int
    point: str
    """One of `POINTS`, or `SET` or `LOST`."""
    bdev: str
    io: int | None = None
    """Its name on this reactor: the same at every bdev that it comes through. I/Os that a bdev has in reserve use theirs again."""
    parent: int | None = None
    """At a start: the I/O that this one does a part of."""
    op: str | None = None
    lba: int = 0
    """As this bdev counts."""
    blocks: int = 0
    status: int = 0
    """At an end: NVMe's status, 0 is success."""
    waits_for: str | None = None
    """At a wait: "limit", "room" with the device, the end of a lock on a "range", or of a "pause" (reset, resize)."""


class TracePage(msgspec.Struct, frozen=True):
    """What was read at once. ``cursor``: where to go on; ``lost``: records overwritten before they were read."""

    records: list[TraceRecord]
    cursor: list[int]
    lost: int


def decode(data: bytes, reactor: int, names: Mapping[int, str]) -> list[TraceRecord]:
    """The engine's records, 48 bytes each. ``names``: of bdevs by the number that records have; one that is forgotten is called by it. `ValueError` for half a record."""
    if len(data) % _RECORD.size:
        raise ValueError(f"{len(data)} bytes of trace records: {_RECORD.size} each")
    found = []
    for time_ns, io, parent, lba, blocks, device, detail, op, number in _RECORD.iter_unpack(data):
        point = POINTS[number] if number < len(POINTS) else SET if number == SET_NUMBER else f"{number}"
        found.append(
            TraceRecord(
                reactor=reactor,
                time_ns=time_ns,
                point=point,
                bdev=names.get(device, f"#{device}" if device else ""),
                io=None if io == NO_IO else io,
                parent=None if parent == NO_IO else parent,
                op=OPS[op] if op < len(OPS) else None,
                lba=lba,
                blocks=blocks,
                status=detail if point == DONE else 0,
                waits_for=WAITS.get(detail) if point == WAIT else None,
            )
        )
    return found


def parse_groups(text: str) -> tuple[int, list[str]]:
    """What ``-e`` says, in SPDK's syntax: ``bdev``, ``all``, ``0x8``, ``bdev:0x3``, ``0x8:BDEV_IO_START+BDEV_IO_DONE``, several with commas. The mask of the group
    ``bdev``, and what has no effect here. `InvalidArgument` for a group or a point that nobody has."""
    mask, idle = 0, []
    for item in text.split(","):
        name, colon, points = item.partition(":")
        if (groups := _number(name)) is None:
            if name in SPDK_GROUPS:
                idle.append(item)
                continue
            groups = _mask_of(name)
        if colon and groups.bit_count() != 1:
            raise InvalidArgument(f"-e {text}: {name!r} names several groups, and trace points of one alone can be chosen")
        chosen = MASK_MAX if not colon else _points(points)
        if groups >> GROUPS["bdev"] & 1:
            mask |= chosen
        elif groups:
            idle.append(item)
    return mask, idle


def _number(text: str) -> int | None:
    number = int(text, 16) if _HEXADECIMAL.fullmatch(text) else MASK_MAX + 1
    return number if number <= MASK_MAX else 0 if not text else None


def _points(text: str) -> int:
    if (number := _number(text)) is not None:
        return number
    mask = 0
    for name in text.split("+"):
        if name.upper() not in POINTS:
            raise InvalidArgument(f"no trace point is named {name!r:.80}; there are: {', '.join(POINTS)}")
        mask |= 1 << POINTS.index(name.upper())
    return mask


def _mask_of(name: str) -> int:
    """The groups that a name means."""
    if name == "all":
        return sum(1 << bit for bit in GROUPS.values())
    if name not in GROUPS:
        raise InvalidArgument(f"no trace group is named {name!r:.80}; there are: {', '.join([*GROUPS, 'all'])}")
    return 1 << GROUPS[name]


def checked_group(name: str) -> None:
    """`InvalidArgument` unless it is a group, or ``all``."""
    _mask_of(name)


class Tracing:
    """``stack.tracing``: points on and off, and reading."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._mask = 0
        self._held: list[int] = []
        self._floor: list[int] = []

    @property
    def mask(self) -> int:
        """The points that are on, SPDK's 64 bits of the group ``bdev``."""
        mask = self._mask
        for held in self._held:
            mask |= held
        return mask

    async def set(self, mask: int) -> None:
        """Turn points on, beside those that are. Done when all reactors do so."""
        self._mask |= mask
        await self._apply()

    async def clear(self, mask: int) -> None:
        """Turn points off, but not those that a `Trace` wants."""
        self._mask &= ~mask
        await self._apply()

    async def hold(self, mask: int) -> None:
        """As `set`, until `release` of the same."""
        self._held.append(mask)
        await self._apply()

    async def release(self, mask: int) -> None:
        """End a `hold`."""
        self._held.remove(mask)
        await self._apply()

    async def newest(self) -> list[int]:
        """The cursor of what is still to come."""
        pages = await self._call("trace_read", [MASK_MAX] * len(self._stack.cores), 0)
        return [page["next"] for page in pages]

    async def forget(self) -> None:
        """Show nothing of what was recorded so far (``trace_clear``)."""
        self._floor = await self.newest()

    async def read(self, cursor: Sequence[int] | None = None, max_records: int = PAGE_MAX) -> TracePage:
        """Up to so many records in all, oldest first for each reactor; from ``cursor`` on, or from the oldest there is."""
        reactors = len(self._stack.cores)
        floor = self._floor or [0] * reactors
        start = [max(pair) for pair in zip(cursor or floor, floor, strict=True)]
        records: list[TraceRecord] = []
        pages = await self._call("trace_read", start, min(PAGE_MAX, max(1, max_records // reactors)))
        for page in pages:
            found = decode(page["records"], page["lcore"], page["names"])
            if page["lost"]:
                time_ns = found[0].time_ns if found else 0
                records.append(TraceRecord(page["lcore"], time_ns, LOST, "", blocks=page["lost"]))
            records += found
        return TracePage(records, [page["next"] for page in pages], sum(page["lost"] for page in pages))

    async def _apply(self) -> None:
        await self._call("trace_set", self.mask & ALL)

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            token = getattr(self._stack.engine, method)(*args)
        except OSError as error:
            raise from_engine(error) from error
        return await self._stack.bridge.call(token)


class Trace:
    """``async with stack.trace() as trace:`` points are on within, and ``trace.records`` is what they told. On leaving, the rest is read."""

    def __init__(self, tracing: Tracing, points: Iterable[str] | None = None, bdevs: Iterable[str] | None = None) -> None:
        self._tracing = tracing
        self._points = LAYER_POINTS if points is None else _points("+".join(points))
        self._bdevs = None if bdevs is None else frozenset(bdevs)
        self._cursor: list[int] = []
        self.records: list[TraceRecord] = []
        """All that was read so far."""
        self.lost = 0
        """Records that were overwritten before they were read: read more often."""

    async def __aenter__(self) -> Self:
        self._cursor = await self._tracing.newest()
        await self._tracing.hold(self._points)
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(StackStopped):
            await self._tracing.release(self._points)
            await self.read()

    async def read(self) -> list[TraceRecord]:
        """What came since the last time, up to now; it is in ``records``, too."""
        end, found = await self._tracing.newest(), list[TraceRecord]()
        while any(at < last for at, last in zip(self._cursor, end, strict=True)):
            page = await self._tracing.read(self._cursor)
            self._cursor = page.cursor
            self.lost += page.lost
            found += [record for record in page.records if self._bdevs is None or record.bdev in self._bdevs or not record.bdev]
        self.records += found
        return found

    def summary(self) -> list[LayerTimes]:
        """How long the I/Os of ``records`` took at each bdev."""
        summary = Summary()
        summary.add(self.records)
        return summary.layers()


class LayerTimes(msgspec.Struct, frozen=True):
    """I/Os of one kind at one bdev, in nanoseconds: all of their time there, that without the bdevs below, and that before they were handed to the module."""

    bdev: str
    op: str
    ios: int
    errors: int
    mean_ns: float
    p50_ns: int
    p99_ns: int
    own_ns: float
    wait_ns: float


class _Span:
    """An I/O at a bdev."""

    __slots__ = ("bdev", "below_from", "below_to", "issued_ns", "of_parent", "op", "start_ns")

    def __init__(self, record: TraceRecord, of_parent: _Span | None) -> None:
        self.bdev, self.op, self.start_ns = record.bdev, record.op or "", record.time_ns
        self.of_parent = of_parent
        self.issued_ns = self.start_ns
        self.below_from = self.below_to = -1

    def covers(self, start_ns: int, end_ns: int) -> None:
        """The bdevs below had it then. Several at once (raid) count from the first start to the last end."""
        if start_ns < 0:
            return
        self.below_from = start_ns if self.below_from < 0 else min(self.below_from, start_ns)
        self.below_to = max(self.below_to, end_ns)


class _Kept:
    """What is known of one kind of I/O at one bdev."""

    __slots__ = ("errors", "own_ns", "times", "wait_ns")

    def __init__(self) -> None:
        self.times: list[int] = []
        self.errors = self.own_ns = self.wait_ns = 0


class Summary:
    """Times by bdev and operation. Only I/Os whose start and end were both seen count."""

    def __init__(self) -> None:
        # of each I/O the bdevs that it is at, from the top down
        self._open: dict[tuple[int, int], list[_Span]] = {}
        self._kept: dict[tuple[str, str], _Kept] = {}

    def add(self, records: Iterable[TraceRecord]) -> None:
        """More of what was read; of each reactor in order."""
        for record in records:
            if record.point in (SET, LOST):
                self._open = {key: spans for key, spans in self._open.items() if key[0] != record.reactor}
            elif record.io is None:
                continue
            elif record.point == START:
                self._start(record, record.io)
            elif spans := self._open.get((record.reactor, record.io)):
                if record.point == ISSUE and spans[-1].bdev == record.bdev:
                    spans[-1].issued_ns = record.time_ns
                elif record.point == DONE and spans[-1].bdev == record.bdev:
                    self._end(record, spans)

    def _start(self, record: TraceRecord, io: int) -> None:
        parent = None
        if record.parent is not None:
            if not (above := self._open.get((record.reactor, record.parent))):
                return
            parent = above[-1]
        spans = self._open.setdefault((record.reactor, io), [])
        spans.append(_Span(record, spans[-1] if spans else parent))

    def _end(self, record: TraceRecord, spans: list[_Span]) -> None:
        span = spans.pop()
        if not spans and record.io is not None:
            del self._open[(record.reactor, record.io)]
        above = span.of_parent
        if above is not None and above.bdev == span.bdev:
            # a part of one that its bdev does in parts
            above.covers(span.below_from, span.below_to)
            return
        total = record.time_ns - span.start_ns
        if above is not None:
            above.covers(span.start_ns, record.time_ns)
        kept = self._kept.setdefault((span.bdev, span.op), _Kept())
        kept.times.append(total)
        kept.errors += record.status & STATUS_CODE != 0
        kept.own_ns += total - (span.below_to - span.below_from)
        kept.wait_ns += span.issued_ns - span.start_ns

    def layers(self) -> list[LayerTimes]:
        """By bdev and operation."""
        shown = []
        for (bdev, op), kept in sorted(self._kept.items()):
            times, count = sorted(kept.times), len(kept.times)
            shown.append(
                LayerTimes(
                    bdev=bdev,
                    op=op,
                    ios=count,
                    errors=kept.errors,
                    mean_ns=sum(times) / count,
                    p50_ns=times[(count - 1) // 2],
                    p99_ns=times[max(0, -(-count * 99 // 100) - 1)],
                    own_ns=kept.own_ns / count,
                    wait_ns=kept.wait_ns / count,
                )
            )
        return shown
