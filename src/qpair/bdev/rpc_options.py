"""JSON-RPC method of the options of all bdevs.

``bdev_auto_examine`` has an effect here (`Examiner.auto`). The sizes of SPDK's pools are checked and saved and have none: an I/O here comes from its reactor's
slab, data from their owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from qpair.errors import InvalidParameters
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U32

if TYPE_CHECKING:
    from qpair.app.stack import Stack

# SPDK's, for what a caller leaves out.
DEFAULTS = {
    "bdev_io_pool_size": 65535,
    "bdev_io_cache_size": 256,
    "bdev_auto_examine": True,
    "iobuf_small_cache_size": 128,
    "iobuf_large_cache_size": 16,
}


class SetOptions(Params):
    """What is left out keeps its value."""

    bdev_io_pool_size: U32 | None = None
    bdev_io_cache_size: U32 | None = None
    bdev_auto_examine: bool | None = None
    iobuf_small_cache_size: U32 | None = None
    iobuf_large_cache_size: U32 | None = None


@method("bdev_set_options", params=SetOptions, startup=True, runtime=False)
async def bdev_set_options(stack: Stack, params: SetOptions) -> bool:
    """Options of the bdev layer, before the subsystems start."""
    given = {name: value for name, value in msgspec.structs.asdict(params).items() if value is not None}
    options = {**DEFAULTS, **stack.inert.last("bdev", "bdev_set_options"), **given}
    pool, cache = options["bdev_io_pool_size"], options["bdev_io_cache_size"]
    if pool < cache * (len(stack.cores) + 1):
        raise InvalidParameters(
            f"Pool size {pool} too small for cache size {cache}: parameter 'bdev_io_pool_size' must be at least {cache * (len(stack.cores) + 1)}"
        )
    stack.bdevs.examiner.auto = options["bdev_auto_examine"]
    stack.inert.remember("bdev", "bdev_set_options", (), options, effect="bdev_set_options (all of it but bdev_auto_examine)")
    return True
