"""Finds out from a disk's image whether an acknowledged write was lost, or done again after it was acknowledged.

A program in the guest (jobs/records.py) writes records to blocks that it uses once each; a record says which records of all writers had
been acknowledged before it was written. So the image alone tells: what any record calls acknowledged must be there. `Records.look` holds the image
against that, and then erases, in the image, what was acknowledged: nobody may write that block again. If its record is back at
the next look, then a write was done after its acknowledgement: a successor took up what its predecessor had answered.
The image may only be looked at while no server has it open.
"""

import struct
import zlib
from pathlib import Path

BLOCK_BYTES = 512
MAGIC = b"QPRECORD"


class Records:
    """The blocks of ``writers`` in ``image``, ``blocks`` each, from its start."""

    def __init__(self, image: Path, writers: int, blocks: int) -> None:
        self.image = image
        self.writers = writers
        self.blocks = blocks
        self.erased = [0] * writers
        """Of each writer, how many records were acknowledged, and are erased."""

    @property
    def image_bytes(self) -> int:
        return self.writers * self.blocks * BLOCK_BYTES

    def grew(self) -> bool:
        """Whether a record was written since the last look; also while a server has the image open."""
        with self.image.open("rb") as file:
            for writer, count in enumerate(self.erased):
                file.seek((writer * self.blocks + count) * BLOCK_BYTES)
                if file.read(8) == MAGIC:
                    return True
        return False

    def look(self, acknowledged: list[int] | None = None) -> int:
        """Checks everything; ``acknowledged``: what the guest itself says, at the end. How many more records were acknowledged since the last look."""
        with self.image.open("r+b") as file:
            found = {}
            for writer in range(self.writers):
                file.seek(writer * self.blocks * BLOCK_BYTES)
                content = file.read(self.blocks * BLOCK_BYTES)
                for index in range(self.blocks):
                    block = content[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                    if block[:8] == MAGIC:
                        found[writer, index + 1] = self._told_by(block, writer, index + 1)
                    else:
                        assert not any(block), f"writer {writer}, record {index + 1}: neither a record nor empty"
                    if index >= self.erased[writer] + 1 and not any(block):
                        break  # written in order, so nothing comes any more
            known = [max(counts) for counts in zip(self.erased, acknowledged or self.erased, *found.values(), strict=True)]
            for writer, sequence in found:
                assert sequence > self.erased[writer], f"writer {writer}, record {sequence}: written again after it was acknowledged"
            for writer in range(self.writers):
                for sequence in range(self.erased[writer] + 1, known[writer] + 1):
                    assert (writer, sequence) in found, f"writer {writer}, record {sequence}: acknowledged and lost"
                    file.seek((writer * self.blocks + sequence - 1) * BLOCK_BYTES)
                    file.write(bytes(BLOCK_BYTES))
        more = sum(known) - sum(self.erased)
        self.erased = known
        return more

    def _told_by(self, block: bytes, writer: int, sequence: int) -> list[int]:
        (checksum,) = struct.unpack_from("<I", block, 8)
        body = block[12:]
        assert zlib.crc32(body) == checksum, f"writer {writer}, record {sequence}: torn"
        found = struct.unpack_from(f"<IQ{self.writers}Q", body)
        assert found[:2] == (writer, sequence), f"writer {writer}, record {sequence}: holds record {found[1]} of writer {found[0]}"
        return list(found[2:])
