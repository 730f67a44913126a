"""The programs of docs/python-bdevs.md, as they stand there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import re
import shutil
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qpair.errors import QpairError

DOCS = Path(__file__).parents[2] / "docs" / "python-bdevs.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def nobody_else_looks(request: pytest.FixtureRequest) -> None:
    """Modules that know bdevs by their content would read each that appears."""
    if "stack" in request.fixturenames:
        request.getfixturevalue("stack").bdevs.examiner.auto = False


def program(name: str) -> Any:
    """The class of that name, out of the text."""
    (text,) = [text for text in PROGRAMS if f"class {name}(" in text]
    names: dict[str, Any] = {"__name__": f"docs_{name}"}
    exec(compile(text, f"{DOCS}:{name}", "exec"), names)
    return names[name]


def test_each_program_is_some_thirty_lines() -> None:
    lengths = [len([line for line in text.splitlines() if line.strip()]) for text in PROGRAMS]
    assert len(lengths) == 3
    assert all(20 <= length <= 50 for length in lengths), lengths


async def test_the_compressed_disk(stack: Any) -> None:
    zip0 = program("Compressed")("zip0", "64MiB")
    await stack.add(zip0)
    rng = random.Random(5)
    async with await stack.open("zip0") as disk:
        data = (b"compressible " * 40000)[: 300 * 1024]
        await disk.write(8192, data)
        noise = rng.randbytes(4096)
        await disk.write(1 << 20, noise)
        assert await disk.read(8192, len(data)) == data
        assert await disk.read(1 << 20, 4096) == noise
        assert await disk.read(32 << 20, 1 << 20) == bytes(1 << 20)
        assert len(zip0.blocks) == 76
        assert sum(map(len, zip0.blocks.values())) < 20_000
        await disk.unmap(8192, 300 * 1024)
        await disk.write_zeroes(1 << 20, 4096)
        assert zip0.blocks == {}
        assert await disk.read(8192, 4096) == bytes(4096)


@contextlib.asynccontextmanager
async def nbdkit(*words: str) -> AsyncIterator[int]:
    """nbdkit on a port of the loopback device."""
    with contextlib.closing(__import__("socket").socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec("nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *words)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            await asyncio.sleep(0.02)
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed: `make test` installs it (tools/setup-apt.sh)")
async def test_the_network_disk_on_nbdkit(stack: Any) -> None:
    async with nbdkit("memory", "4M") as port:
        handle = await stack.add(program("Nbd")("net0", "127.0.0.1", port))
        assert handle.size_bytes == 4 << 20
        data = random.Random(6).randbytes(1 << 20)
        async with await stack.open("net0") as disk:
            await asyncio.gather(*(disk.write(at, data[at : at + 65536]) for at in range(0, 1 << 20, 65536)))
            await disk.flush()
            assert b"".join(await asyncio.gather(*(disk.read(at, 4096) for at in range(0, 1 << 20, 4096)))) == data
        await stack.delete("net0")


async def test_the_network_disk_on_a_server_that_fails_and_goes(stack: Any) -> None:
    """A server of our own: an errno of its arrives, answers come in another order, and what waits when it goes fails."""
    gone: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gone.append(writer)
        writer.write(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        _, _, _, length = struct.unpack(">I8sII", await reader.readexactly(20))
        await reader.readexactly(length)
        writer.write(struct.pack(">QH", 2 << 20, 1))
        late: list[bytes] = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                _, _, _, cookie, offset, length = struct.unpack(">IHHQQI", await reader.readexactly(28))
                answer = struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes([offset // 512 % 256]) * length
                if offset == 512:
                    writer.write(struct.pack(">IIQ", 0x67446698, errno.ENOSPC, cookie))
                elif offset == 1024:
                    pass  # never
                elif len(late) < 2:
                    late.append(answer)
                else:
                    writer.write(b"".join([answer, *reversed(late)]))
                    late.clear()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        await stack.add(program("Nbd")("net0", "127.0.0.1", server.sockets[0].getsockname()[1]))
        async with await stack.open("net0") as disk:
            answers = await asyncio.gather(*(disk.read(512 * number, 512) for number in (7, 8, 9)))
            assert answers == [bytes([number]) * 512 for number in (7, 8, 9)]
            with pytest.raises(QpairError) as refused:
                await disk.read(512, 512)
            assert refused.value.errno == errno.ENOSPC
            waiting = asyncio.ensure_future(disk.read(1024, 512))
            await asyncio.sleep(0.05)
            gone[0].close()
            with pytest.raises(QpairError) as lost:
                await asyncio.wait_for(waiting, 5)
            assert lost.value.errno == errno.EIO
        await stack.delete("net0")


async def test_the_fault_injector(stack: Any) -> None:
    await stack.malloc("disk0", "1MiB")
    faults = program("Faults")("bad0", fail_every=10, slow_at=4096, seconds=0.05)
    await stack.filter("disk0", faults)
    async with await stack.open("bad0") as disk:
        await disk.write(0, b"a" * 8192)
        outcomes = await asyncio.gather(*(disk.read(65536, 512) for _ in range(30)), return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, QpairError)]
        assert [failure.errno for failure in failed] == [errno.EIO] * 3
        before = time.monotonic()
        assert await disk.read(4096, 512) == b"`" + b"a" * 511
        assert time.monotonic() - before >= 0.05
        assert await disk.read(4608, 512) == b"a" * 512
    assert faults.seen["write"] >= 1
    assert faults.seen["read"] == 32


async def test_the_compressed_disk_in_a_process(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = [text for text in PROGRAMS if "class Compressed(" in text]
    (tmp_path / "mymodule.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    await stack.rpc("qpair_python_create", name="zip0", size="1GiB", **{"class": "mymodule:Compressed"})
    async with await stack.open("zip0") as disk:
        await disk.write(512 << 20, b"z" * 65536)
        assert await disk.read(512 << 20, 65536) == b"z" * 65536
