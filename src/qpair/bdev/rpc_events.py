"""JSON-RPC methods about what happened: SPDK's notifications, from the ring of `qpair.bdev.events`.

Ours beside SPDK's: the types ``qpair_bdev_failed`` and ``qpair_bdev_throttled``, which have a member ``qpair`` with what else is known: ``reason``, or ``limit`` and ``value``.
``ctx`` is the bdev's name; names longer than SPDK's 127 bytes are not cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpair.bdev.events import TYPES, Event, Failed, Throttled
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U64

if TYPE_CHECKING:
    from qpair.app.stack import Stack


@method("notify_get_types")
async def notify_get_types(stack: Stack, params: None) -> list[str]:
    """What notifications there can be."""
    return [event.notification for event in TYPES]


class GetNotifications(Params):
    """``id``: the first to give, 0 or the oldest that is left; ``max``: how many at most."""

    id: U64 | None = None
    max: U64 | None = None


@method("notify_get_notifications", params=GetNotifications)
async def notify_get_notifications(stack: Stack, params: GetNotifications) -> list[dict[str, Any]]:
    """What happened since that id."""
    events = stack.bdevs.events.since(params.id or 0, params.max)
    return [_shown(event) for event in events]


def _shown(event: Event) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": event.notification, "ctx": event.bdev, "id": event.id}
    if isinstance(event, Failed):
        shown["qpair"] = {"reason": event.reason}
    elif isinstance(event, Throttled):
        shown["qpair"] = {"limit": event.limit, "value": event.value}
    return shown
