"""Compare, compare-and-write and copy from Python: on a device that knows them, and on one for which the layer does them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qpair.errors import InvalidArgument, QpairError

PATTERN = bytes(range(256)) * 16


@pytest.fixture(params=["malloc", "file"])
async def disk(stack: Any, request: Any, tmp_path: Any) -> Any:
    if request.param == "malloc":
        return await stack.malloc("disk", "1MiB")
    return await stack.file("disk", tmp_path / "disk.img", size="1MiB", block_size=512)


async def test_compare_says_whether(disk: Any) -> None:
    async with await disk.open() as opened:
        await opened.write(4096, PATTERN)
        assert await opened.compare(4096, PATTERN)
        for at in (0, 511, 4095):
            other = bytearray(PATTERN)
            other[at] ^= 1
            assert not await opened.compare(4096, other)


async def test_compare_and_write_writes_only_over_what_was_expected(disk: Any) -> None:
    async with await disk.open() as opened:
        await opened.write(0, PATTERN)
        assert not await opened.compare_and_write(0, bytes(4096), b"n" * 4096)
        assert await opened.read(0, 4096) == PATTERN
        assert await opened.compare_and_write(0, PATTERN, b"y" * 4096)
        assert await opened.read(0, 4608) == b"y" * 4096 + bytes(512)
        with pytest.raises(InvalidArgument, match="data has 512 bytes, expected 1024"):
            await opened.compare_and_write(0, bytes(1024), bytes(512))


async def test_many_who_count_by_compare_and_write_lose_nothing(disk: Any) -> None:
    async def count(opened: Any) -> None:
        for _ in range(10):
            done = False
            while not done:
                now = await opened.read(512, 512)
                then = (int.from_bytes(now[:8], "little") + 1).to_bytes(8, "little") + bytes(504)
                done = await opened.compare_and_write(512, now, then)

    async with await disk.open() as one, await disk.open() as two:
        await asyncio.gather(*(count(opened) for opened in (one, two, one, two)))
        assert int.from_bytes((await one.read(512, 512))[:8], "little") == 40


@pytest.mark.parametrize(("source", "target"), [(0, 65536), (65536, 0), (0, 512), (512, 0), (0, 0)])
async def test_a_copy_is_as_if_its_source_were_read_at_once(disk: Any, source: int, target: int) -> None:
    length = 300 * 1024  # several steps of the layer's
    data = b"".join(number.to_bytes(4, "little") * 128 for number in range(length // 512))
    async with await disk.open() as opened:
        await opened.write(source, data)
        await opened.copy(source, target, length)
        assert await opened.read(target, length) == data
        with pytest.raises(InvalidArgument, match="has 2048 blocks"):
            await opened.copy(1 << 19, 0, 1 << 20)


async def test_a_reader_may_compare_but_not_copy(disk: Any) -> None:
    async with await disk.open(write=False) as opened:
        assert await opened.compare(0, bytes(512))
        with pytest.raises(QpairError, match="open for reading only"):
            await opened.copy(0, 512, 512)
        with pytest.raises(QpairError, match="open for reading only"):
            await opened.compare_and_write(0, bytes(512), bytes(512))


@pytest.fixture
async def with_metadata(stack: Any) -> Any:
    await stack.rpc("bdev_malloc_create", name="m0", num_blocks=2048, block_size=512, md_size=8)
    await stack.rpc("bdev_passthru_create", name="p0", base_bdev_name="m0")
    return stack.bdevs.handle("p0")


async def test_metadata_go_with_their_blocks_through_every_layer(stack: Any, with_metadata: Any) -> None:
    tags = b"".join(number.to_bytes(8, "big") for number in range(8))
    async with await with_metadata.open() as disk:
        await disk.write_with_metadata(4096, PATTERN, tags)
        assert await disk.read_with_metadata(4096, 4096) == (PATTERN, tags)
        assert await disk.read_with_metadata(4608, 512) == (PATTERN[512:1024], tags[8:16])
        await disk.write(4096, bytes(512))  # data alone: the metadata stay
        assert (await disk.read_with_metadata(4096, 512)) == (bytes(512), tags[:8])
        await disk.copy(4096, 0, 2048)
        assert (await disk.read_with_metadata(0, 2048))[1] == tags[:32]
        await disk.write_zeroes(4608, 512)
        assert (await disk.read_with_metadata(4096, 2048))[1] == tags[:8] + bytes(8) + tags[16:32]
        with pytest.raises(InvalidArgument, match="metadata of 7 bytes: 8 bytes"):
            await disk.write_with_metadata(0, bytes(512), bytes(7))
    (shown,) = await stack.rpc("bdev_get_bdevs", name="p0")
    assert (shown["md_size"], shown["md_interleave"], shown["dif_type"]) == (8, False, 0)


async def test_metadata_that_a_bdev_has_not_are_refused(disk: Any) -> None:
    async with await disk.open() as opened:
        with pytest.raises(InvalidArgument, match="metadata given: bdev disk has none"):
            await opened.read_with_metadata(0, 512)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"md_size": 7}, "md_size 7: 0, 8, 16, 32, 64 or 128"),
        ({"md_size": 8, "md_interleave": True}, "'md_interleave': true"),
        ({"md_size": 8, "dif_type": 1}, "'dif_type': 1"),
    ],
)
async def test_kinds_of_metadata_that_are_not_there_are_refused_by_name(stack: Any, params: Any, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        await stack.rpc("bdev_malloc_create", num_blocks=8, block_size=512, **params)
