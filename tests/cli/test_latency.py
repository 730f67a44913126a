"""Latencies of a run: decoding, percentiles, and the picture that is drawn of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.conftest import CORE
from qpair.bdev.latency import COOKIE, HEADER, Latencies
from qpair.cli.plot import check
from qpair.errors import InvalidArgument, Unsupported


def leb(number: int) -> bytes:
    """One count as HdrHistogram writes it."""
    left = (number << 1) ^ (number >> 63)
    out = bytearray()
    for _ in range(8):
        if left < 0x80:
            return bytes([*out, left])
        out.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([*out, left & 0xFF])


def encoded(counts: list[int], *, digits: int = 3, low: int = 1) -> bytes:
    """A histogram with ``counts`` in its slots."""
    body = b""
    empty = 0
    for count in counts:
        if count == 0:
            empty += 1
            continue
        body += (leb(-empty) if empty else b"") + leb(count)
        empty = 0
    return HEADER.pack(COOKIE, len(body), 0, digits, low, 1 << 40, 1.0) + body


def highest(value: int, digits: int) -> int:
    """What HdrHistogram counts together with ``value``, said by its definition: as many digits as are kept."""
    bits = max((2 * 10**digits - 1).bit_length(), 1)
    shift = max(0, value.bit_length() - bits)
    return ((value >> shift) + 1 << shift) - 1


@given(st.lists(st.integers(0, 1 << 60), max_size=60), st.integers(0, 3))
def test_what_is_written_is_read(counts: list[int], digits: int) -> None:
    found = Latencies.decode(encoded(counts, digits=digits))
    assert list(found.counts) == [count for count in counts if count]
    assert found.total == sum(counts)
    assert list(found.values_ns) == sorted(set(found.values_ns))


@given(st.lists(st.integers(0, 1 << 34), min_size=1, max_size=50), st.integers(1, 3), st.floats(0, 100))
def test_percentiles_are_those_of_the_values(values: list[int], digits: int, percent: float) -> None:
    bits = max((2 * 10**digits - 1).bit_length(), 1)
    counts: dict[int, int] = {}
    for value in values:
        bucket = max(0, value.bit_length() - bits)
        index = (bucket << (bits - 1)) + (value >> bucket)
        counts[index] = counts.get(index, 0) + 1
    found = Latencies.decode(encoded([counts.get(index, 0) for index in range(max(counts) + 1)], digits=digits))
    kept = sorted(highest(value, digits) for value in values)
    rank = max(1, -int(-(percent * len(values)) // 100))
    assert found.percentile(percent) == kept[min(rank, len(kept)) - 1]
    assert found.percentile(100) == kept[-1]
    assert found.distribution()[-1] == (100.0, kept[-1])


def test_the_largest_is_no_larger_than_the_largest_measured() -> None:
    data = encoded([0] * 3000 + [5])
    slot = Latencies.decode(data).percentile(100)
    assert Latencies.decode(data, max_ns=slot - 1).percentile(100) == slot - 1


def test_no_values_have_no_percentiles() -> None:
    nothing = Latencies.decode(encoded([]))
    assert (nothing.total, nothing.percentile(99), nothing.distribution()) == (0, 0, [])
    with pytest.raises(ValueError, match=r"percent 100\.5 is not from 0 to 100"):
        nothing.percentile(100.5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "a histogram of 0 bytes is shorter than its header of 40"),
        (struct.pack(">I", 0x1C849304) + encoded([1])[4:], "cookie 0x1c849304 is not that of HdrHistogram V2"),
        (encoded([1]) + b"\0", "the header says 1 bytes of counts, 2 are there"),
        (HEADER.pack(COOKIE, 0, 1, 3, 1, 9, 1.0), "normalising offset 1 is not 0"),
        (HEADER.pack(COOKIE, 0, 0, 6, 1, 9, 1.0), "6 significant digits from 1 on"),
        (HEADER.pack(COOKIE, 0, 0, 3, 0, 9, 1.0), "3 significant digits from 0 on"),
        (HEADER.pack(COOKIE, 1, 0, 3, 1, 9, 1.0) + b"\x80", "the last count is cut off after 1 bytes"),
        (HEADER.pack(COOKIE, 5, 0, 3, 1, 9, 1.0) + leb(-(1 << 30)), r"slot 1073741824 is past 16777216"),
    ],
)
def test_what_is_no_histogram_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Latencies.decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_histogram_or_refused(data: bytes) -> None:
    for whole in (data, HEADER.pack(COOKIE, len(data), 0, 3, 1, 1 << 40, 1.0) + data):
        try:
            found = Latencies.decode(whole)
        except ValueError:
            continue
        assert found.total >= 0


async def perf(client: Any, qpair_command: list[str], *arguments: str) -> tuple[int, str, str]:
    core = ("--cores", CORE)
    answer: tuple[int, str, str] = await client(*qpair_command, "perf", *arguments, *core)
    return answer


async def test_the_engines_histogram_agrees_with_its_own_percentiles(client: Any, qpair_command: list[str]) -> None:
    code, out, err = await perf(client, qpair_command, "null:1GiB", "-t", "1", "-i", "0.1", "-q", "8", "--json")
    assert code == 0, err
    told = json.loads(out)
    by_percent = dict(map(tuple, told["percentiles_ns"]))
    assert {50.0: told["p50_ns"], 99.0: told["p99_ns"], 99.9: told["p99_9_ns"], 100.0: told["max_ns"]}.items() <= by_percent.items()
    series = told["series"]
    assert 5 <= len(series) <= 11
    assert series[-1]["elapsed_s"] == pytest.approx(told["elapsed_s"], abs=0.11)
    steps = [now["elapsed_s"] - before for now, before in zip(series, [0.0, *(point["elapsed_s"] for point in series)], strict=False)]
    counted = sum(point["iops"] * step for point, step in zip(series, steps, strict=True))
    assert counted == pytest.approx(told["ios"], rel=0.15)


async def test_a_picture_says_what_was_measured(client: Any, qpair_command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for kind, begins in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        picture = tmp_path / f"p{kind}"
        code, out, err = await perf(client, qpair_command, "null:1GiB", "-t", "0.5", "-i", "0.1", "--plot", str(picture))
        assert code == 0, err
        assert out.endswith(f"drawn: {picture}\n")
        assert picture.read_bytes().startswith(begins)
    texts = [item.text or "" for item in ElementTree.parse(tmp_path / "p.svg").iter("{http://www.w3.org/2000/svg}text")]
    wanted = {"Latency by percentile", "IOPS over time", "seconds", "IOPS", "MB/s", "latency", "99 %", "99.9 %", "p50", "p99", "max"}
    assert not wanted - {text.strip() for text in texts}
    assert any(text.startswith("null:1GiB: randread 4KiB, depth 128, cores ") for text in texts)


def test_what_cannot_be_drawn_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match=r"\.jpg is none of \.svg, \.png, \.pdf"):
        check("x.jpg")
    with pytest.raises(InvalidArgument, match=r"a name without an ending is none of"):
        check("x")
    with pytest.raises(InvalidArgument, match="none is no directory that may be written to"):
        check(str(tmp_path / "none" / "x.svg"))
    monkeypatch.setattr("qpair.cli.plot.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"--plot needs matplotlib, which is not installed: pip install 'qpair\[plot\]'"):
        check(str(tmp_path / "x.svg"))
