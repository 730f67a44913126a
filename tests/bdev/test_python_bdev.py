"""Bdevs written in Python: each request completed exactly once, whatever the user's method does."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from typing import Any

import pytest

from qpair import Bdev, Request
from qpair.errors import NoSpace, QpairError


@pytest.fixture(autouse=True)
def nobody_else_looks(request: pytest.FixtureRequest) -> None:
    """Modules that know bdevs by their content would read each that appears."""
    if "stack" in request.fixturenames:
        request.getfixturevalue("stack").bdevs.examiner.auto = False


class Ram(Bdev):
    def __init__(self, name: str = "ram", size: str = "1MiB", **options: Any) -> None:
        super().__init__(name, size, **options)
        self.store = bytearray(self.size_bytes)
        self.batches: list[int] = []

    def read(self, requests: Sequence[Request]) -> None:
        self.batches.append(len(requests))
        for request in requests:
            request.data[:] = self.store[request.offset : request.end]

    def write(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.store[request.offset : request.end] = request.data


async def test_what_is_written_is_read_back(stack: Any) -> None:
    ram = Ram()
    disk = await stack.add(ram)
    await disk.write(4096, b"p" * 1024)
    assert await disk.read(4096, 1024) == b"p" * 1024
    assert bytes(ram.store[4096:5120]) == b"p" * 1024
    assert disk.info.num_blocks == 2048


async def test_many_requests_at_once_come_in_batches(stack: Any) -> None:
    ram = Ram()
    await stack.add(ram)
    async with await stack.open("ram") as disk:
        answers = await asyncio.gather(*(disk.read(512 * number, 512) for number in range(100)))
    assert all(answer == bytes(512) for answer in answers)
    assert sum(ram.batches) == 100


async def test_an_async_method_is_awaited(stack: Any) -> None:
    class Slow(Ram):
        async def read(self, requests: Sequence[Request]) -> None:  # type: ignore[override]
            await asyncio.sleep(0.01)
            super().read(requests)

    await stack.add(Slow())
    async with await stack.open("ram") as disk:
        await disk.write(0, b"x" * 512)
        assert await asyncio.gather(disk.read(0, 512), disk.read(512, 512)) == [b"x" * 512, bytes(512)]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_method_that_raises_fails_only_what_it_had_not_completed(stack: Any, asynchronous: bool, caplog: Any) -> None:
    class Broken(Ram):
        def read(self, requests: Sequence[Request]) -> Any:
            requests[0].data[:] = b"a" * requests[0].length
            if requests[0].offset == 0:
                requests[0].complete()
            if asynchronous:
                return self.later()
            raise RuntimeError("a defect")

        async def later(self) -> None:
            raise RuntimeError("a defect")

    await stack.add(Broken())
    async with await stack.open("ram") as disk:
        assert await disk.read(0, 512) == b"a" * 512
        with pytest.raises(QpairError) as refused:
            await disk.read(512, 512)
        assert refused.value.errno == errno.EIO
    assert "bdev ram: read raised RuntimeError: a defect" in caplog.text


async def test_an_oserror_keeps_its_errno_and_fail_gives_one(stack: Any) -> None:
    class Full(Ram):
        def write(self, requests: Sequence[Request]) -> None:
            raise OSError(errno.ENOSPC, "full")

        def unmap(self, requests: Sequence[Request]) -> None:
            for request in requests:
                request.fail(errno.EPERM)

    await stack.add(Full())
    async with await stack.open("ram") as disk:
        with pytest.raises(NoSpace) as full:
            await disk.write(0, bytes(512))
        assert full.value.errno == errno.ENOSPC
        with pytest.raises(PermissionError):
            await disk.unmap(0, 512)


async def test_what_a_bdev_does_not_do_is_refused_and_flush_succeeds(stack: Any) -> None:
    class Nothing(Bdev):
        pass

    await stack.add(Nothing("nothing", "1MiB"))
    async with await stack.open("nothing") as disk:
        await disk.flush()
        with pytest.raises(QpairError) as refused:
            await disk.read(0, 512)
        assert refused.value.errno == errno.EOPNOTSUPP


async def test_a_buffer_is_invalid_after_completion_and_completing_twice_is_an_error(stack: Any) -> None:
    found: list[str] = []

    class Careless(Ram):
        def read(self, requests: Sequence[Request]) -> None:
            kept = requests[0].data
            requests[0].complete()
            try:
                kept[0] = 1
            except ValueError as error:
                found.append(str(error))
            try:
                requests[0].complete()
            except ValueError as error:
                found.append(str(error))

    await stack.add(Careless())
    async with await stack.open("ram") as disk:
        await disk.read(1024, 512)
    assert found == ["operation forbidden on released memoryview object", "read at 1024 was completed before"]


async def test_a_deleted_python_bdev_is_gone_and_its_name_free(stack: Any) -> None:
    await stack.add(Ram())
    await stack.delete("ram")
    assert stack.bdevs.infos() == []
    disk = await stack.add(Ram())
    assert await disk.read(0, 512) == bytes(512)


async def test_a_stack_stops_with_python_requests_under_way(make_stack: Any) -> None:
    class Never(Ram):
        async def read(self, requests: Sequence[Request]) -> None:  # type: ignore[override]
            await asyncio.sleep(3600)

    stack = make_stack(stop_deadline_ms=1000)
    await stack.start()
    await stack.add(Never())
    disk = await stack.open("ram")
    reading = asyncio.ensure_future(disk.read(0, 512))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(stack.stop(), 10)
    with pytest.raises(QpairError):
        await asyncio.wait_for(reading, 1)
