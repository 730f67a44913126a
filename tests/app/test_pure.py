"""What the process computes before it starts: core masks, sizes, the order of subsystems."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpair.app.cores import CORES_MAX, format_mask, parse_cores, parse_mask
from qpair.app.sizes import BYTES_MAX, format_size, parse_size
from qpair.app.subsystems import order
from qpair.errors import InvalidArgument, SubsystemError

cores = st.sets(st.integers(0, CORES_MAX - 1), min_size=1, max_size=12)


@given(cores)
def test_a_mask_and_a_list_name_the_same_cores(wanted: set[int]) -> None:
    listed = ",".join(map(str, wanted))
    assert (
        parse_mask("0x" + format_mask(wanted)) == parse_mask(f"[{listed}]") == parse_cores(listed) == parse_cores(wanted) == sorted(wanted)
    )


@given(st.integers(0, 1000), st.integers(0, 23))
def test_a_range_names_all_cores_between_its_ends(first: int, length: int) -> None:
    assert parse_mask(f"[{first}-{first + length}]") == list(range(first, first + length + 1))


@given(st.text(max_size=20))
def test_any_text_is_a_mask_or_refused_by_name(text: str) -> None:
    for parse in (parse_mask, parse_cores):
        try:
            outcome: object = parse(text)
        except InvalidArgument as error:
            outcome = "core" in str(error)
        assert outcome


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x0", "core mask '0x0' names no core"),
        ("", "core mask '' is neither a hexadecimal mask (0x3) nor a list ([0,2-3])"),
        ("[0,2", "core list '[0,2': the closing ']' is missing"),
        ("[]", "core list '[]': '' is neither a core nor a range (2-3)"),
        ("[3-1]", "core list '[3-1]': range 3-1 runs backwards"),
        ("[1024]", "core list '[1024]': core 1024 is past 1023"),
        ("-1", "core mask '-1' is neither a hexadecimal mask (0x3) nor a list ([0,2-3])"),
    ],
)
def test_a_mask_that_means_nothing_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_mask(text)
    assert str(refused.value) == message


@given(st.integers(0, BYTES_MAX))
def test_a_printed_size_reads_back(size: int) -> None:
    assert parse_size(format_size(size)) == parse_size(size) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1.5G", 3 << 29),
        ("10GB", 10**10),
        ("7b", 7),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_refused_by_name(text: str) -> None:
    try:
        outcome = 0 <= parse_size(text) <= BYTES_MAX
    except InvalidArgument as error:
        outcome = str(error).startswith("size ")
    assert outcome


@pytest.mark.parametrize("size", ["", "x", "-1", "1.0001k", "8EiB", "1e3", -1, 2**63, 1.5, True, None])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(InvalidArgument):
        parse_size(size)  # type: ignore[arg-type]


names = st.sampled_from("abcdefghij")


@given(st.dictionaries(names, st.lists(names, max_size=4), max_size=10))
def test_subsystems_come_after_all_they_need_or_the_fault_is_named(needs: dict[str, list[str]]) -> None:
    try:
        ordered = order(needs)
    except SubsystemError as error:
        fault = str(error)
    else:
        fault = ""
    if "does not exist" in fault:
        assert any(dependency not in needs for depends in needs.values() for dependency in depends)
        return
    if fault:
        circle = fault.partition("circle: ")[2].split(" -> ")
        assert circle[0] == circle[-1]
        assert len(circle) > 1
        assert all(later in needs[earlier] for earlier, later in pairwise(circle))
        return
    assert sorted(ordered) == sorted(needs)
    place = {name: index for index, name in enumerate(ordered)}
    assert all(place[dependency] < place[name] for name, depends in needs.items() for dependency in depends)


def test_a_missing_dependency_and_a_circle_are_named() -> None:
    with pytest.raises(SubsystemError) as missing:
        order({"bdev": ["accel"]})
    assert str(missing.value) == "subsystem 'bdev' depends on 'accel', which does not exist"
    with pytest.raises(SubsystemError) as circle:
        order({"a": ["b"], "b": ["c"], "c": ["b"]})
    assert str(circle.value) == "subsystems depend on each other in a circle: b -> c -> b"
