"""In the guest: writes records to a disk, each of which says what was acknowledged before it was written. See interop/records.py.

``records.py DEVICE WRITERS BLOCKS STOP``: each of WRITERS threads has BLOCKS blocks of its own, writes them in order, one at a time, and ends when the
file STOP appears or its blocks are used up. Prints ``WRITER ACKNOWLEDGED`` a line. A write that fails ends it with the error.
"""

import mmap
import os
import struct
import sys
import threading
import zlib

BLOCK_BYTES = 512
MAGIC = b"QPRECORD"


def write_all(fd, writer, acknowledged, blocks, stop):
    buffer = mmap.mmap(-1, mmap.PAGESIZE)
    while acknowledged[writer] < blocks and not os.path.exists(stop):
        sequence = acknowledged[writer] + 1
        body = struct.pack(f"<IQ{len(acknowledged)}Q", writer, sequence, *acknowledged).ljust(BLOCK_BYTES - 12, b"\0")
        buffer[:BLOCK_BYTES] = MAGIC + struct.pack("<I", zlib.crc32(body)) + body
        with memoryview(buffer) as view, view[:BLOCK_BYTES] as block:
            done = os.pwritev(fd, [block], (writer * blocks + sequence - 1) * BLOCK_BYTES)
        if done != BLOCK_BYTES:
            raise OSError(f"writer {writer}, record {sequence}: {done} bytes were written")
        acknowledged[writer] = sequence


def main(device, writers, blocks, stop):
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    acknowledged = [0] * writers
    failed = []

    def run(writer):
        try:
            write_all(fd, writer, acknowledged, blocks, stop)
        except OSError as error:
            failed.append(f"writer {writer}: {error}")

    threads = [threading.Thread(target=run, args=(writer,)) for writer in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer, count in enumerate(acknowledged):
        print(writer, count)
    sys.exit("; ".join(failed) or 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
