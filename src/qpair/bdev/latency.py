"""The latencies of a load as a distribution: decoding of HdrHistogram's V2 encoding, and percentiles.

HdrHistogram V2 as its Java original defines it (uncompressed): a header of 40 bytes, big-endian, then counts as ZigZag LEB128, a negative one standing for so many empty slots.

How it works: a slot's index says which values it counts: sub-buckets of equal width in buckets that double. A percentile is, as in HdrHistogram, the highest value that its slot
counts, but never more than the largest slot in use.

Errors: `ValueError` names what is wrong with the bytes. Limits: none but those of the encoding; normalising offsets other than 0 are refused, for nobody writes them.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from itertools import accumulate
from typing import Self

__all__ = ["Latencies"]

COOKIE = 0x1C849313
HEADER = struct.Struct(">IIiIQQd")
LEB_BYTES_MAX = 9
SLOTS_MAX = 1 << 24


class Latencies:
    """How many I/Os took how long. ``values_ns``: the highest value of each slot in use, ascending; ``counts``: how many it has."""

    __slots__ = ("_running", "counts", "values_ns")

    def __init__(self, values_ns: tuple[int, ...], counts: tuple[int, ...]) -> None:
        self.values_ns = values_ns
        self.counts = counts
        self._running = tuple(accumulate(counts))

    def __repr__(self) -> str:
        return f"<latencies of {self.total} I/Os>"

    @property
    def total(self) -> int:
        """How many I/Os there were."""
        return self._running[-1] if self._running else 0

    def percentile(self, percent: float) -> int:
        """Nanoseconds within which ``percent`` of the I/Os were done; 0 without any."""
        if not 0 <= percent <= 100:
            raise ValueError(f"percent {percent} is not from 0 to 100")
        if not self._running:
            return 0
        wanted = max(1, min(self.total, -int(-(percent * self.total) // 100)))
        return self.values_ns[bisect_left(self._running, wanted)]

    def distribution(self) -> list[tuple[float, int]]:
        """(percent of I/Os done within, nanoseconds), one a slot in use, ascending."""
        total = self.total
        return [(100.0 * running / total, value) for running, value in zip(self._running, self.values_ns, strict=True)]

    @classmethod
    def decode(cls, data: bytes, *, max_ns: int | None = None) -> Self:
        """From the V2 encoding. ``max_ns``: the largest value there was, where that is known more exactly than by its slot."""
        if len(data) < HEADER.size:
            raise ValueError(f"a histogram of {len(data)} bytes is shorter than its header of {HEADER.size}")
        cookie, length, offset, digits, low, _high, _ratio = HEADER.unpack_from(data)
        if cookie != COOKIE:
            raise ValueError(f"cookie {cookie:#x} is not that of HdrHistogram V2, {COOKIE:#x}")
        if length != len(data) - HEADER.size:
            raise ValueError(f"the header says {length} bytes of counts, {len(data) - HEADER.size} are there")
        if offset != 0:
            raise ValueError(f"normalising offset {offset} is not 0")
        if not 0 <= digits <= 5 or low == 0:
            raise ValueError(f"{digits} significant digits from {low} on: they are 0 to 5, from 1 on")
        slots = _Slots(digits, low)
        values: list[int] = []
        counts: list[int] = []
        index = 0
        for number in _numbers(data[HEADER.size :]):
            if number > 0:
                values.append(slots.highest(index))
                counts.append(number)
                index += 1
            else:
                index += -number or 1
            if index > SLOTS_MAX:
                raise ValueError(f"slot {index} is past {SLOTS_MAX}")
        if values and max_ns is not None:
            values[-1] = min(values[-1], max_ns)
        return cls(tuple(values), tuple(counts))


class _Slots:
    """Which values a slot counts."""

    def __init__(self, digits: int, low: int) -> None:
        self._unit = low.bit_length() - 1
        self._half_bits = max((2 * 10**digits - 1).bit_length(), 1) - 1

    def highest(self, index: int) -> int:
        """The highest value that slot ``index`` counts."""
        half = 1 << self._half_bits
        bucket = (index >> self._half_bits) - 1
        sub = (index & (half - 1)) + half
        if bucket < 0:
            bucket, sub = 0, sub - half
        highest: int = ((sub + 1) << (bucket + self._unit)) - 1
        return highest


def _numbers(data: bytes) -> list[int]:
    """ZigZag LEB128; the ninth byte carries eight bits."""
    numbers: list[int] = []
    value = shift = taken = 0
    for byte in data:
        taken += 1
        last = taken == LEB_BYTES_MAX
        value |= (byte if last else byte & 0x7F) << shift
        shift += 7
        if last or byte < 0x80:
            numbers.append(value >> 1 ^ -(value & 1))
            value = shift = taken = 0
    if taken:
        raise ValueError(f"the last count is cut off after {taken} bytes")
    return numbers
