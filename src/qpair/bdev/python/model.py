"""What a user subclasses, and what its methods are given."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Sequence
from typing import Literal, Protocol

from qpair.app.sizes import parse_size

__all__ = ["OPERATIONS", "Answer", "Bdev", "Op", "Request"]

Answer = Awaitable[None] | None
Op = Literal["read", "write", "flush", "unmap", "write_zeroes", "reset"]
OPERATIONS: tuple[Op, ...] = ("read", "write", "flush", "unmap", "write_zeroes", "reset")


class Request(Protocol):
    """One I/O for a Python bdev. Made by the engine; see ``PythonBdevRequest``."""

    @property
    def op(self) -> Op:
        """What is asked for."""

    @property
    def offset(self) -> int:
        """Its first byte."""

    @property
    def length(self) -> int:
        """In bytes."""

    @property
    def end(self) -> int:
        """``offset + length``."""

    @property
    def data(self) -> memoryview:
        """The buffer, ``length`` bytes: writable zeros of a read (fill it), read-only data of a write (take from it); empty for the others. ``ValueError`` once done."""

    @property
    def done(self) -> bool:
        """Whether it was completed."""

    def complete(self, errno: int = 0) -> None:
        """Done: successfully, or with a positive ``errno``. Once; ``data`` is invalid afterwards."""

    def fail(self, errno: int) -> None:
        """As ``complete(errno)``, and 0 is refused."""


class Bdev:
    """Base of all Python bdevs: override ``read`` and, unless ``readonly``, ``write``; the others as wanted. Each takes a batch.

    ``size``: bytes, or "64MiB"; a multiple of ``block_size`` (512 to 65536, a power of two). ``depth``: requests at a time, up to 4096. ``max_io_bytes``: longer
    ones are split; ``depth * max_io_bytes`` is at most 1 GiB.
    """

    def __init__(
        self,
        name: str,
        size: int | str,
        *,
        block_size: int = 512,
        depth: int = 128,
        max_io_bytes: int = 131072,
        readonly: bool = False,
    ) -> None:
        self.name = name
        self.size_bytes = parse_size(size)
        self.block_size = block_size
        self.depth = depth
        self.max_io_bytes = max_io_bytes
        self.readonly = readonly

    async def open(self) -> None:
        """Called once before the first request, on the loop that serves. What it raises refuses the bdev."""

    async def close(self) -> None:
        """Called once after the last request. What it raises is logged."""

    def read(self, requests: Sequence[Request]) -> Answer:
        """Fill each ``request.data``."""
        _refuse(requests)
        return None

    def write(self, requests: Sequence[Request]) -> Answer:
        """Keep each ``request.data``."""
        _refuse(requests)
        return None

    def flush(self, requests: Sequence[Request]) -> Answer:
        """Make completed writes durable. By default they are when completed."""
        return None

    def unmap(self, requests: Sequence[Request]) -> Answer:
        """Forget the ranges. By default nothing is forgotten, which is allowed."""
        return None

    def write_zeroes(self, requests: Sequence[Request]) -> Answer:
        """Make the ranges read as zeros. By default refused with EOPNOTSUPP."""
        _refuse(requests)
        return None

    def reset(self, requests: Sequence[Request]) -> Answer:
        """Recover. By default there is nothing to do."""
        return None


def _refuse(requests: Sequence[Request]) -> None:
    for request in requests:
        request.fail(errno.EOPNOTSUPP)
