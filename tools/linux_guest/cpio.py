"""Writes the "newc" cpio archives that Linux unpacks as its initramfs.

Archives may follow one another; a later file replaces an earlier one of the same name. That is how each boot
brings its own scripts without rebuilding the base image.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

REGULAR = 0o100000
DIRECTORY = 0o040000
SYMLINK = 0o120000


@dataclass(frozen=True)
class Entry:
    name: str
    data: bytes = b""
    mode: int = REGULAR | 0o755


def directory(name: str) -> Entry:
    return Entry(name, mode=DIRECTORY | 0o755)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, target.encode(), SYMLINK | 0o777)


def archive(entries: Iterable[Entry]) -> bytes:
    """One archive, padded so that another can follow it."""
    out = bytearray()
    for inode, entry in enumerate(chain(entries, [Entry("TRAILER!!!", mode=0)]), start=1):
        for part in _encode(entry, inode):
            out += part
            out += bytes(-len(out) % 4)
    return bytes(out)


def _encode(entry: Entry, inode: int) -> Iterator[bytes]:
    name = entry.name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    yield b"070701" + b"".join(b"%08X" % field for field in fields) + name
    yield entry.data
