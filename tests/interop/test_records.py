"""What finds lost and doubled writes, against images in which there are some."""

import subprocess
import sys
from pathlib import Path

import pytest

from interop.records import BLOCK_BYTES, Records

PROGRAM = Path(__file__).parent / "jobs" / "records.py"
WRITERS, BLOCKS = 3, 20


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """All blocks written, all acknowledged but the last of each writer."""
    made = Records(tmp_path / "image", WRITERS, BLOCKS)
    with made.image.open("wb") as image:
        image.truncate(made.image_bytes)
    command = [sys.executable, str(PROGRAM), str(made.image), str(WRITERS), str(BLOCKS), str(tmp_path / "never")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.split("\n")[:WRITERS] == [f"{writer} {BLOCKS}" for writer in range(WRITERS)]
    return made


def put(records: Records, writer: int, sequence: int, block: bytes) -> bytes:
    """Replaces a block; what was there."""
    with records.image.open("r+b") as image:
        place = (writer * BLOCKS + sequence - 1) * BLOCK_BYTES
        image.seek(place)
        before = image.read(BLOCK_BYTES)
        image.seek(place)
        image.write(block)
    return before


def test_a_disk_that_keeps_its_word_passes_every_look(records: Records) -> None:
    assert records.grew()
    assert records.look() >= WRITERS * (BLOCKS - 2)
    assert records.look([BLOCKS] * WRITERS) <= 2 * WRITERS
    assert not records.grew()
    assert records.look() == 0


def test_an_acknowledged_write_that_is_not_there_is_found(records: Records) -> None:
    put(records, 1, 7, bytes(BLOCK_BYTES))
    with pytest.raises(AssertionError, match="writer 1, record 7: acknowledged and lost"):
        records.look()


def test_a_write_that_is_done_after_its_acknowledgement_is_found(records: Records) -> None:
    block = put(records, 2, 3, bytes(BLOCK_BYTES))
    put(records, 2, 3, block)
    records.look()
    put(records, 2, 3, block)
    with pytest.raises(AssertionError, match="writer 2, record 3: written again after it was acknowledged"):
        records.look()


@pytest.mark.parametrize(("at", "message"), [(300, "torn"), (2, "neither a record nor empty")])
def test_a_block_that_is_no_whole_record_is_found(records: Records, at: int, message: str) -> None:
    block = bytearray(put(records, 0, 5, bytes(BLOCK_BYTES)))
    block[at] ^= 1
    put(records, 0, 5, bytes(block))
    with pytest.raises(AssertionError, match=f"writer 0, record 5: {message}"):
        records.look()
