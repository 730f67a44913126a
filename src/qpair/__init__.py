"""qpair: a user-space storage stack for Python. Python decides, Rust moves.

    import asyncio, qpair

    async def main() -> None:
        async with qpair.Stack(cores="0") as stack:
            disk = await stack.malloc("disk0", "64MiB")
            await disk.write(0, b"hello".ljust(512))
            print((await disk.read(0, 512))[:5], (await stack.measure(disk, seconds=1)).iops)

    asyncio.run(main())

The names below are loaded when first used: ``import qpair`` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qpair.app.version import VERSION as __version__

if TYPE_CHECKING:
    from qpair.app.blocking import BlockingStack as BlockingStack
    from qpair.app.sizes import parse_size as parse_size
    from qpair.app.stack import Stack as Stack
    from qpair.bdev.client import BdevHandle as BdevHandle
    from qpair.bdev.client import OpenBdev as OpenBdev
    from qpair.bdev.filter import Filter as Filter
    from qpair.bdev.filter import FilterRequest as FilterRequest
    from qpair.bdev.model import BdevInfo as BdevInfo
    from qpair.bdev.perf import PerfResult as PerfResult
    from qpair.bdev.python import Bdev as Bdev
    from qpair.bdev.python import Request as Request
    from qpair.errors import QpairError as QpairError

_PUBLIC = {
    "Bdev": "qpair.bdev.python",
    "BdevHandle": "qpair.bdev.client",
    "BdevInfo": "qpair.bdev.model",
    "BlockingStack": "qpair.app.blocking",
    "Filter": "qpair.bdev.filter",
    "FilterRequest": "qpair.bdev.filter",
    "OpenBdev": "qpair.bdev.client",
    "PerfResult": "qpair.bdev.perf",
    "QpairError": "qpair.errors",
    "Request": "qpair.bdev.python",
    "Stack": "qpair.app.stack",
    "parse_size": "qpair.app.sizes",
}

__all__ = [
    "Bdev",
    "BdevHandle",
    "BdevInfo",
    "BlockingStack",
    "Filter",
    "FilterRequest",
    "OpenBdev",
    "PerfResult",
    "QpairError",
    "Request",
    "Stack",
    "__version__",
    "parse_size",
]


def __getattr__(name: str) -> Any:
    if (module := _PUBLIC.get(name)) is None:
        raise AttributeError(f"module 'qpair' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
