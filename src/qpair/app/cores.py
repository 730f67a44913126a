"""Which cores: masks and lists as SPDK's ``-m`` takes them.

``0x3`` or ``3`` is a hexadecimal mask (``0`` alone excepted: no core); ``[0,2-3]`` is a list. `parse_cores` also takes plain lists without
brackets ("0,2-3", "0") for the Python API, where a lone number means that core.

Errors: `InvalidArgument` names the text and what is wrong with it. Limits: 1024 cores, as the kernel's cpu_set_t.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from qpair.errors import InvalidArgument

__all__ = ["CORES_MAX", "format_mask", "parse_cores", "parse_mask"]

CORES_MAX = 1024
_ITEM = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def parse_mask(text: str) -> list[int]:
    """SPDK's ``-m``: ``[0,2-3]`` is a list, everything else a hexadecimal mask. Ascending, without repeats, never empty."""
    stripped = text.strip()
    if stripped.startswith("["):
        if not stripped.endswith("]"):
            raise InvalidArgument(f"core list {text!r}: the closing ']' is missing")
        return _list(stripped[1:-1], text)
    digits = stripped[2:] if stripped[:2] in ("0x", "0X") else stripped
    if not re.fullmatch(r"[0-9a-fA-F]+", digits):
        raise InvalidArgument(f"core mask {text!r} is neither a hexadecimal mask (0x3) nor a list ([0,2-3])")
    if len(digits.lstrip("0")) > CORES_MAX // 4:
        raise InvalidArgument(f"core mask {text!r:.64} names cores past {CORES_MAX - 1}")
    mask = int(digits, 16)
    if mask == 0:
        raise InvalidArgument(f"core mask {text!r} names no core")
    return [core for core in range(mask.bit_length()) if mask >> core & 1]


def parse_cores(cores: str | int | Iterable[int]) -> list[int]:
    """Cores as the Python API takes them: ``"0"``, ``"0,2-3"``, ``"[0,2]"``, ``"0x3"``, ``2`` (that core) or an iterable of numbers."""
    if isinstance(cores, str):
        stripped = cores.strip()
        if stripped.startswith("[") or stripped[:2] in ("0x", "0X"):
            return parse_mask(stripped)
        return _list(stripped, cores)
    numbers = [cores] if isinstance(cores, int) else list(cores)
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < CORES_MAX:
            raise InvalidArgument(f"core {number!r} is not a number from 0 to {CORES_MAX - 1}")
    if not numbers:
        raise InvalidArgument("cores: the list is empty")
    return sorted(set(numbers))


def check_usable(cores: Iterable[int]) -> None:
    """Refuse cores that this process may not run on (its affinity mask, a container's cpuset)."""
    usable = os.sched_getaffinity(0)
    if missing := [core for core in cores if core not in usable]:
        raise InvalidArgument(f"core {missing[0]} is not usable by this process; usable: {_ranges(sorted(usable))}")


def format_mask(cores: Iterable[int]) -> str:
    """SPDK's way to print a mask: lower-case hexadecimal digits without prefix."""
    return format(sum(1 << core for core in set(cores)), "x")


def _list(body: str, text: str) -> list[int]:
    cores: set[int] = set()
    for item in body.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise InvalidArgument(f"core list {text!r:.80}: {item.strip()!r:.40} is neither a core nor a range (2-3)")
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        if last < first:
            raise InvalidArgument(f"core list {text!r:.80}: range {first}-{last} runs backwards")
        if last >= CORES_MAX:
            raise InvalidArgument(f"core list {text!r:.80}: core {last} is past {CORES_MAX - 1}")
        cores.update(range(first, last + 1))
    return sorted(cores)


def _ranges(cores: list[int]) -> str:
    parts: list[str] = []
    start = 0
    for index, core in enumerate(cores):
        if index + 1 == len(cores) or cores[index + 1] != core + 1:
            parts.append(str(cores[start]) if start == index else f"{cores[start]}-{core}")
            start = index + 1
    return ",".join(parts)
