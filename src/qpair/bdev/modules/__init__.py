"""Kinds of bdevs that stand on others, one file each: its JSON-RPC methods, and how it shows itself and is saved.

To add a kind: a file here with ``make(room) -> BdevModule`` and its ``@method`` functions, and a line in the table. `passthru` is the one to read first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qpair.bdev.control import BdevSubsystem
    from qpair.bdev.model import BdevModule

__all__ = ["MODULES", "load_rpc", "make_modules"]

MODULES: tuple[str, ...] = (
    "python",
    "filter",
    "passthru",
    "split",
    "delay",
    "error",
    "zone_block",
    "raid",
    "gpt",
)


def make_modules(room: BdevSubsystem) -> list[BdevModule]:
    """Fresh modules of one stack, in the order in which they look at a bdev that appears."""
    return [import_module(f"{__name__}.{name}").make(room) for name in MODULES]


def load_rpc() -> None:
    """Import the declared methods of every kind."""
    for name in MODULES:
        import_module(f"{__name__}.{name}")
