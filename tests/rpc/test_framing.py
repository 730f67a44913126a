"""The framer: the same documents however the bytes arrive, in linear time, with every fault named."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qpair.rpc.framing import Framer, FramingError

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
documents = st.lists(st.dictionaries(st.text(), json_values, max_size=4) | st.lists(json_values, max_size=4), max_size=6)
layouts = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False, "indent": 1}])
gaps = st.sampled_from(["", "\n", " \r\n\t"])


def run(data: bytes, cuts: list[int], **limits: int) -> tuple[list[bytes], tuple[int, str] | None]:
    framer = Framer(**limits)
    found: list[bytes] = []
    error: FramingError | None = None
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    for start, end in itertools.pairwise(edges):
        more, error = framer.feed(data[start:end])
        found += more
    return found, (error.code, error.message) if error else None


@given(documents, layouts, gaps, st.lists(st.integers(0, 10_000), max_size=8))
def test_concatenated_values_come_out_as_they_went_in(values: list[Any], layout: Any, gap: str, cuts: list[int]) -> None:
    data = gap.join(json.dumps(value, **layout) for value in values).encode("utf-8", "surrogatepass")
    found, error = run(data, cuts)
    assert error is None
    assert [json.loads(document.decode("utf-8", "surrogatepass")) for document in found] == values


@given(st.binary(max_size=60) | st.text('{}[]"\\ ,:1a', max_size=60).map(str.encode), st.lists(st.integers(0, 60), max_size=6))
def test_any_bytes_give_the_same_whole_split_and_byte_by_byte(data: bytes, cuts: list[int]) -> None:
    whole = run(data, [])
    assert run(data, cuts) == whole
    assert run(data, list(range(len(data)))) == whole


@given(st.text('{[]}"\\x', max_size=40).map(str.encode), st.integers(1, 12), st.integers(1, 6))
def test_limits_are_the_same_whole_and_byte_by_byte(data: bytes, size: int, depth: int) -> None:
    limits = {"document_bytes_max": size, "depth_max": depth}
    assert run(data, list(range(len(data))), **limits) == run(data, [], **limits)


def test_a_document_past_the_limit_is_refused_by_name() -> None:
    found, error = run(b'{"a":1}' + b'{"b":"' + b"x" * 100, [], document_bytes_max=64)
    assert found == [b'{"a":1}']
    assert error == (-32600, "Invalid request: longer than 64 bytes")


def test_nesting_past_the_limit_is_refused_by_name() -> None:
    assert run(b"[" * 65, []) == ([], (-32700, "Parse error: nested deeper than 64"))
    assert run(b"[" * 64, [])[1] is None


def test_text_outside_of_json_is_a_parse_error_and_a_scalar_an_invalid_request() -> None:
    assert run(b"GET / HTTP/1.1\r\n", []) == ([], (-32700, "Parse error: no JSON object or array begins with byte 0x47"))
    assert run(b"42", []) == ([], (-32600, "Invalid request: it must be an object or a batch array, found '4'"))


def test_after_an_error_nothing_more_comes_out() -> None:
    framer = Framer()
    framer.feed(b"}")
    assert framer.feed(b'{"a":1}')[0] == []
    assert framer.buffered_bytes == 0


def test_a_long_string_fed_in_small_pieces_costs_linear_time() -> None:
    def seconds(size: int) -> float:
        framer = Framer()
        data = b'{"a":"' + b"x" * size + b'"}'
        began = time.perf_counter()
        for start in range(0, len(data), 64):
            framer.feed(data[start : start + 64])
        return time.perf_counter() - began

    seconds(50_000)
    small, large = min(seconds(200_000) for _ in range(3)), min(seconds(1_600_000) for _ in range(3))
    assert large < small * 8 * 3, f"8 times the bytes took {large / small:.1f} times as long"
