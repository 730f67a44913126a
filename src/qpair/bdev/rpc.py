"""JSON-RPC methods of block devices, as SPDK's public schema declares them.

Not implemented, and refused by name when asked for: metadata within the blocks and protection information (``md_interleave``, ``dif_type``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpair.bdev.model import HINTS
from qpair.errors import InvalidArgument, InvalidParameters, NoSuchDevice
from qpair.rpc.registry import Params, method
from qpair.rpc.types import I32, U32, U64, Uuid

if TYPE_CHECKING:
    from qpair.app.stack import Stack

NAMES_MAX = 1024
TIMEOUT_MS_MAX = 86_400_000


class GetBdevs(Params):
    """``timeout`` in ms: wait so long for ``name`` to appear."""

    name: str | None = None
    timeout: U64 | None = None


@method("bdev_get_bdevs", params=GetBdevs)
async def bdev_get_bdevs(stack: Stack, params: GetBdevs) -> list[dict[str, Any]]:
    """All bdevs, or one."""
    if params.name is None:
        infos = stack.bdevs.infos()
    elif params.timeout:
        if params.timeout > TIMEOUT_MS_MAX:
            raise InvalidParameters(f"parameter 'timeout': {params.timeout} ms is past {TIMEOUT_MS_MAX}")
        infos = [await stack.bdevs.wait_for(params.name, params.timeout)]
    else:
        infos = [stack.bdevs.info(params.name)]
    shown = []
    for info in infos:
        try:
            shown.append(stack.bdevs.describe(info))
        except NoSuchDevice:
            if params.name is not None:
                raise
            # It, or what it stands on, went while the others were shown.
    return shown


class Named(Params):
    """One bdev by name."""

    name: str


@method("bdev_examine", params=Named)
async def bdev_examine(stack: Stack, params: Named) -> bool:
    """Look at the content of a bdev; only where that is not done by itself."""
    await stack.bdevs.examiner.examine(params.name)
    return True


@method("bdev_wait_for_examine")
async def bdev_wait_for_examine(stack: Stack, params: None) -> bool:
    """Answer when every bdev has been examined."""
    await stack.bdevs.examiner.idle()
    return True


class MallocCreate(Params):
    """``num_blocks`` of ``block_size`` bytes."""

    block_size: U32
    num_blocks: U64
    name: str | None = None
    uuid: Uuid | None = None
    optimal_io_boundary: U32 | None = None
    md_size: U32 | None = None
    md_interleave: bool | None = None
    dif_type: I32 | None = None
    dif_is_head_of_md: bool | None = None
    physical_block_size: U32 | None = None
    dif_pi_format: U32 | None = None
    numa_id: I32 | None = None


@method("bdev_malloc_create", params=MallocCreate)
async def bdev_malloc_create(stack: Stack, params: MallocCreate) -> str:
    """A bdev in memory; the answer is its name."""
    _no_protection(params.dif_type, params.md_interleave)
    handle = await stack.bdevs.create_malloc(
        params.name,
        num_blocks=params.num_blocks,
        block_size=params.block_size,
        metadata_bytes=params.md_size or 0,
        uuid=params.uuid,
        physical_block_size=params.physical_block_size or 0,
        optimal_io_boundary=params.optimal_io_boundary or 0,
    )
    return handle.name


class NullCreate(Params):
    """``num_blocks`` of ``block_size`` bytes. The preferred_* and optimal_* hints are shown by bdev_get_bdevs."""

    name: str
    block_size: U32
    num_blocks: U64
    uuid: Uuid | None = None
    physical_block_size: U32 | None = None
    md_size: U32 | None = None
    dif_type: I32 | None = None
    dif_pi_format: U32 | None = None
    dif_is_head_of_md: bool | None = None
    preferred_write_granularity: U32 | None = None
    preferred_write_alignment: U32 | None = None
    optimal_write_size: U32 | None = None
    preferred_unmap_granularity: U32 | None = None
    preferred_unmap_alignment: U32 | None = None


@method("bdev_null_create", params=NullCreate)
async def bdev_null_create(stack: Stack, params: NullCreate) -> str:
    """A bdev that keeps nothing; the answer is its name."""
    _no_protection(params.dif_type)
    handle = await stack.bdevs.create_null(
        params.name,
        num_blocks=params.num_blocks,
        block_size=params.block_size,
        metadata_bytes=params.md_size or 0,
        uuid=params.uuid,
        physical_block_size=params.physical_block_size or 0,
        hints={name: value for name in HINTS if (value := getattr(params, name))},
    )
    return handle.name


class NullResize(Params):
    """``new_size`` in MiB."""

    name: str
    new_size: U64


@method("bdev_null_resize", params=NullResize)
async def bdev_null_resize(stack: Stack, params: NullResize) -> bool:
    """Change its size. Unlike SPDK's, it may shrink."""
    await stack.bdevs.resize(params.name, params.new_size << 20, module="null")
    return True


class AioCreate(Params):
    """``block_size`` 0 or absent: the file's own."""

    name: str
    filename: str
    block_size: U32 | None = None
    readonly: bool | None = None
    fallocate: bool | None = None
    uuid: Uuid | None = None
    nowait: bool | None = None


@method("bdev_aio_create", params=AioCreate)
async def bdev_aio_create(stack: Stack, params: AioCreate) -> str:
    """A bdev on a file or block device; the answer is its name."""
    handle = await stack.bdevs.create_file(
        params.name,
        params.filename,
        module="aio",
        block_size=params.block_size or 0,
        readonly=bool(params.readonly),
        fallocate=bool(params.fallocate),
        nowait=bool(params.nowait),
        uuid=params.uuid,
    )
    return handle.name


class UringCreate(Params):
    """``block_size`` 0 or absent: the file's own."""

    filename: str
    name: str
    block_size: U32 | None = None
    uuid: Uuid | None = None


@method("bdev_uring_create", params=UringCreate)
async def bdev_uring_create(stack: Stack, params: UringCreate) -> str:
    """A bdev on a file or block device; the answer is its name."""
    handle = await stack.bdevs.create_file(params.name, params.filename, block_size=params.block_size or 0, uuid=params.uuid)
    return handle.name


@method("bdev_malloc_delete", params=Named)
async def bdev_malloc_delete(stack: Stack, params: Named) -> bool:
    """Remove a malloc bdev; its contents are gone."""
    await stack.bdevs.delete(params.name, module="malloc")
    return True


@method("bdev_null_delete", params=Named)
async def bdev_null_delete(stack: Stack, params: Named) -> bool:
    """Remove a null bdev."""
    await stack.bdevs.delete(params.name, module="null")
    return True


@method("bdev_aio_delete", params=Named)
async def bdev_aio_delete(stack: Stack, params: Named) -> bool:
    """Remove an aio bdev; its file stays."""
    await stack.bdevs.delete(params.name, module="aio")
    return True


@method("bdev_uring_delete", params=Named)
async def bdev_uring_delete(stack: Stack, params: Named) -> bool:
    """Remove a uring bdev; its file stays."""
    await stack.bdevs.delete(params.name, module="uring")
    return True


@method("bdev_aio_rescan", params=Named)
async def bdev_aio_rescan(stack: Stack, params: Named) -> bool:
    """Take the file's present size."""
    await stack.bdevs.rescan(params.name, module="aio")
    return True


@method("bdev_uring_rescan", params=Named)
async def bdev_uring_rescan(stack: Stack, params: Named) -> bool:
    """Take the file's present size."""
    await stack.bdevs.rescan(params.name, module="uring")
    return True


def _no_protection(dif_type: int | None, md_interleave: bool | None = None) -> None:
    refused = []
    if md_interleave:
        refused.append("parameter 'md_interleave': true; metadata within the blocks is not supported, only apart from them")
    if dif_type:
        refused.append(f"parameter 'dif_type': {dif_type}; protection information is not supported, the limit is 0")
    if refused:
        raise InvalidArgument("; ".join(refused))
