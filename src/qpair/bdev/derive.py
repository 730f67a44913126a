"""UUIDs that follow from what a bdev stands on, so that they are the same whenever it is made again: those that SPDK gives."""

from __future__ import annotations

import struct
from hashlib import sha1
from uuid import UUID

__all__ = ["delay_uuid", "part_uuid", "zone_block_uuid"]

_DELAY = UUID("4009b574-6430-4f1b-bc40-ace811091027")
_PART = UUID("976b899e-3e1e-4d71-ab69-c2b08e9df8b8")
_ZONE_BLOCK = UUID("5f3f485a-d6bb-4443-9de7-023683b77389")


def _derived(namespace: UUID, data: bytes) -> str:
    """RFC 4122, 4.3: version 5, of a binary name."""
    return str(UUID(bytes=sha1(namespace.bytes + data, usedforsecurity=False).digest()[:16], version=5))


def delay_uuid(base: str) -> str:
    """Of a delay on the bdev with UUID ``base``."""
    return _derived(_DELAY, UUID(base).bytes)


def zone_block_uuid(base: str) -> str:
    """Of a zone_block on the bdev with UUID ``base``."""
    return _derived(_ZONE_BLOCK, UUID(base).bytes)


def part_uuid(base: str, offset_blocks: int, num_blocks: int) -> str:
    """Of a range of the bdev with UUID ``base``."""
    return _derived(_PART, UUID(base).bytes + struct.pack("<QQ", offset_blocks, num_blocks))
