"""One consistent configuration for clients that gather it in several requests.

``spdk-rpc save_config`` asks framework_get_subsystems and then framework_get_config for one subsystem after the other. What others change in between
would be in one half of the file and not in the other: a controller on a bdev that is not there. So the first request also takes a snapshot of the whole
configuration for its connection, and what follows is answered from it, as long as it is the same sequence: framework_get_config and nothing else, in the
order of the subsystems, within `FRESH_S`. Every other caller reads what is now.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from qpair.rpc.dispatch import CALLER

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["begin", "resume"]

FRESH_S = 5.0


class _Saving(msgspec.Struct):
    """``left``: the subsystems that have not been asked for, in order; encoded, so that later changes do not reach them."""

    left: dict[str, msgspec.Raw]
    next_request: int
    until: float


def begin(stack: Stack) -> None:
    """The caller asked for the subsystems: it may be about to gather the configuration."""
    if (caller := CALLER.get(None)) is not None:
        left = {name: msgspec.Raw(msgspec.json.encode(stack.config(name))) for name in stack.subsystem_order()}
        caller.kept = _Saving(left, caller.requests + 1, time.monotonic() + FRESH_S)


def resume(name: str) -> Any:
    """The part of the caller's snapshot, or None when it is not gathering one."""
    caller = CALLER.get(None)
    saving = caller.kept if caller is not None else None
    if caller is None or not isinstance(saving, _Saving):
        return None
    names = list(saving.left)
    if caller.requests != saving.next_request or name not in saving.left or time.monotonic() > saving.until:
        caller.kept = None
        return None
    found = saving.left[name]
    saving.left = {later: saving.left[later] for later in names[names.index(name) + 1 :]}
    saving.next_request += 1
    return found
