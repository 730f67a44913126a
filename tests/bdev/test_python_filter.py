"""Filters: what is shown goes through Python, once; what is not passes without it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from typing import Any

import pytest

from qpair import Bdev, Filter, FilterRequest, Request
from qpair.errors import Busy, InvalidArgument, QpairError


@pytest.fixture(autouse=True)
def nobody_else_looks(request: pytest.FixtureRequest) -> None:
    """Modules that know bdevs by their content would read each that appears."""
    if "stack" in request.fixturenames:
        request.getfixturevalue("stack").bdevs.examiner.auto = False


class Watch(Filter):
    """Tells what it was shown."""

    def __init__(self, name: str = "top", **options: Any) -> None:
        super().__init__(name, **options)
        self.seen: list[tuple[str, str, int, int, int]] = []

    def before(self, requests: Sequence[FilterRequest]) -> None:
        self.seen += [("before", request.op, request.offset, request.length, request.errno) for request in requests]

    def after(self, requests: Sequence[FilterRequest]) -> None:
        self.seen += [("after", request.op, request.offset, request.length, request.errno) for request in requests]


class Store(Bdev):
    """A base that knows a flush from nothing."""

    def __init__(self) -> None:
        super().__init__("disk0", "1MiB")
        self.store = bytearray(self.size_bytes)

    def read(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.data[:] = self.store[request.offset : request.end]

    def write(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.store[request.offset : request.end] = request.data


async def test_a_filter_sees_what_it_asks_for_and_changes_nothing(stack: Any) -> None:
    await stack.add(Store())
    watch = Watch(before=["write", "flush"], after=["read"], ranges=[(4096, 4096)])
    await stack.filter("disk0", watch)
    async with await stack.open("top") as disk:
        await disk.write(0, b"a" * 4096)
        assert watch.seen == []
        await disk.write(4096, b"b" * 512)
        await disk.flush()
        assert await disk.read(3584, 1024) == b"a" * 512 + b"b" * 512
        assert await disk.read(0, 512) == b"a" * 512
        await disk.unmap(4096, 512)
    assert watch.seen == [("before", "write", 4096, 512, 0), ("before", "flush", 0, 0, 0), ("after", "read", 3584, 1024, 0)]


async def test_what_is_shown_changes_under_load(stack: Any) -> None:
    await stack.malloc("disk0", "1MiB")
    watch = Watch()
    await stack.filter("disk0", watch)
    async with await stack.open("top") as disk:
        await disk.read(0, 512)
        assert watch.seen == []
        watch.show(before=["read"])
        await disk.read(0, 512)
        assert len(watch.seen) == 1
        watch.show(ranges=[("512KiB", "1KiB")])
        await disk.read(0, 512)
        await disk.read(512 << 10, 512)
        assert len(watch.seen) == 2
        watch.show(ranges=None)
        assert watch.shows == (["read"], [], None)
        run = await stack.perf("top", depth=32, seconds=1)
        for turn in range(20):
            watch.show(before=["read"] if turn % 2 else [])
            await asyncio.sleep(0.02)
        result = await run.result()
        assert result.errors == 0
        assert len(watch.seen) > 100
        watch.show(before=[])
        before = len(watch.seen)
        await disk.read(0, 512)
        assert len(watch.seen) == before


async def test_io_without_interest_needs_no_python(stack: Any) -> None:
    """With the loop blocked nothing in Python can run, and a load goes on all the same."""
    import time

    await stack.malloc("disk0", "1MiB")
    watch = Watch(before=["write"])
    await stack.filter("disk0", watch)
    run = await stack.perf("top", depth=8, seconds=1)
    before = run.snapshot().ios
    time.sleep(0.3)  # noqa: ASYNC251
    assert run.snapshot().ios > before + 1000
    assert (await run.result()).errors == 0
    assert watch.seen == []


async def test_a_filter_fails_answers_and_alters(stack: Any) -> None:
    class Odd(Filter):
        def before(self, requests: Sequence[FilterRequest]) -> None:
            for request in requests:
                if request.offset == 0:
                    request.fail(errno.ENOSPC)
                elif request.offset == 512:
                    if request.op == "read":
                        assert bytes(request.data) == bytes(512)
                        request.data[:] = b"answered".ljust(512)
                    request.complete()
                elif request.op == "write":
                    request.data[:] = bytes(request.data).upper()

        def after(self, requests: Sequence[FilterRequest]) -> None:
            for request in requests:
                if request.offset == 1024:
                    request.data[:] = bytes(request.data).swapcase()
                elif request.offset == 1536:
                    request.fail(errno.EIO)

    base = await stack.malloc("disk0", "1MiB")
    await stack.filter(base, Odd("top", before=["read", "write"], after=["read"]))
    async with await stack.open("top") as disk, await stack.open("disk0", write=False) as below:
        with pytest.raises(QpairError) as refused:
            await disk.write(0, b"x" * 512)
        assert refused.value.errno == errno.ENOSPC
        await disk.write(512, b"never" * 102 + b"xx")
        assert await below.read(512, 512) == bytes(512)
        assert await disk.read(512, 512) == b"answered".ljust(512)
        data = b"a" * 512
        await disk.write(1024, data)
        assert data == b"a" * 512, "the initiator's own bytes are not touched"
        assert await below.read(1024, 512) == b"A" * 512
        assert await disk.read(1024, 512) == b"a" * 512
        with pytest.raises(QpairError) as failed:
            await disk.read(1536, 512)
        assert failed.value.errno == errno.EIO


async def test_after_sees_how_the_base_failed_and_may_heal_it(stack: Any) -> None:
    class Healer(Watch):
        def after(self, requests: Sequence[FilterRequest]) -> None:
            super().after(requests)
            for request in requests:
                if request.offset == 0:
                    request.data[:] = b"h" * request.length
                    request.complete()

    class Sick(Filter):
        def before(self, requests: Sequence[FilterRequest]) -> None:
            for request in requests:
                request.fail(errno.ENOSPC)

    await stack.malloc("disk0", "1MiB")
    await stack.filter("disk0", Sick("sick", before=["read"]))
    healer = Healer(after=["read"])
    await stack.filter("sick", healer)
    async with await stack.open("top") as disk:
        assert await disk.read(0, 512) == b"h" * 512
        with pytest.raises(QpairError) as failed:
            await disk.read(512, 512)
        assert failed.value.errno == errno.ENOSPC
    assert [entry[4] for entry in healer.seen] == [errno.ENOSPC] * 2


async def test_a_delay_holds_up_only_what_is_delayed(stack: Any) -> None:
    class Slow(Filter):
        async def before(self, requests: Sequence[FilterRequest]) -> None:  # type: ignore[override]
            for request in requests:
                if request.offset >= 4096:
                    request.pass_on()
            await asyncio.sleep(0.2)

    await stack.malloc("disk0", "1MiB")
    await stack.filter("disk0", Slow("top", before=["read"]))
    async with await stack.open("top") as disk:
        slow = asyncio.ensure_future(disk.read(0, 512))
        quick = asyncio.ensure_future(disk.read(8192, 512))
        done, _ = await asyncio.wait({slow, quick}, return_when=asyncio.FIRST_COMPLETED)
        assert done == {quick}
        assert await slow == bytes(512)


async def test_a_filter_that_raises_fails_what_it_was_shown_and_goes_on(stack: Any, caplog: Any) -> None:
    class Broken(Filter):
        def before(self, requests: Sequence[FilterRequest]) -> None:
            raise RuntimeError("a defect")

    await stack.malloc("disk0", "1MiB")
    await stack.filter("disk0", Broken("top", before=["read"]))
    async with await stack.open("top") as disk:
        for _ in range(2):
            with pytest.raises(QpairError) as failed:
                await disk.read(0, 512)
            assert failed.value.errno == errno.EIO
        await disk.write(0, b"w" * 512)
    assert "bdev top: before raised RuntimeError: a defect" in caplog.text


async def test_a_compare_and_write_is_shown_as_what_it_is_made_of(stack: Any) -> None:
    await stack.malloc("disk0", "1MiB")
    watch = Watch(before=["write"])
    await stack.filter("disk0", watch)
    (shown,) = await stack.rpc("bdev_get_bdevs", name="top")
    assert shown["driver_specific"]["filter"] == {
        "base_bdev_name": "disk0",
        "class": "Watch",
        "before": ["write"],
        "after": [],
        "ranges": None,
    }
    async with await stack.open("top") as disk:
        await disk.write_zeroes(0, 4096)
        if hasattr(disk, "compare_and_write"):
            watch.seen.clear()
            await disk.compare_and_write(0, bytes(512), b"n" * 512)
            assert [entry[:2] for entry in watch.seen] == [("before", "write")]


async def test_a_filter_claims_its_base_and_gives_it_back(stack: Any) -> None:
    await stack.malloc("disk0", "1MiB")
    await stack.filter("disk0", Watch())
    with pytest.raises(Busy):
        await stack.filter("disk0", Watch("other"))
    await stack.delete("top")
    await stack.filter("disk0", Watch())
    await stack.delete("disk0")
    assert stack.bdevs.infos() == []


async def test_a_base_that_goes_takes_the_filter_with_what_is_in_python(stack: Any) -> None:
    class Never(Filter):
        async def before(self, requests: Sequence[FilterRequest]) -> None:  # type: ignore[override]
            await asyncio.sleep(3600)

    await stack.malloc("disk0", "1MiB")
    await stack.filter("disk0", Never("top", before=["read"]))
    disk = await stack.open("top")
    reading = asyncio.ensure_future(disk.read(0, 512))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(stack.delete("disk0", deadline_ms=100), 10)
    with pytest.raises(QpairError):
        await asyncio.wait_for(reading, 1)


async def test_a_request_of_a_bdev_cannot_be_passed_on(stack: Any) -> None:
    found: list[str] = []

    class Ram(Bdev):
        def read(self, requests: Sequence[Request]) -> None:
            for request in requests:
                try:
                    request.pass_on()  # type: ignore[attr-defined]
                except ValueError as error:
                    found.append(str(error))

    disk = await stack.add(Ram("ram", "1MiB"))
    await disk.read(0, 512)
    assert found == ["read at 0: there is nothing below to pass it on to"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"before": ["reset"]}, "before reset: read, write, flush, unmap or write_zeroes"),
        ({"after": ["trim"]}, "after trim: read, write, flush, unmap or write_zeroes"),
        ({"ranges": [(0, 512)] * 1025}, "ranges 1025: at most 1024"),
        ({"depth": 0}, "depth 0: 1 to 4096"),
    ],
)
async def test_impossible_filters_are_refused_and_leave_the_base_free(stack: Any, options: dict[str, Any], text: str) -> None:
    await stack.malloc("disk0", "1MiB")
    with pytest.raises(InvalidArgument, match=text):
        await stack.filter("disk0", Watch(**options))
    await stack.filter("disk0", Watch())
    with pytest.raises(InvalidArgument, match="both at least 0"):
        Watch(ranges=[(-1, 5)])
