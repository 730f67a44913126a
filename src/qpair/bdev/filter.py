"""Filters: Python that sees, delays, alters, counts or fails the I/O of any bdev.

    class BadSector(Filter):
        def before(self, requests: Sequence[FilterRequest]) -> None:
            for request in requests:
                if request.offset <= 4096 < request.end:
                    request.fail(errno.EIO)

    disk = await stack.filter("disk0", BadSector("bad0", before=["read"], ranges=[(0, "1MiB")]))

How it works: `Stack.filter` makes a new bdev on top of the one named, which is claimed. I/O of the operations ``before`` is shown to the method of that name before the base has it;
of those in ``after``, when the base is done with it; with ``ranges``, only where it touches one. Everything else passes in the engine, and Python
knows nothing of it. `show` changes all three at any time; it holds for I/O that is submitted from then on.

A request that is left alone goes on as it was. ``request.fail(errno)`` ends it with an error; ``request.complete()`` ends it well: before, without the base (fill
``data`` of a read); after, in spite of it. ``data`` can be changed: of a write before, of a read after. To delay, write the method as ``async`` and wait; a request that is to go
on before the others of its batch is let go by ``request.pass_on()``.

Errors: a method that raises fails the requests it had not let go: with the errno of an ``OSError``, else EIO. When the filter's loop is gone, what was to be shown fails.

Limits: operations are read, write, flush, unmap and write_zeroes; what compares or copies is made of those by the engine, so that no write goes by unseen. A flush counts as touching
any range. ``depth`` requests are shown at a time, the others wait; I/O past ``max_io_bytes`` is split. At most 1024 ranges; zoned bdevs are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from qpair.app.sizes import parse_size
from qpair.bdev.python.model import Answer, Request
from qpair.errors import InvalidArgument, from_engine

if TYPE_CHECKING:
    from qpair._engine import PythonFilterRing

__all__ = ["Filter", "FilterRequest", "Shown"]

Shown = Literal["read", "write", "flush", "unmap", "write_zeroes"]
Range = tuple[int | str, int | str]


class FilterRequest(Request, Protocol):
    """A request on its way down or up."""

    @property
    def errno(self) -> int:
        """In ``after``: how the base ended it, 0 for well. In ``before``: 0."""

    def pass_on(self) -> None:
        """Let it go on as it is, now."""


class Filter:
    """Base of all filters: override ``before``, ``after`` or both. ``before``/``after`` of the constructor say what they are shown; ``ranges`` are (offset, length) in bytes or
    as "1MiB", outwards to whole blocks; None is everywhere."""

    def __init__(
        self,
        name: str,
        *,
        before: Iterable[Shown] = (),
        after: Iterable[Shown] = (),
        ranges: Iterable[Range] | None = None,
        depth: int = 128,
        max_io_bytes: int = 131072,
    ) -> None:
        self.name = name
        self.depth = depth
        self.max_io_bytes = max_io_bytes
        self._shown = (list(before), list(after), _bytes(ranges))
        self._ring: PythonFilterRing | None = None
        self._block_size = 1

    def before(self, requests: Sequence[FilterRequest]) -> Answer:
        """Requests that the base has not seen."""
        return None

    def after(self, requests: Sequence[FilterRequest]) -> Answer:
        """Requests that the base is done with."""
        return None

    @property
    def shows(self) -> tuple[list[Shown], list[Shown], list[tuple[int, int]] | None]:
        """What is shown now: ``before``, ``after``, ``ranges`` in bytes."""
        return self._shown

    def show(
        self, *, before: Iterable[Shown] | None = None, after: Iterable[Shown] | None = None, ranges: Iterable[Range] | None = ()
    ) -> None:
        """Show something else from now on. What is not given stays; ``ranges=None`` is everywhere."""
        old_before, old_after, old_ranges = self._shown
        shown = (
            old_before if before is None else list(before),
            old_after if after is None else list(after),
            old_ranges if ranges == () else _bytes(ranges),
        )
        if self._ring is not None:
            try:
                self._ring.show(before=shown[0], after=shown[1], ranges=self.blocks(shown[2], self._block_size))
            except OSError as error:
                raise from_engine(error) from error
        self._shown = shown

    def bind(self, ring: PythonFilterRing, block_size: int) -> None:
        """Called by the stack, once."""
        self._ring, self._block_size = ring, block_size

    @staticmethod
    def blocks(ranges: list[tuple[int, int]] | None, block_size: int) -> list[tuple[int, int]] | None:
        """Ranges in bytes as ranges of blocks: every block that they touch."""
        if ranges is None:
            return None
        return [(at // block_size, -(-(at + length) // block_size) - at // block_size) for at, length in ranges]


def _bytes(ranges: Iterable[Range] | None) -> list[tuple[int, int]] | None:
    if ranges is None:
        return None
    found = []
    for at, length in ranges:
        first, count = (value if isinstance(value, int) else parse_size(value) for value in (at, length))
        if first < 0 or count < 0:
            raise InvalidArgument(f"range ({at}, {length}): both at least 0")
        found.append((first, count))
    return found
