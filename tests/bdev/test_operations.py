"""Compare, compare-and-write and copy from Python: on a device that knows them, and on one for which the layer does them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qpair.errors import InvalidArgument, QpairError

PATTERN = bytes(range(256)) * 16


@pytest.fixture(params=["malloc", "file"])
async def disk(stack: Any, engine_kind: str, request: Any, tmp_path: Any) -> Any:
    if engine_kind != "real":
        pytest.skip("operations are the engine's")
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
