"""Sizes in bytes: plain numbers, or text with a unit.

``4096``, ``"4096"``, ``"4k"``, ``"64MiB"``, ``"1.5 GiB"``: K, M, G, T, P and E count by 1024, with or without ``iB``; ``kB``, ``MB``, ``GB`` ... count
by 1000, as disks are sold. Upper and lower case are the same. Errors: `InvalidArgument` names the text. Limit: 2**63 - 1 bytes.
"""

from __future__ import annotations

import re

from qpair.errors import InvalidArgument

__all__ = ["BYTES_MAX", "format_size", "parse_size"]

BYTES_MAX = 2**63 - 1
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,18})?)\s*(?:([kmgtpe])(i?b)?|b)?\s*", re.IGNORECASE | re.ASCII)
_POWERS = {letter: index + 1 for index, letter in enumerate("kmgtpe")}


def parse_size(size: int | str, *, what: str = "size") -> int:
    """``size`` in bytes. ``what`` names the field in the error."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise InvalidArgument(f"{what} {size!r} is neither a number of bytes nor a text like '10GiB'")
    if isinstance(size, int):
        value = size
    else:
        match = _SIZE.fullmatch(size)
        if match is None:
            raise InvalidArgument(f"{what} {size!r:.64} is not a size: write 4096, '64MiB' or '10GB'")
        whole, _, decimals = match[1].partition(".")
        letter, suffix = (match[2] or "").lower(), (match[3] or "").lower()
        unit = (1000 if suffix == "b" else 1024) ** _POWERS[letter] if letter else 1
        value, rest = divmod(int(whole + decimals) * unit, 10 ** len(decimals))
        if rest:
            raise InvalidArgument(f"{what} {size!r:.64} is not a whole number of bytes")
    if not 0 <= value <= BYTES_MAX:
        raise InvalidArgument(f"{what} {size!r:.64} is not from 0 to {BYTES_MAX} bytes")
    return value


def format_size(size_bytes: int) -> str:
    """The shortest exact text: ``67108864`` is ``64MiB``; what no unit divides stays a number of bytes."""
    for letter, power in reversed(_POWERS.items()):
        unit = 1024**power
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{letter.upper()}iB"
    return str(size_bytes)
