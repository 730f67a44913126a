"""Fuzzes one Python codec: ``run.py TARGET [libFuzzer options]``. ``run.py`` alone lists the targets.

A target takes any bytes and must end them in a value or in the error its room declares; any other exception is a finding. Where a
value can be encoded again, the encoding must decode to the same value.
"""

import asyncio
import atexit
import hashlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

import atheris

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

with atheris.instrument_imports(include=["qpair", "json"]):
    import rpc_requests
    from qpair.app import config, parcel
    from qpair.app.takeover import messages as messages_of_takeover
    from qpair.bdev import gpt
    from qpair.errors import ConfigError
    from qpair.rpc import framing as json_framing
    from qpair.rpc import protocol as json_rpc
    from qpair.vhost import framing, messages, record

DESCRIPTORS_MAX = 10
ARTIFACTS = Path("fuzz/artifacts").resolve()


def frames(data: bytes) -> Iterator[framing.Frame]:
    """Whole vhost-user messages of a stream; the first comes with as many descriptors (numbers only) as the first byte says."""
    assembler = framing.Assembler()
    fds = list(range(data[0] % DESCRIPTORS_MAX)) if data else []
    position = 1
    while position < len(data):
        piece = data[position : position + assembler.wanted]
        position += len(piece)
        frame = assembler.feed(piece, fds)
        fds = []
        while frame is not None:
            yield frame
            # A message without payload is whole at its header.
            frame = assembler.feed(b"") if assembler.wanted == 0 else None


def vhost_requests(data: bytes) -> None:
    with suppress(framing.ProtocolError):
        for frame in frames(data):
            message = messages.decode_request(frame)
            # Padding that a peer may send is not kept, so values are compared and not bytes.
            [again] = frames(bytes([len(frame.fds)]) + messages.encode(message))
            assert messages.decode_request(again) == message, (message, frame, again)


def vhost_replies(data: bytes) -> None:
    with suppress(framing.ProtocolError):
        for frame in frames(data):
            messages.decode_reply(frame, to=frame.header.request)


def json_rpc_stream(data: bytes) -> None:
    """The same documents and the same error, whether the stream comes whole or in pieces."""
    whole, error = json_framing.Framer().feed(data)
    framer = json_framing.Framer()
    pieces: list[bytes] = []
    failed: Any = None
    for start in range(0, len(data), 7):
        documents, failed = framer.feed(data[start : start + 7])
        pieces += documents
        if failed:
            break
    assert pieces == whole, (pieces, whole)
    assert (failed is None) == (error is None), (failed, error)
    for document in whole:
        for item in json_rpc.decode(document).items:
            assert isinstance(item, json_rpc.Call | json_rpc.Refusal)


def configuration(data: bytes) -> None:
    with suppress(ConfigError):
        config.parse(data)


def partition_table(data: bytes) -> None:
    """A disk's bytes, as they are and with CRCs that are right, so that the fields behind them are reached."""
    header, _, array = data.partition(b"|")
    lba = 1 + len(header) % 2 * 4094
    signed = (b"EFI PART\0\0\x01\0" + struct.pack("<I", 92) + header).ljust(92, b"\0")
    signed = signed[:16] + struct.pack("<I", crc32(signed[:16] + bytes(4) + signed[20:92])) + signed[20:]
    gpt.is_protective(data)
    for block in (header, signed):
        with suppress(gpt.GptError):
            found = gpt.decode_header(block.ljust(512, b"\0"), lba=lba, block_size=512, num_blocks=4096)
            start, blocks = found.array(512)
            assert start >= 2, found
            assert start + blocks <= 4096, found
            assert gpt.decode_header(found.encode().ljust(512, b"\0"), lba=lba, block_size=512, num_blocks=4096) == found
    usual = gpt.Header(1, 4095, 34, 4062, UUID(int=1), 2, 128, 128, crc32(array[:16384].ljust(16384, b"\0")))
    table = gpt.decode_entries(usual, array[:16384].ljust(16384, b"\0"))
    used = sorted((entry.first_lba, entry.last_lba) for _, entry in table.entries)
    assert all(34 <= first <= last <= 4062 for first, last in used), used
    assert all(before[1] < after[0] for before, after in pairwise(used)), used


class Asked:
    """What ``rpc_methods`` asks: one stack for many inputs. A new one after so many requests shows what the one before has left."""

    REQUESTS_A_STACK = 20_000
    CONNECTIONS = 4

    def __init__(self) -> None:
        self.requests = self.inputs = 0
        self.began = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._session: rpc_requests.Session | None = None

    def input(self, data: bytes) -> None:
        """All requests that these bytes choose. What breaks a promise leaves its journal, of which `rpc_requests.replay` makes a test."""
        self.inputs += 1
        session = self._session
        try:
            self._loop.run_until_complete(self._ask(rpc_requests.Given(data)))
        except BaseException:
            session = self._session or session
            if session is not None:
                path = ARTIFACTS / f"rpc_methods-{hashlib.sha1(data).hexdigest()}.json"
                path.write_text(json.dumps(session.journal))
                print(f"{self.told()}; journal: {path}", file=sys.stderr)
            raise
        if self.inputs % 1000 == 0:
            print(self.told(), file=sys.stderr)

    async def _ask(self, choice: rpc_requests.Given) -> None:
        if self._session is None:
            self._session = rpc_requests.Session()
            await self._session.start()
            for _ in range(4):
                await self._session.ask([rpc_requests.request(choice)])
            await self._session.run()
        before = self._session.asked
        while not choice.empty and self._session.asked - before < 256:
            await rpc_requests.turn(self._session, choice, self.CONNECTIONS)
        self.requests += self._session.asked - before
        if self._session.asked >= self.REQUESTS_A_STACK:
            await self._session.stop()
            self._session = None

    def told(self) -> str:
        return f"rpc_methods: {self.requests} requests of {self.inputs} inputs in {time.monotonic() - self.began:.0f} s"


def takeover(data: bytes) -> None:
    """What giver and taker say, with up to three descriptors: a message, or `ParcelError`; and what restores a session is calls with plain arguments."""
    fds = [os.dup(0) for _ in range(data[0] % 4)] if data else []
    for kind in (messages_of_takeover.FromGiver, messages_of_takeover.FromTaker, record.ControllerRecord):
        with suppress(parcel.ParcelError):
            found: Any = parcel.unpack(data[1:], [os.dup(fd) for fd in fds], kind)
            parcel.pack(found)
            for controller in getattr(found, "controllers", [found]):
                if getattr(controller, "session", None) is not None:
                    known = controller.session.record
                    assert all(name.startswith("vhost_set_") for name, _ in (*known.restore_calls(), *known.start_calls()))
    for fd in fds:
        os.close(fd)


def rpc_methods(data: bytes) -> None:
    """Whole requests to every method, of stacks in this process: the bytes choose among what the declared types allow, and what they do not."""
    ASKED.input(data)


ASKED = Asked()

TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (vhost_requests, vhost_replies, json_rpc_stream, configuration, partition_table, takeover, rpc_methods)
}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("\n".join(TARGETS))
        sys.exit(0)
    name = sys.argv.pop(1)
    if name not in TARGETS:
        sys.exit(f"no target {name!r}; there are {', '.join(TARGETS)}")
    # absolute, for a target may work in a directory of its own
    corpus = Path(f"fuzz/corpus/python-{name}").resolve()
    corpus.mkdir(parents=True, exist_ok=True)
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    if name == "rpc_methods":
        atexit.register(lambda: print(ASKED.told(), file=sys.stderr))
    atheris.Setup([*sys.argv, f"-artifact_prefix={ARTIFACTS / name}-", str(corpus)], TARGETS[name])
    atheris.Fuzz()
