"""What the two processes of a takeover say to each other.

The one that serves is the giver, the other the taker. They talk over a Unix socket that the taker made and named in ``qpair_takeover``, in parcels (`qpair.app.parcel`):

    giver                          taker
      ──── Offer ─────────────────►        reactors and subsystems started; nothing has changed yet
      ◄─── Prepared ───────────────
    at rest: no RPC, no ring runs, bdevs closed
      ──── Handover ──────────────►        bdevs, controllers and sessions made again; no ring runs
      ◄─── Ready ──────────────────
      ──── Go ────────────────────►        rings run; the giver ends

`Failed` instead of any of these, an end of the connection, or silence beyond a step's deadline, before Go: the giver makes everything again for itself and goes on. At any moment
at most one of the two has disks open and rings running: the taker does nothing with what it was given unless it was told Go, or the giver is dead.
"""

from __future__ import annotations

from typing import Any

import msgspec

from qpair.app.parcel import Descriptor
from qpair.app.passed import PassedRecord
from qpair.vhost.record import ControllerRecord

__all__ = ["PROTOCOLS", "Failed", "FromGiver", "FromTaker", "Go", "Handover", "Offer", "Prepared", "Ready"]

PROTOCOLS = (1,)
"""Versions of these messages that this program speaks."""


class Offer(msgspec.Struct, tag=True):
    """Who gives, and what the taker can prepare for."""

    protocol: int
    version: str
    pid: int
    cores: list[int]
    vhost_dir: str
    config: dict[str, Any]


class Prepared(msgspec.Struct, tag=True):
    """The taker has started what it can start."""


class Handover(msgspec.Struct, tag=True):
    """Everything. ``memory``: what malloc bdevs hold, by their names."""

    config: dict[str, Any]
    sockets: list[PassedRecord]
    controllers: list[ControllerRecord]
    memory: dict[str, Descriptor]


class Ready(msgspec.Struct, tag=True):
    """The taker has made all of it, and could go on."""


class Go(msgspec.Struct, tag=True):
    """It is the taker's now."""


class Failed(msgspec.Struct, tag=True):
    """There will be no takeover."""

    reason: str


FromGiver = Offer | Handover | Go | Failed
FromTaker = Prepared | Ready | Failed
