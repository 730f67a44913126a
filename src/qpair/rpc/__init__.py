"""JSON-RPC 2.0: the declared methods and the server that answers them.

A room declares its methods in its own ``rpc.py``:

    class BdevMallocCreate(Params):
        num_blocks: int
        block_size: int
        name: str | None = None

    @method("bdev_malloc_create", params=BdevMallocCreate)
    async def bdev_malloc_create(stack: Stack, params: BdevMallocCreate) -> str: ...

Names, types, defaults and required parameters are SPDK's (its public schema). What SPDK has not is named ``qpair_...``.
A method without parameters is called with ``None``. The result is anything msgspec encodes; an error is a `qpair.errors.QpairError`.
"""

from qpair.rpc.registry import REGISTRY, Method, Params, Registry, method

__all__ = ["REGISTRY", "Method", "Params", "Registry", "method"]
