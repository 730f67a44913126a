"""JSON-RPC methods of trace points: SPDK's, and ours to read what they told, for the layout of SPDK's shared memory is not ours.

Errors: -32602 for a group that is not there, as SPDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from qpair.app.rpc import TICKS_A_SECOND
from qpair.bdev.trace import GROUPS, MASK_MAX, PAGE_MAX, POINTS, checked_group
from qpair.errors import InvalidArgument, InvalidParameters
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U32, U64, U64_MAX

if TYPE_CHECKING:
    from qpair.app.stack import Stack


class Group(Params):
    """A group of trace points, or ``all``."""

    name: str


class GroupMask(Params):
    """Trace points of a group, by their bits."""

    name: str
    tpoint_mask: U64


def _check(name: str) -> None:
    try:
        checked_group(name)
    except InvalidArgument as error:
        raise InvalidParameters(f"parameter 'name': {error}") from None


@method("trace_enable_tpoint_group", params=Group, startup=True)
async def trace_enable_tpoint_group(stack: Stack, params: Group) -> bool:
    """Turn all trace points of a group on."""
    _check(params.name)
    await stack.tracing.set(MASK_MAX)
    return True


@method("trace_disable_tpoint_group", params=Group, startup=True)
async def trace_disable_tpoint_group(stack: Stack, params: Group) -> bool:
    """Turn all trace points of a group off."""
    _check(params.name)
    await stack.tracing.clear(MASK_MAX)
    return True


@method("trace_set_tpoint_mask", params=GroupMask, startup=True)
async def trace_set_tpoint_mask(stack: Stack, params: GroupMask) -> bool:
    """Turn trace points of a group on, beside those that are."""
    _check(params.name)
    await stack.tracing.set(params.tpoint_mask)
    return True


@method("trace_clear_tpoint_mask", params=GroupMask, startup=True)
async def trace_clear_tpoint_mask(stack: Stack, params: GroupMask) -> bool:
    """Turn trace points of a group off."""
    _check(params.name)
    await stack.tracing.clear(params.tpoint_mask)
    return True


def _masks(stack: Stack) -> dict[str, str]:
    """The one group that there is."""
    return {"mask": f"{1 << GROUPS['bdev']:#x}", "tpoint_mask": f"{stack.tracing.mask:#x}"}


def _group_mask(stack: Stack) -> str:
    return f"{bool(stack.tracing.mask) << GROUPS['bdev']:#x}"


@method("trace_get_tpoint_group_mask", startup=True)
async def trace_get_tpoint_group_mask(stack: Stack, params: None) -> dict[str, Any]:
    """Which trace points there are, and which are on."""
    on = stack.tracing.mask
    points = [{"name": name, "tpoint_id": number, "enabled": bool(on >> number & 1)} for number, name in enumerate(POINTS)]
    return {"tpoint_group_mask": _group_mask(stack), "bdev": {"enabled": on != 0, **_masks(stack), "tpoints": points}}


@method("trace_get_info", startup=True)
async def trace_get_info(stack: Stack, params: None) -> dict[str, Any]:
    """Which groups there are, and which trace points of them are on. There is no shared memory: ``tpoint_shm_path`` is empty."""
    return {"tpoint_shm_path": "", "tpoint_group_mask": _group_mask(stack), "bdev": _masks(stack)}


@method("trace_clear")
async def trace_clear(stack: Stack, params: None) -> bool:
    """Show nothing of what was recorded so far. Points stay on."""
    await stack.tracing.forget()
    return True


class TraceGet(Params):
    """``cursor``: that of the answer before; without, the oldest records there are. ``newest``: no records, but the cursor of those to come. ``max_records``: in all."""

    cursor: list[U64] | None = None
    max_records: U32 | None = None
    newest: bool | None = None


@method("qpair_trace_get", params=TraceGet)
async def qpair_trace_get(stack: Stack, params: TraceGet) -> dict[str, Any]:
    """What trace points told: a page of records, oldest first for each reactor."""
    most = PAGE_MAX if params.max_records is None else params.max_records
    if not 1 <= most <= PAGE_MAX:
        raise InvalidParameters(f"parameter 'max_records': {most}; 1 to {PAGE_MAX}")
    if params.cursor is not None:
        if len(params.cursor) != len(stack.cores):
            raise InvalidParameters(f"parameter 'cursor': {len(params.cursor)} numbers; one for each of {len(stack.cores)} reactors")
        if max(params.cursor) > U64_MAX:
            raise InvalidParameters(f"parameter 'cursor': a number is past {U64_MAX}")
    if params.newest:
        return {"tick_rate": TICKS_A_SECOND, "cursor": await stack.tracing.newest(), "lost": 0, "records": []}
    page = await stack.tracing.read(params.cursor, most)
    answer: dict[str, Any] = {"tick_rate": TICKS_A_SECOND, **msgspec.to_builtins(page)}
    return answer
