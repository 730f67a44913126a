"""GUID partition tables as bytes: what is right is read, what is wrong is refused by name, and nothing else happens."""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise
from uuid import UUID, uuid4
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpair.bdev.gpt import (
    SPDK_TYPE,
    Entry,
    GptError,
    Header,
    Table,
    decode_entries,
    decode_header,
    encode_entries,
    is_protective,
    protective_mbr,
)

BLOCKS = 2048
DISK = UUID("11111111-2222-4333-8444-555555555555")


def header(**changes: int) -> Header:
    whole = Header(1, BLOCKS - 1, 34, BLOCKS - 34, DISK, 2, 128, 128, 0)
    return replace(whole, **changes)  # type: ignore[arg-type]


def backup(**changes: int) -> Header:
    return header(**{"my_lba": BLOCKS - 1, "alternate_lba": 1, "entries_lba": BLOCKS - 33, **changes})


def entry(first: int, last: int, **changes: object) -> Entry:
    return replace(Entry(SPDK_TYPE, uuid4(), first, last), **changes)  # type: ignore[arg-type]


def decode(block: bytes, lba: int = 1, block_size: int = 512) -> Header:
    return decode_header(block.ljust(block_size, b"\0"), lba=lba, block_size=block_size, num_blocks=BLOCKS)


def table(*entries: Entry, of: Header | None = None) -> Table:
    whole = Header.over(of or header(), entries)
    return decode_entries(whole, encode_entries(whole, entries))


def test_a_header_decodes_to_what_was_encoded() -> None:
    assert decode(header().encode()) == header()
    assert decode(backup().encode(), BLOCKS - 1) == backup()
    assert decode(header(header_bytes=512).encode()) == header(header_bytes=512)


REFUSALS = [
    (header(my_lba=2), 1, "my LBA 2: 1, where it was found"),
    (header(alternate_lba=0), 1, "alternate LBA 0: 1 to 2047, and not 1"),
    (header(alternate_lba=1), 1, "alternate LBA 1: 1 to 2047, and not 1"),
    (header(alternate_lba=BLOCKS), 1, "alternate LBA 2048: 1 to 2047, and not 1"),
    (header(alternate_lba=100), 1, "alternate LBA 100: not from 34 to 2014, which are usable"),
    (backup(alternate_lba=5), BLOCKS - 1, "alternate LBA 5 of a backup: 1"),
    (header(first_usable_lba=1), 1, "usable LBAs 1 to 2014: 2 to 2047"),
    (header(first_usable_lba=2015), 1, "usable LBAs 2015 to 2014: 2 to 2047"),
    (header(last_usable_lba=2**64 - 1), 1, f"usable LBAs 34 to {2**64 - 1}: 2 to 2047"),
    (header(entry_bytes=0), 1, "entry size 0: a power of two from 128 to 4096"),
    (header(entry_bytes=192), 1, "entry size 192: a power of two from 128 to 4096"),
    (header(entry_bytes=2**31), 1, f"entry size {2**31}: a power of two from 128 to 4096"),
    (header(entry_count=0), 1, "number of entries 0: 1 to 4096"),
    (header(entry_count=2**32 - 1), 1, f"number of entries {2**32 - 1}: 1 to 4096"),
    (header(entry_count=4096, entry_bytes=4096), 1, "entries of 16777216 bytes: up to 1048576"),
    (header(entries_lba=1), 1, "entries at LBAs 1 to 32: 2 to 2047"),
    (header(entries_lba=3), 1, "entries at LBAs 3 to 34: not from 34 to 2014, which are usable"),
    (header(entries_lba=2**64 - 1), 1, f"entries at LBAs {2**64 - 1} to {2**64 + 30}: 2 to 2047"),
    (backup(entries_lba=BLOCKS - 32), BLOCKS - 1, "entries at LBAs 2016 to 2047: not over the header at 2047"),
    (header(revision=0x00020000), 1, "revision 0x20000: 0x10000"),
    (header(header_bytes=1024), 1, "header size 1024: 92 to 512"),
]


@pytest.mark.parametrize(("hostile", "lba", "why"), REFUSALS)
def test_a_header_whose_crc_is_right_and_whose_fields_lie_is_refused_by_name(hostile: Header, lba: int, why: str) -> None:
    with pytest.raises(GptError) as refused:
        decode(hostile.encode()[:512], lba)
    assert str(refused.value) == why


def test_a_header_without_signature_or_with_a_lying_crc_is_refused() -> None:
    whole = header().encode()
    with pytest.raises(GptError, match="signature b'EFI PARX'"):
        decode(b"EFI PARX" + whole[8:])
    with pytest.raises(GptError, match="header CRC 0x00000007: 0x"):
        decode(whole[:16] + struct.pack("<I", 7) + whole[20:])
    small = whole[:12] + struct.pack("<I", 91) + whole[16:]
    with pytest.raises(GptError, match="header size 91: 92 to 512"):
        decode(small)


def test_entries_with_a_lying_crc_or_too_few_bytes_are_refused() -> None:
    whole = Header.over(header(), [entry(40, 50)])
    array = encode_entries(whole, [entry(40, 50)])
    with pytest.raises(GptError, match="entries' CRC"):
        decode_entries(whole, array)
    with pytest.raises(GptError, match="entries: 16383 bytes of 16384"):
        decode_entries(whole, array[:-1])


def test_entries_are_those_that_are_used_with_their_numbers() -> None:
    unused = Entry(UUID(int=0), UUID(int=0), 0, 0)
    first, third = entry(40, 49, name="Wörld\U0001f30d", attributes=5), entry(50, 50)
    found = table(first, unused, third)
    assert found.entries == ((0, first), (2, third))
    assert (found.refused, first.num_blocks, third.num_blocks) == ((), 10, 1)


@pytest.mark.parametrize("size", [128, 256, 4096])
def test_larger_entries_are_read_by_their_beginning(size: int) -> None:
    whole = header(entry_bytes=size, entry_count=8, first_usable_lba=100)
    assert [number for number, _ in table(entry(100, 110), entry(111, 120), of=whole).entries] == [0, 1]


def test_an_entry_that_is_wrong_is_refused_alone() -> None:
    good = entry(1000, 1999)
    found = table(entry(33, 40), entry(50, 49), entry(60, 2**64 - 1), good, entry(2015, 2015), entry(0, 0))
    assert found.entries == ((3, good),)
    assert dict(found.refused) == {
        0: "LBAs 33 to 40: within 34 to 2014",
        1: "LBAs 50 to 49: within 34 to 2014",
        2: f"LBAs 60 to {2**64 - 1}: within 34 to 2014",
        4: "LBAs 2015 to 2015: within 34 to 2014",
        5: "LBAs 0 to 0: within 34 to 2014",
    }


def test_entries_that_overlap_are_refused_both() -> None:
    outer, inner, last, apart = entry(100, 500), entry(200, 210), entry(500, 600), entry(601, 700)
    found = table(inner, outer, last, apart)
    assert found.entries == ((3, apart),)
    assert dict(found.refused) == {
        0: "LBAs 200 to 210 overlap entry 2",
        1: "LBAs 100 to 500 overlap entry 1",
        2: "LBAs 500 to 600 overlap entry 2",
    }


def test_entries_of_one_guid_are_refused_both() -> None:
    twin = entry(100, 110)
    found = table(twin, entry(120, 130), replace(twin, first_lba=200, last_lba=210))
    assert [number for number, _ in found.entries] == [1]
    assert dict(found.refused) == {
        0: f"unique GUID {twin.unique_guid} is that of entry 3",
        2: f"unique GUID {twin.unique_guid} is that of entry 1",
    }


def test_a_protective_mbr_says_so() -> None:
    assert is_protective(protective_mbr(BLOCKS))
    assert is_protective(protective_mbr(2**40))
    assert not is_protective(bytes(512))
    assert not is_protective(b"\x55\xaa")
    plain = bytearray(protective_mbr(BLOCKS))
    plain[450] = 0x83
    assert not is_protective(bytes(plain))
    hybrid = bytes(plain[:462]) + protective_mbr(BLOCKS)[446:462] + bytes(plain[478:])
    assert is_protective(hybrid), "any of the four entries"


numbers = st.integers(0, 2**64 - 1) | st.integers(0, BLOCKS)
entries_made = st.builds(
    Entry, st.uuids() | st.just(SPDK_TYPE), st.uuids(), numbers, numbers, st.integers(0, 2**64 - 1), st.text(max_size=40)
)


@given(entries_made)
def test_an_entry_decodes_to_what_was_encoded_or_to_its_cut_name(one: Entry) -> None:
    again = Entry.decode(one.encode())
    assert replace(again, name="") == replace(one, name="")
    assert Entry.decode(again.encode()) == again


@given(st.lists(entries_made, max_size=12))
def test_what_is_not_refused_is_usable_and_apart(entries: list[Entry]) -> None:
    found = table(*entries)
    used = sorted((entry.first_lba, entry.last_lba) for _, entry in found.entries)
    assert all(34 <= first <= last <= BLOCKS - 34 for first, last in used)
    assert all(before[1] < after[0] for before, after in pairwise(used))
    named = {number for number, _ in found.entries} | {number for number, _ in found.refused}
    assert named == {number for number, entry in enumerate(entries) if entry.type_guid.int}


@given(st.binary(max_size=600), st.sampled_from([512, 4096, 65536]), numbers, numbers)
def test_any_bytes_are_a_header_or_refused(data: bytes, block_size: int, lba: int, num_blocks: int) -> None:
    for block in (data, b"EFI PART" + data, _signed(b"EFI PART\0\0\x01\0" + struct.pack("<I", 92) + data)):
        try:
            found = decode_header(block, lba=lba, block_size=block_size, num_blocks=num_blocks)
        except GptError:
            continue
        start, blocks = found.array(block_size)
        assert start + blocks <= num_blocks
        assert found.array_bytes <= 1 << 20


def _signed(block: bytes) -> bytes:
    """With a header CRC that is right, so that the fields are looked at."""
    block = block.ljust(92, b"\0")
    return block[:16] + struct.pack("<I", crc32(block[:16] + bytes(4) + block[20:92])) + block[20:]


@given(st.integers(0, 92 * 8 - 1), st.booleans())
def test_a_bit_that_flips_in_a_header_is_noticed(bit: int, primary: bool) -> None:
    whole, lba = (header(), 1) if primary else (backup(), BLOCKS - 1)
    block = bytearray(whole.encode())
    block[bit // 8] ^= 1 << bit % 8
    # Only the four bytes behind the CRC are reserved, and they count too.
    with pytest.raises(GptError):
        decode(bytes(block), lba)


@given(st.integers(0, 128 * 128 * 8 - 1))
def test_a_bit_that_flips_in_the_entries_is_noticed(bit: int) -> None:
    entries = [entry(40, 50), entry(60, 70)]
    whole = Header.over(header(), entries)
    array = bytearray(encode_entries(whole, entries))
    array[bit // 8] ^= 1 << bit % 8
    with pytest.raises(GptError, match="entries' CRC"):
        decode_entries(whole, bytes(array))


def test_every_beginning_of_a_header_is_refused_or_the_same() -> None:
    whole = header().encode()
    for length in range(len(whole)):
        with pytest.raises(GptError):
            decode_header(whole[:length], lba=1, block_size=512, num_blocks=BLOCKS)
