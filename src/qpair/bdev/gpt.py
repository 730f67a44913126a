"""GUID partition tables: header, entries and the protective MBR, as bytes and as objects. No I/O.

Spec: UEFI 2.10, chapter 5. How it works: whoever has a disk reads block 0 (`is_protective`), the header at `PRIMARY_LBA` (`decode_header`), and the blocks that it
names (`Header.array`), and gives them to `decode_entries`. If any of it is refused, the same with the disk's last block. What a table says is never
believed for its CRC alone: whoever wrote it may be hostile.

Errors: `GptError` names the field, the value and the limit. A header or array that is wrong refuses the table. An entry that is wrong (outside what the header calls
usable, ending before it begins, overlapping another one, of a GUID that another one has) is refused alone: `Table.refused`.

Not implemented: writing a table to a disk; ``encode`` is there for tests and for who makes images.

Limits: `ENTRIES_MAX` entries and `ARRAY_BYTES_MAX` bytes of them (a usual table has 128 and 16 KiB); blocks of 512 to 65536 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID
from zlib import crc32

__all__ = [
    "OLD_SPDK_TYPE",
    "PRIMARY_LBA",
    "SPDK_TYPE",
    "Entry",
    "GptError",
    "Header",
    "Table",
    "decode_entries",
    "decode_header",
    "is_protective",
]

SPDK_TYPE: Final = UUID("6527994e-2c5a-4eec-9613-8f5944074e8b")
"""The type of partitions that SPDK makes bdevs of."""
OLD_SPDK_TYPE: Final = UUID("7c5222bd-8f5d-4087-9c00-bf9843c7b58c")
"""The same, of before; bdevs of such ones are one block smaller than the partition, and must stay so."""
UNUSED: Final = UUID(int=0)

PRIMARY_LBA: Final = 1
ENTRIES_MAX: Final = 4096
ENTRY_BYTES: Final = 128
ENTRY_BYTES_MAX: Final = 4096
ARRAY_BYTES_MAX: Final = 1 << 20

SIGNATURE: Final = b"EFI PART"
REVISION: Final = 0x00010000
_HEADER: Final = struct.Struct("<8sIII4xQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_MBR_SIGNATURE: Final = b"\x55\xaa"
_MBR_ENTRY: Final = struct.Struct("<4xB3xII")
_PROTECTIVE: Final = 0xEE


class GptError(ValueError):
    """What makes a table, or an entry, none."""


def is_protective(block: bytes) -> bool:
    """Whether a disk's first block says that a GUID partition table follows. It says so on a disk that was made larger, too."""
    if block[510:512] != _MBR_SIGNATURE:
        return False
    entries = (_MBR_ENTRY.unpack_from(block, 446 + 16 * number) for number in range(4))
    return any(kind == _PROTECTIVE and start == PRIMARY_LBA for kind, start, _ in entries)


def protective_mbr(num_blocks: int) -> bytes:
    """The first 512 bytes of a partitioned disk."""
    entry = _MBR_ENTRY.pack(_PROTECTIVE, PRIMARY_LBA, min(num_blocks - 1, 0xFFFFFFFF))
    return bytes(446) + entry + bytes(48) + _MBR_SIGNATURE


@dataclass(frozen=True, slots=True)
class Entry:
    """One partition. ``last_lba`` belongs to it."""

    type_guid: UUID
    unique_guid: UUID
    first_lba: int
    last_lba: int
    attributes: int = 0
    name: str = ""

    @property
    def num_blocks(self) -> int:
        """Its size."""
        return self.last_lba - self.first_lba + 1

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """Of its first 128 bytes. Any bytes are some entry."""
        kind, unique, first, last, attributes, name = _ENTRY.unpack_from(data)
        # Up to the first NUL unit, which lies at an even place.
        end = next((at for at in range(0, len(name), 2) if name[at : at + 2] == b"\0\0"), len(name))
        return cls(UUID(bytes_le=kind), UUID(bytes_le=unique), first, last, attributes, name[:end].decode("utf-16-le", "replace"))

    def encode(self) -> bytes:
        """128 bytes; a name that is too long is cut."""
        name = self.name.encode("utf-16-le")[:72].ljust(72, b"\0")
        return _ENTRY.pack(self.type_guid.bytes_le, self.unique_guid.bytes_le, self.first_lba, self.last_lba, self.attributes, name)


@dataclass(frozen=True, slots=True)
class Header:
    """Where a table is, of which disk, and where its entries are. ``crc`` of the entries."""

    my_lba: int
    alternate_lba: int
    first_usable_lba: int
    last_usable_lba: int
    disk_guid: UUID
    entries_lba: int
    entry_count: int
    entry_bytes: int
    entries_crc: int
    revision: int = REVISION
    header_bytes: int = _HEADER.size

    @property
    def array_bytes(self) -> int:
        """All entries."""
        return self.entry_count * self.entry_bytes

    def array(self, block_size: int) -> tuple[int, int]:
        """First block and number of blocks of the entries."""
        return self.entries_lba, -(-self.array_bytes // block_size)

    def encode(self) -> bytes:
        """With a CRC that is right."""
        fields = (
            *(self.my_lba, self.alternate_lba, self.first_usable_lba, self.last_usable_lba),
            *(self.disk_guid.bytes_le, self.entries_lba, self.entry_count, self.entry_bytes, self.entries_crc),
        )
        bare = _HEADER.pack(SIGNATURE, self.revision, self.header_bytes, 0, *fields).ljust(self.header_bytes, b"\0")
        return bare[:16] + struct.pack("<I", crc32(bare)) + bare[20:]

    @classmethod
    def over(cls, header: Header, entries: Sequence[Entry]) -> Header:
        """As ``header``, for these entries."""
        return replace(header, entries_crc=crc32(encode_entries(header, entries)))


@dataclass(frozen=True, slots=True)
class Table:
    """``entries`` by number from 0: those that can be used. ``refused``: those that cannot, and why."""

    header: Header
    entries: tuple[tuple[int, Entry], ...]
    refused: tuple[tuple[int, str], ...] = ()


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise GptError(what)


def decode_header(block: bytes, *, lba: int, block_size: int, num_blocks: int) -> Header:
    """Of the block at ``lba`` of a disk of that geometry."""
    _demand(len(block) >= min(block_size, 512), f"header: {len(block)} bytes of a block of {block_size}")
    signature, revision, size, crc, my_lba, alternate, first, last, guid, entries, count, entry_size, entries_crc = _HEADER.unpack_from(
        block
    )
    _demand(signature == SIGNATURE, f"signature {signature!r}: {SIGNATURE!r}")
    _demand(revision >> 16 == REVISION >> 16, f"revision {revision:#x}: {REVISION:#x}")
    limit = min(block_size, len(block))
    _demand(_HEADER.size <= size <= limit, f"header size {size}: {_HEADER.size} to {limit}")
    found = crc32(block[:16] + bytes(4) + block[20:size])
    _demand(found == crc, f"header CRC {crc:#010x}: {found:#010x}")
    header = Header(my_lba, alternate, first, last, UUID(bytes_le=guid), entries, count, entry_size, entries_crc, revision, size)
    _check_place(header, lba, num_blocks)
    _check_array(header, block_size, num_blocks)
    return header


def _check_place(header: Header, lba: int, num_blocks: int) -> None:
    _demand(header.my_lba == lba, f"my LBA {header.my_lba}: {lba}, where it was found")
    _demand(
        0 < header.alternate_lba < num_blocks and header.alternate_lba != lba,
        f"alternate LBA {header.alternate_lba}: 1 to {num_blocks - 1}, and not {lba}",
    )
    _demand(lba == PRIMARY_LBA or header.alternate_lba == PRIMARY_LBA, f"alternate LBA {header.alternate_lba} of a backup: {PRIMARY_LBA}")
    first, last = header.first_usable_lba, header.last_usable_lba
    _demand(PRIMARY_LBA < first <= last < num_blocks, f"usable LBAs {first} to {last}: {PRIMARY_LBA + 1} to {num_blocks - 1}")
    for what, place in (("my", header.my_lba), ("alternate", header.alternate_lba)):
        _demand(not first <= place <= last, f"{what} LBA {place}: not from {first} to {last}, which are usable")


def _check_array(header: Header, block_size: int, num_blocks: int) -> None:
    size, count = header.entry_bytes, header.entry_count
    legal = ENTRY_BYTES <= size <= ENTRY_BYTES_MAX and size & (size - 1) == 0
    _demand(legal, f"entry size {size}: a power of two from {ENTRY_BYTES} to {ENTRY_BYTES_MAX}")
    _demand(0 < count <= ENTRIES_MAX, f"number of entries {count}: 1 to {ENTRIES_MAX}")
    _demand(header.array_bytes <= ARRAY_BYTES_MAX, f"entries of {header.array_bytes} bytes: up to {ARRAY_BYTES_MAX}")
    start, blocks = header.array(block_size)
    end = start + blocks
    _demand(start > PRIMARY_LBA and end <= num_blocks, f"entries at LBAs {start} to {end - 1}: {PRIMARY_LBA + 1} to {num_blocks - 1}")
    apart = end <= header.first_usable_lba or start > header.last_usable_lba
    _demand(
        apart, f"entries at LBAs {start} to {end - 1}: not from {header.first_usable_lba} to {header.last_usable_lba}, which are usable"
    )
    _demand(not start <= header.my_lba < end, f"entries at LBAs {start} to {end - 1}: not over the header at {header.my_lba}")


def encode_entries(header: Header, entries: Sequence[Entry]) -> bytes:
    """The array, filled up with unused entries."""
    return b"".join(entry.encode().ljust(header.entry_bytes, b"\0") for entry in entries).ljust(header.array_bytes, b"\0")


def decode_entries(header: Header, data: bytes) -> Table:
    """Of the blocks that ``header.array`` names."""
    _demand(len(data) >= header.array_bytes, f"entries: {len(data)} bytes of {header.array_bytes}")
    array = data[: header.array_bytes]
    found = crc32(array)
    _demand(found == header.entries_crc, f"entries' CRC {header.entries_crc:#010x}: {found:#010x}")
    size = header.entry_bytes
    used = [
        (number, Entry.decode(array[number * size : number * size + ENTRY_BYTES]))
        for number in range(header.entry_count)
        if any(array[number * size : number * size + 16])
    ]
    return _judge(header, used)


def _judge(header: Header, used: list[tuple[int, Entry]]) -> Table:
    first, last = header.first_usable_lba, header.last_usable_lba
    refused: dict[int, str] = {}
    good: list[tuple[int, Entry]] = []
    for number, entry in used:
        if first <= entry.first_lba <= entry.last_lba <= last:
            good.append((number, entry))
        else:
            refused[number] = f"LBAs {entry.first_lba} to {entry.last_lba}: within {first} to {last}"
    _refuse_overlaps(good, refused)
    _refuse_twins(good, refused)
    entries = tuple((number, entry) for number, entry in good if number not in refused)
    return Table(header, entries, tuple(sorted(refused.items())))


def _refuse_overlaps(good: list[tuple[int, Entry]], refused: dict[int, str]) -> None:
    """Both of any two: which of them is right cannot be told."""
    furthest: tuple[int, Entry] | None = None
    for number, entry in sorted(good, key=lambda item: item[1].first_lba):
        if furthest is not None and entry.first_lba <= furthest[1].last_lba:
            refused[number] = f"LBAs {entry.first_lba} to {entry.last_lba} overlap entry {furthest[0] + 1}"
            refused.setdefault(furthest[0], f"LBAs {furthest[1].first_lba} to {furthest[1].last_lba} overlap entry {number + 1}")
        if furthest is None or entry.last_lba > furthest[1].last_lba:
            furthest = (number, entry)


def _refuse_twins(good: list[tuple[int, Entry]], refused: dict[int, str]) -> None:
    seen: dict[UUID, int] = {}
    for number, entry in good:
        if (other := seen.setdefault(entry.unique_guid, number)) != number:
            refused.setdefault(number, f"unique GUID {entry.unique_guid} is that of entry {other + 1}")
            refused.setdefault(other, f"unique GUID {entry.unique_guid} is that of entry {number + 1}")
