"""``qpair dd``: what arrives, what is not sent, what is refused, and how an interrupted copy goes on."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.conftest import Shell, Terminal
from qpair.cli.copy import Copy, make_plan
from qpair.cli.endpoints import End, open_file
from qpair.cli.targets import attach
from qpair.errors import InvalidArgument, IoFailed, NoSpace

MIB = 1 << 20


@pytest.fixture
def data() -> bytes:
    """Three and a half MiB and a bit: noise, a MiB of zeros, noise."""
    noise = random.Random(7)
    return noise.randbytes(MIB + 5000) + bytes(MIB) + noise.randbytes(MIB // 2 + 333)


async def dd(shell: Shell, *arguments: str) -> dict[str, Any]:
    code, out, err = await shell("dd", *arguments, "--json")
    assert (code, err) == (0, ""), out
    told: dict[str, Any] = json.loads(out)
    return told


async def disk(shell: Shell, name: str = "m0", size: int = 8 * MIB, block_size: int = 512) -> None:
    await shell.rpc("bdev_malloc_create", name=name, num_blocks=size // block_size, block_size=block_size)


async def test_a_file_comes_back_from_a_servers_bdev_as_it_went(shell: Shell, tmp_path: Path, data: bytes) -> None:
    source, back = tmp_path / "in", tmp_path / "out"
    source.write_bytes(data)
    await disk(shell, block_size=4096)
    told = await dd(shell, "--if", str(source), "--ob", "m0", "--bs", "128k", "--verify")
    padding = -len(data) % 4096
    assert (told["bytes"], told["padded_bytes"], told["zero_bytes"]) == (len(data), padding, 0)
    assert told["verified_bytes"] == len(data) + padding
    assert (told["input"], told["output"]) == (str(source), "m0")
    told = await dd(shell, "--ib", "m0", "--of", str(back), "--bs", "64k", "--sparse")
    assert back.read_bytes() == data + bytes(8 * MIB - len(data))
    assert told["bytes"] == 8 * MIB
    assert told["zero_bytes"] > 5 * MIB
    assert back.stat().st_blocks * 512 < 3 * MIB, "zeros became holes"
    assert await shell.rpc("vhost_get_controllers") == [], "what it exported is gone"


async def test_zeros_are_not_sent_to_bdevs(shell: Shell, tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "in"
    source.write_bytes(data)
    os.truncate(source, 6 * MIB)
    await disk(shell)
    await dd(shell, "--if", "/dev/urandom", "--ob", "m0", "--count", "8")
    before = (await shell.rpc("bdev_get_iostat", names=["m0"]))["bdevs"][0]
    for flag in ("--sparse", "--unmap"):
        told = await dd(shell, "--if", str(source), "--ob", "m0", flag, "--verify")
        assert told["zero_bytes"] > 3 * MIB
        assert told["verified_bytes"] == 6 * MIB
    after = (await shell.rpc("bdev_get_iostat", names=["m0"]))["bdevs"][0]
    assert after["num_unmap_ops"] > before["num_unmap_ops"]
    assert after["bytes_written"] - before["bytes_written"] < 2 * 3 * MIB


async def test_pipes_are_read_and_written_in_order(shell: Shell, qpair_command: list[str], tmp_path: Path, data: bytes) -> None:
    await disk(shell)
    command = " ".join(qpair_command)
    (tmp_path / "in").write_bytes(data)
    script = (
        f"cat {tmp_path}/in | {command} dd -r {shell.path} --if - --ob m0 --bs 64k --qd 32 --verify && "
        f"{command} dd -r {shell.path} --ib m0 --of - --bs 32k --qd 32 | head -c {len(data)} > {tmp_path}/out"
    )
    process = await asyncio.create_subprocess_shell(script, stderr=asyncio.subprocess.PIPE)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert (tmp_path / "out").read_bytes() == data, err
    assert b"verified" in err
    process = await asyncio.create_subprocess_exec(
        *qpair_command, "dd", "-r", shell.path, "--ib", "m0", "--of", "-", "--count", "1", "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert out == data[:MIB], "standard output carries data alone"
    assert json.loads(err)["bytes"] == MIB


async def test_from_one_vhost_socket_to_another(shell: Shell, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in").write_bytes(data)
    for name in ("a", "b"):
        await disk(shell, name)
        await shell.rpc("vhost_create_blk_controller", ctrlr=f"{name}.sock", dev_name=name)
    await dd(shell, "--if", str(tmp_path / "in"), "--of", str(tmp_path / "a.sock"))
    await dd(shell, "--if", f"vhost:{tmp_path}/a.sock", "--of", str(tmp_path / "b.sock"), "--verify")
    await dd(shell, "--ib", "b", "--of", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes()[: len(data)] == data


async def test_skip_seek_and_count_are_units_of_bs(shell: Shell, tmp_path: Path, data: bytes) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(data)
    out.write_bytes(b"o" * 5000)
    await dd(shell, "--if", str(source), "--of", str(out), "--bs", "1000", "--skip", "2", "--seek", "3", "--count", "1")
    assert out.read_bytes() == b"o" * 3000 + data[2000:3000], "a file ends after what was written"
    out.write_bytes(b"o" * 5000)
    await dd(shell, "--if", str(source), "--of", str(out), "--bs", "1000", "--skip", "2", "--seek", "3", "--count", "1", "--notrunc")
    assert out.read_bytes() == b"o" * 3000 + data[2000:3000] + b"o" * 1000


async def test_what_lies_on_a_target_is_not_looked_at(stack: Any) -> None:
    assert stack.bdevs.examiner.auto
    async with attach(stack, "malloc:1MiB", name="target", address="/nowhere") as name:
        assert not stack.bdevs.examiner.auto, "a partition table there would claim it"
        assert stack.bdevs.info(name).size_bytes == MIB


async def test_bdevs_of_a_configuration_file(shell: Shell, client: Any, qpair_command: list[str], tmp_path: Path, data: bytes) -> None:
    image = tmp_path / "image"
    image.write_bytes(data[: 2 * MIB])
    config = tmp_path / "c.json"
    call = {"method": "bdev_aio_create", "params": {"name": "f0", "filename": str(image), "block_size": 512}}
    config.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": [call]}]}))
    code, _, err = await client(*qpair_command, "dd", "-c", str(config), "--ib", "f0", "--of", str(tmp_path / "out"))
    assert code == 0, err
    assert (tmp_path / "out").read_bytes() == data[: 2 * MIB]
    code, _, err = await client(*qpair_command, "dd", "-c", str(config), "--ib", "f1", "--of", str(tmp_path / "out"))
    assert (code, err) == (1, f"qpair dd: no bdev is named 'f1'\n  bdevs that {config} makes: f0\n")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--if", "IN"), 2, "one output, please: give either --of FILE or --ob BDEV"),
        (("--if", "IN", "--ib", "m0", "--of", "x"), 2, "one input, please: give either --if FILE or --ib BDEV, not both"),
        (("--ib", "m0", "--ob", "m0"), 2, "input and output are the same: m0"),
        (("--if", "IN", "--ob", "m0", "--skip", "-1"), 2, "--skip -1 is below 0"),
        (("--if", "IN", "--ob", "m0", "--bs", "0"), 2, "--bs 0 is not from 1 to 256MiB"),
        (("--if", "IN", "--ob", "m0", "--bs", "256MiB", "--qd", "17"), 2, "more than 4GiB"),
        (("--if", "IN", "--ob", "m0", "--bs", "1000"), 1, "--bs 1000 is no multiple of m0's block size 512"),
        (("--if", "IN", "--ob", "m0", "--seek", "9"), 1, "--seek 9: m0 ends after 8 units of 1048576 bytes"),
        (("--if", "IN", "--ob", "m0", "--skip", "9"), 1, "ends after 2 units of 1048576 bytes"),
        (
            ("--if", "IN", "--ob", "m0", "--seek", "6"),
            1,
            "bytes do not fit into the 2097152 that m0 has from --seek on; copy what fits: --count 2",
        ),
        (("--if", "/dev/zero", "--ob", "m0"), 1, "m0 is full after 8388608 bytes, and /dev/zero has more; copy what fits: --count 8"),
        (("--ib", "m0", "--of", "/dev/null", "--verify"), 1, "--verify: /dev/null cannot be read again"),
        (("--ib", "m0", "--of", "/dev/null", "--seek", "1"), 1, "--seek 1: /dev/null has no offsets; leave --seek out"),
        (("--if", "NOTHING", "--ob", "m0"), 1, "NOTHING: No such file or directory"),
        (("--if", ".", "--ob", "m0"), 1, ".: is a directory"),
        (("--ib", "m1", "--of", "/dev/null"), 1, "no bdev is named 'm1'\n  did you mean m0?\n"),
        (("--ib", "malloc:lots", "--of", "/dev/null"), 1, "size 'lots' is not a size"),
    ],
)
async def test_what_cannot_be_copied_is_refused_by_name(
    shell: Shell, tmp_path: Path, data: bytes, arguments: tuple[str, ...], code: int, reason: str
) -> None:
    (tmp_path / "in").write_bytes(data)
    await disk(shell)
    arguments = tuple(str(tmp_path / "in") if argument == "IN" else argument for argument in arguments)
    found, out, err = await shell("dd", *arguments)
    assert (found, out) == (code, "")
    assert reason in err
    assert err.startswith("qpair dd: ")
    assert await shell.rpc("vhost_get_controllers") == []


async def test_what_does_not_verify_is_told_with_its_offset(client: Any, qpair_command: list[str], tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in").write_bytes(data[:MIB])
    (tmp_path / "liar.py").write_text(
        "import qpair\n"
        "class Liar(qpair.Bdev):\n"
        "    def __init__(self):\n"
        "        super().__init__('liar', '2MiB')\n"
        "        self.store = bytearray(self.size_bytes)\n"
        "    def read(self, requests):\n"
        "        for r in requests:\n"
        "            r.data[:] = self.store[r.offset:r.end]\n"
        "    def write(self, requests):\n"
        "        for r in requests:\n"
        "            self.store[r.offset:r.end] = bytes(r.length) if r.offset <= 700000 < r.end else r.data\n"
    )
    # a liar of our own, imported from where the command runs
    process = await asyncio.create_subprocess_exec(
        *qpair_command, "dd", "--if", "in", "--ob", "python:liar:Liar", "--bs", "64k", "--verify", "--json",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert json.loads(out)["error"]["message"] == (
        f"python:liar:Liar: the 65536 bytes from byte {700000 // 65536 * 65536} on are not what was read from in"
    )


async def test_an_interrupted_copy_says_how_to_go_on_and_can(qpair_command: list[str], client: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(random.Random(3).randbytes(16 * MIB))
    fifo = tmp_path / "slow"
    os.mkfifo(fifo)
    process = await asyncio.create_subprocess_exec(
        *qpair_command, "dd", "--if", str(fifo), "--of", str(out), "--bs", "64k", stderr=asyncio.subprocess.PIPE
    )

    def feed() -> None:
        """Four units, and then nothing until it was interrupted."""
        pipe = os.open(fifo, os.O_WRONLY)
        os.write(pipe, source.read_bytes()[: 65536 * 4])
        while not out.exists() or out.stat().st_size < 3 * 65536:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        os.close(pipe)

    await asyncio.wait_for(asyncio.to_thread(feed), 30)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    told = err.decode().splitlines()
    assert told[0].startswith("qpair dd: interrupted: ")
    flags = told[1].removeprefix("  go on with: ").split()
    assert flags[0] == "--skip"
    assert 3 <= int(flags[1]) <= 4
    code, _, more = await client(*qpair_command, "dd", "--if", str(source), "--of", str(out), "--bs", "64k", *flags)
    assert code == 0, more
    assert out.read_bytes() == source.read_bytes()


async def test_progress_is_shown_on_a_terminal(qpair_command: list[str]) -> None:
    def watch() -> tuple[int, str]:
        terminal = Terminal(*qpair_command, "dd", "--ib", "null:1TiB", "--ob", "null:2TiB", "--bs", "64k")
        terminal.until(r"MB/s left \d")
        terminal.interrupt()
        return terminal.end(), terminal.shown

    code, shown = await asyncio.to_thread(watch)
    assert code == 130
    assert "copying" in shown
    assert "go on with: --skip" in shown


class Memory(End):
    """An end in memory whose requests take their time."""

    def __init__(self, name: str, content: bytes, unit: int, clock: random.Random) -> None:
        self.name, self.unit, self.content, self._clock = name, unit, bytearray(content), clock
        self.length = len(content)
        self.sent_bytes = 0

    async def _wait(self) -> None:
        for _ in range(self._clock.randrange(4)):
            await asyncio.sleep(0)

    async def read(self, offset: int, length: int) -> bytes:
        assert offset % self.unit == length % self.unit == 0
        await self._wait()
        return bytes(self.content[offset : offset + length])

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        assert offset % self.unit == len(data) % self.unit == 0
        await self._wait()
        self.sent_bytes += len(data)
        self.content[offset : offset + len(data)] = data

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        assert offset % self.unit == length % self.unit == 0
        await self._wait()
        self.content[offset : offset + length] = bytes(length)


@given(
    st.randoms(use_true_random=False), st.integers(0, 40), st.integers(1, 8), st.integers(1, 6), st.integers(0, 6), st.integers(0, 6),
    st.none() | st.integers(0, 12), st.booleans(), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_any_copy_is_what_slices_would_do(
    clock: random.Random, length: int, bs: int, depth: int, skip: int, seek: int, count: int | None, sparse: bool, sink_unit: int
) -> None:
    unit = bs * sink_unit
    content = bytes(clock.choice((0, 0, 1, 2)) for _ in range(length))
    old = bytes(clock.randrange(256) for _ in range(64 * sink_unit))
    source, sink = Memory("in", content, 1, clock), Memory("out", old, sink_unit, clock)
    try:
        plan = make_plan(source, sink, unit=unit, skip=skip, seek=seek, count=count)
    except (InvalidArgument, NoSpace):
        return
    wanted = content[skip * unit :] if count is None else content[skip * unit : (skip + count) * unit]
    padded = wanted + bytes(-len(wanted) % sink_unit)

    async def run() -> Copy:
        copy = Copy(source, sink, plan, depth=depth, sparse=sparse, verify=True)
        await copy.run()
        await copy.verify()
        return copy

    copy = asyncio.run(run())
    at = seek * unit
    assert bytes(sink.content) == old[:at] + padded + old[at + len(padded) :]
    assert (copy.copied_bytes, copy.padded_bytes) == (len(wanted), len(padded) - len(wanted))
    assert copy.contiguous_units == -(-len(wanted) // unit)
    assert sparse or sink.sent_bytes == len(padded)


class Corrupting(Memory):
    """It keeps one byte as it likes."""

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        await super().write(offset, data)
        self.content[3] ^= 1


async def test_verification_sees_one_flipped_bit() -> None:
    clock = random.Random(1)
    source, sink = Memory("in", bytes(16), 1, clock), Corrupting("out", bytes(16), 1, clock)
    copy = Copy(source, sink, make_plan(source, sink, unit=4, skip=0, seek=0, count=1), depth=1, verify=True)
    await copy.run()
    with pytest.raises(ExceptionGroup) as caught:
        await copy.verify()
    assert caught.group_contains(IoFailed, match="out: the 4 bytes from byte 0 on are not what was read from in")


async def test_holes_of_a_file_are_known_without_reading(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.truncate(tmp_path / "f", 2 * MIB)
    descriptor = os.open(tmp_path / "f", os.O_WRONLY)
    os.pwrite(descriptor, b"x", 2 * MIB)
    os.close(descriptor)
    os.truncate(tmp_path / "f", 4 * MIB)
    end = open_file(str(tmp_path / "f"), write=False, truncate_at=None, threads=1)
    try:
        assert [end.hole(at * MIB, MIB) for at in range(4)] == [True, True, False, True]
    finally:
        await end.close()
