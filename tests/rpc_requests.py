"""Generated JSON-RPC requests to every declared method, and what their answers must be.

How it works: `request` reads the declared types (`msgspec.inspect`) and makes parameters that all fit them (`FITS`: at their limits, of sizes from none to huge, absent or null where
they may be), or the same with one thing wrong (`Wrong`): a type, a range, a value of an enumeration, a form, one missing, one unknown, one twice, no object at all. It takes
its decisions from a `Choice`: random numbers, or a fuzzer's bytes. So each request comes with a verdict that does not ask the code under test: what is wrong must be refused by
-32602 and by the parameter's name, what fits must pass the declared schema.

A `Session` asks them of one stack in this process, several "connections" at once, some requests as batches, and holds each answer against what is promised: one answer a request, with its
id, a result or a named error, never an internal one, never longer than it should be. When it ends no task and no descriptor may be left. Its journal holds what was sent since it
began, as documents that `replay` takes.

Used by tests/rpc/test_generated.py (some seconds) and fuzz/python/run.py, target ``rpc_methods`` (long).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec.inspect as inspect

from qpair import Stack
from qpair.app.rooms import load_rpc
from qpair.rpc.dispatch import answer_document
from qpair.rpc.framing import Framer
from qpair.rpc.protocol import Document, Refusal, decode
from qpair.rpc.registry import REGISTRY, Method
from qpair.rpc.types import U64_MAX

load_rpc()

T = TypeVar("T")

# One ends the process; the others start processes that load what is named. Their parameters are tested without calling them.
LEFT_OUT = {"spdk_kill_instance"} | {name for name in REGISTRY.names() if name.startswith("qpair_python")}
CALLED = tuple(name for name in REGISTRY.names(aliases=True) if name not in LEFT_OUT)

# Few, so that what one request makes, the next one finds, opens, claims and deletes.
NAMES = ("a", "b", "c", "Malloc0", "ap0", "EE_a", "reactor_0", "all", "0x1", "[0]")
PATHS = ("disk.img", "nothing", "/dev/null", "/", ".")
UUIDS = (*(f"5b6a5f0e-7f0a-4b5c-9f33-00000000000{digit}" for digit in range(3)), "00000000-0000-0000-0000-000000000000")
FORMED = ("module:Class", "package.module:Class")
ODD_TEXTS = (
    *(
        "",
        "x" * 255,
        "x" * 256,
        "x" * 5000,
        "y" * 200_000,
        "\0",
        "\n",
        "é",
        "\ud800",
        "%s%n",
        "a" * 107 + "b",
        "-",
        "..",
        "1",
        "true",
        "null",
    ),
    *("ffff", "{}", "00112233445566778899aabbccddeeff", "raid0", "raid1", "copy", "software", "posix", "static"),
)
INTEGERS = (0, 1, 2, 3, 4, 8, 64, 100, 511, 512, 520, 4096, 16384, 2**16 - 1, 2**16, 2**31 - 1, 2**32 - 1, 2**53, 2**63 - 1, 2**63, U64_MAX)
# A wait is a wait: only those that end at once, or are refused.
WAITS = (0, 1, 5, U64_MAX)
# These answer when others' I/O has ended.
WAITING = ("bdev_wait_for_examine",)
PATIENCE_S, ANSWER_WITHIN_S = 2, 60
ANYTHING = (None, True, 0, -1, 1.5, "x", [], {}, [None], {"a": [1, {"b": None}]})
ANSWER_BYTES_MAX = 1 << 20
REFUSAL_BYTES_MAX = 20_000


class Choice(Protocol):
    """Where decisions come from."""

    def below(self, limit: int) -> int:
        """0 to ``limit`` - 1."""


class Seeded:
    """Random numbers."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        return self._random.randrange(limit)


class Given:
    """A fuzzer's bytes; zeros when they are used up (``empty``)."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def empty(self) -> bool:
        return self._at >= len(self._data)

    def below(self, limit: int) -> int:
        width = 1 if limit <= 256 else 2
        piece = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(piece, "little") % limit


def one(choice: Choice, options: Sequence[T]) -> T:
    return options[choice.below(len(options))]


def chance(choice: Choice, percent: int) -> bool:
    return choice.below(100) < percent


@dataclass(frozen=True)
class Field:
    """A declared parameter. ``kind`` is what msgspec makes of its type, without None; with None it is ``nullable``."""

    name: str
    kind: Any
    required: bool
    nullable: bool = False


def fields_of(method: Method) -> list[Field]:
    if method.params is None:
        return []
    declared: Any = inspect.type_info(method.params)
    return [Field(field.encode_name, _plain(field.type), field.required, _nullable(field.type)) for field in declared.fields]


def _nullable(kind: Any) -> bool:
    return isinstance(kind, inspect.UnionType) and any(isinstance(each, inspect.NoneType) for each in kind.types)


def _plain(kind: Any) -> Any:
    if isinstance(kind, inspect.Metadata):
        return _plain(kind.type)
    if isinstance(kind, inspect.UnionType):
        return _plain(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
    return kind


FIELDS = {name: fields_of(method) for name in CALLED + tuple(LEFT_OUT) if (method := REGISTRY.get(name)) is not None}


def fitting(choice: Choice, field: Field) -> Any:
    """A value of the declared type."""
    kind, name = field.kind, field.name
    if isinstance(kind, inspect.IntType):
        low = kind.ge if kind.ge is not None else -(2**63)
        high = min(kind.le if kind.le is not None else U64_MAX, U64_MAX)
        fit = [value for value in (*(WAITS if "timeout" in name else INTEGERS), low, high) if low <= value <= high]
        return one(choice, [value for value in fit if value in WAITS] if "timeout" in name else fit)
    if isinstance(kind, inspect.BoolType):
        return bool(choice.below(2))
    if isinstance(kind, inspect.LiteralType):
        return one(choice, list(kind.values))
    if isinstance(kind, inspect.FloatType):
        return one(choice, (0.0, 1.5, -1e300, 7))
    if isinstance(kind, inspect.StrType):
        return one(choice, formed(kind)) if kind.pattern or kind.min_length or kind.max_length else text(choice, name)
    if isinstance(kind, inspect.ListType):
        inner = Field(name, _plain(kind.item_type), required=True)
        return [fitting(choice, inner) for _ in range(one(choice, (0, 1, 1, 2, 2, 3, 40)))]
    if isinstance(kind, inspect.DictType):
        return {one(choice, NAMES): one(choice, ANYTHING) for _ in range(one(choice, (0, 1, 3)))}
    if isinstance(kind, inspect.StructType):
        return {each.encode_name: fitting(choice, Field(each.encode_name, _plain(each.type), each.required)) for each in kind.fields}
    return one(choice, ANYTHING)


def formed(kind: Any) -> list[str]:
    """Texts of the length and the form that a type demands."""
    low, high = kind.min_length or 0, kind.max_length or 1 << 20
    return [word for word in (*UUIDS, *FORMED, *NAMES) if low <= len(word) <= high and re.search(kind.pattern or "", word)]


def text(choice: Choice, name: str) -> str:
    if name in ("path", "filename", "traddr"):
        return one(choice, PATHS)
    return one(choice, NAMES) if chance(choice, 85) else one(choice, ODD_TEXTS)


def _deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def unfitting(choice: Choice, field: Field) -> Any:
    """A value that is not of the declared type."""
    kind = field.kind
    if isinstance(kind, inspect.AnyType):
        return _NOTHING
    wrong: list[Any] = [_deep(40)]
    if not field.nullable:
        wrong.append(None)
    if not isinstance(kind, inspect.StrType | inspect.LiteralType):
        wrong += ["x", "", "1", "x" * 100_000]
    if not isinstance(kind, inspect.BoolType):
        wrong += [True, False]
    if not isinstance(kind, inspect.IntType | inspect.FloatType):
        wrong += [0, 7, -1, 10**30]
    if not isinstance(kind, inspect.FloatType):
        wrong += [1.5, -1e300]
    if not isinstance(kind, inspect.ListType):
        wrong += [[], ["a"], [[]], list(range(2000))]
    if not isinstance(kind, inspect.DictType | inspect.StructType):
        wrong += [{}, {"a": 1}, {str(number): number for number in range(500)}]
    if isinstance(kind, inspect.IntType):
        if kind.ge is not None:
            wrong += [kind.ge - 1, *(low for low in (-(2**31), -(2**63), -(10**400)) if low < kind.ge)]
        high = kind.le if kind.le is not None else U64_MAX
        wrong += [high + 1, 2**64, 10**30, 10**4000]
    if isinstance(kind, inspect.StrType) and kind.pattern:
        wrong += ["", "x", UUIDS[0][:-1], UUIDS[0] + "0", UUIDS[0].replace("-", ""), " " + UUIDS[0]]
    if isinstance(kind, inspect.LiteralType):
        wrong += ["", "no such", str(kind.values[0]) + " ", str(kind.values[0]).swapcase()]
    if isinstance(kind, inspect.ListType) and isinstance(_plain(kind.item_type), inspect.StrType):
        wrong += [[1], ["a", None], ["a", ["b"]], [{}]]
    return one(choice, wrong)


_NOTHING: Any = object()


@dataclass(frozen=True)
class Made:
    """One request. ``wrong``: None if its parameters fit the declared schema, else the name that the refusal must give ("" where there is none to give)."""

    method: str
    params: str | None
    wrong: str | None
    id: str | None = "1"
    """As JSON; None: a notification."""

    @property
    def answered(self) -> bool:
        """What is no request at all is answered even without an id."""
        return self.id is not None or (self.params is not None and self.params[0] not in "{[")

    def document(self) -> str:
        members = ['"jsonrpc":"2.0"', f'"method":{json.dumps(self.method)}']
        members += [] if self.params is None else [f'"params":{self.params}']
        members += [] if self.id is None else [f'"id":{self.id}']
        return "{" + ",".join(members) + "}"


def request(choice: Choice, names: Sequence[str] = CALLED) -> Made:
    """One request to one of the methods ``names``."""
    name = one(choice, names)
    method = REGISTRY.get(name)
    assert method is not None
    fields = FIELDS[name]
    chosen = [field for field in fields if field.required or chance(choice, 40)]
    given = [(field.name, None if field.nullable and chance(choice, 3) else fitting(choice, field)) for field in chosen]
    ident = one(choice, ("1", "1", "1", '"x"', "0", "-7", "null", None))
    if not chance(choice, 25):
        params = _object(given) if given or chance(choice, 30) else None
        return Made(name, params, None, ident)
    params, wrong = _spoilt(choice, method, fields, given)
    return Made(name, params, wrong, ident)


def _object(pairs: Iterable[tuple[str, Any]]) -> str:
    return "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"


def _spoilt(choice: Choice, method: Method, fields: list[Field], given: list[tuple[str, Any]]) -> tuple[str | None, str | None]:
    """Parameters with one thing wrong, and its name. Nothing wrong, where a method has nothing that could be."""
    ways: list[str] = ["no object"]
    if fields:
        ways += ["value"] * 5
    if any(field.required for field in fields):
        ways += ["missing"] * 2
    if method.params is None or method.params.__struct_config__.forbid_unknown_fields:
        ways += ["unknown"] * 2
    if given:
        ways.append("twice")
    way = one(choice, ways)
    if way == "no object":
        return json.dumps(one(choice, ([], [1, 2], "x", 7, True, 1.5, ["a", {"b": 1}], _deep(40), [_deep(40)]))), ""
    if way == "value":
        field = one(choice, fields)
        value = unfitting(choice, field)
        if value is _NOTHING:
            return _object(given), None
        return _object([*((key, kept) for key, kept in given if key != field.name), (field.name, value)]), field.name
    if way == "missing":
        field = one(choice, [field for field in fields if field.required])
        left = [(key, value) for key, value in given if key != field.name]
        return (_object(left) if left or chance(choice, 50) else None), field.name
    if way == "unknown":
        name = one(choice, ("nothing", "", "Name", "name ", "-", "%s", "x" * 3000))
        return _object([*given, (name, one(choice, ANYTHING))]), name[:20]
    key, value = one(choice, given)
    return _object([*given, (key, value)]), key


class Finding(AssertionError):
    """An answer that breaks a promise, and the request."""


class Session:
    """One stack that is asked. ``asked`` counts requests."""

    def __init__(self, engine_factory: Callable[..., Any] | None = None) -> None:
        self._factory = engine_factory
        self.asked = 0
        self.journal: list[str] = []
        self._directory = tempfile.TemporaryDirectory(prefix="qpair-rpc-")

    async def start(self) -> None:
        """A stack in SPDK's startup state, in a directory of its own."""
        self._before = os.getcwd()
        # A handler that keeps what is logged (pytest's) keeps errors, their frames, and by them the stack.
        logging.getLogger("qpair").propagate = False
        self._tasks, self._descriptors = len(asyncio.all_tasks()), _descriptors()
        os.chdir(self._directory.name)
        Path("disk.img").write_bytes(bytes(1 << 20))
        core = min(os.sched_getaffinity(0))
        self._stack = Stack(cores=core, pin=False, vhost_dir=self._directory.name, wait_for_rpc=True, engine_factory=self._factory)
        await self._stack.__aenter__()

    async def run(self) -> None:
        """Out of the startup state."""
        if self._stack.state == "startup":
            await self.ask([Made("framework_start_init", None, None)])

    async def stop(self) -> None:
        """The stack stops, and leaves nothing."""
        try:
            await self._stack.__aexit__(None, None, None)
        finally:
            logging.getLogger("qpair").propagate = True
            os.chdir(self._before)
            self._directory.cleanup()
        del self._stack
        await asyncio.sleep(0)
        if len(asyncio.all_tasks()) != self._tasks:
            raise Finding(f"tasks are left: {[task.get_name() for task in asyncio.all_tasks()]}")
        if left := {name: what for name, what in _descriptors().items() if self._descriptors.get(name) != what}:
            raise Finding(f"descriptors are left open: {left}")

    async def ask(self, made: Sequence[Made]) -> None:
        """One request, or several as a batch."""
        document = made[0].document() if len(made) == 1 else "[" + ",".join(each.document() for each in made) + "]"
        self.journal.append(document)
        self.asked += len(made)
        state = self._stack.state
        answer = await self._answered(document, patient=any(each.method in WAITING for each in made))
        wanted = [each for each in made if each.answered]
        if answer is None:
            replies: list[Any] = []
        else:
            parsed = json.loads(answer)
            replies = parsed if len(made) > 1 else [parsed]
        if len(replies) != len(wanted):
            raise Finding(f"{len(replies)} answers for {len(wanted)} requests: {document[:2000]}")
        for each, reply in zip(wanted, replies, strict=True):
            _judge(each, reply, startup=state == "startup")

    async def _answered(self, document: str, *, patient: bool) -> bytes | None:
        """The answer. Who waits for I/O that never ends (an error bdev keeps it, a delay bdev holds it) is answered when those bdevs go."""
        asking = asyncio.ensure_future(_answer(self._stack, document))
        for last in (False, True) if patient else (True,):
            await asyncio.wait([asking], timeout=ANSWER_WITHIN_S if last else PATIENCE_S)
            if asking.done():
                return asking.result()
            if not last:
                await self._clear()
        asking.cancel()
        raise Finding(f"no answer within {ANSWER_WITHIN_S} s: {document[:2000]}")

    async def _clear(self) -> None:
        bdevs = self._stack.bdevs
        gone = (bdevs.delete(info.name, deadline_ms=1000) for info in bdevs.infos())
        await asyncio.wait_for(asyncio.gather(*gone, return_exceptions=True), ANSWER_WITHIN_S)


async def _answer(stack: Stack, text_: str) -> bytes | None:
    documents, error = Framer().feed(text_.encode())
    document = Document([Refusal(error.code, error.message)]) if error is not None else decode(documents[0])
    answer = await answer_document(stack, document)
    if answer is not None and (b"Traceback" in answer or b"\n" in answer):
        raise Finding(f"{text_[:2000]}: {answer[:2000]!r}")
    return answer


def _judge(made: Made, reply: dict[str, Any], *, startup: bool) -> None:
    def broken(why: str) -> Finding:
        return Finding(f"{why}: {made.document()[:2000]} -> {json.dumps(reply)[:2000]}")

    if reply.get("id") != json.loads(made.id or "null") or ("result" in reply) == ("error" in reply):
        raise broken("neither result nor error, or another's id")
    refusal = reply.get("error")
    if refusal is None:
        if made.wrong is not None:
            raise broken(f"parameter {made.wrong!r} is wrong, and it was done")
        if len(json.dumps(reply)) > ANSWER_BYTES_MAX:
            raise broken("the answer is too long")
        return
    code = refusal["code"]
    if not isinstance(code, int) or not (-4096 < code < 0 or code in (-32600, -32601, -32602, -32603)) or not refusal["message"]:
        raise broken("no error of ours")
    if code == -32603 and "Internal error" in refusal["message"]:
        raise broken("an internal error")
    if len(json.dumps(refusal)) > REFUSAL_BYTES_MAX:
        raise broken("what was sent comes back whole")
    if code == -1 and "framework" in refusal["message"]:
        method = REGISTRY.get(made.method)
        assert method is not None
        if method.startup if startup else method.runtime:
            raise broken("it may be called in this state")
        return
    if made.wrong == "" and code in (-32600, -32602):
        return
    if made.wrong is not None and (code != -32602 or json.dumps(made.wrong)[1:-1][:20] not in json.dumps(refusal)):
        raise broken(f"parameter {made.wrong!r} is wrong, and that is not said")


def _descriptors() -> dict[str, str]:
    """What is open, by number."""
    gc.collect()  # an engine closes its own when it goes, and a stack holds it in circles
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that this list was read from
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


async def check(
    choice: Choice,
    requests: int,
    *,
    connections: int = 4,
    engine_factory: Callable[..., Any] | None = None,
    more: Callable[[], bool] = lambda: True,
) -> int:
    """About ``requests`` of them on one stack, ``connections`` at a time, the first few before its subsystems start. How many were asked."""
    session = Session(engine_factory)
    await session.start()
    try:
        for _ in range(4):
            await session.ask([request(choice)])
        await session.run()
        while session.asked < requests and more():
            await turn(session, choice, connections)
    finally:
        await session.stop()
    return session.asked


async def turn(session: Session, choice: Choice, connections: int) -> None:
    """One document on each connection, all at once."""
    documents = [[request(choice) for _ in range(one(choice, (1, 1, 1, 4)))] for _ in range(connections)]
    answers = await asyncio.gather(*(session.ask(each) for each in documents), return_exceptions=True)
    for answer in answers:
        if answer is not None:
            raise answer


async def replay(documents: Iterable[str], engine_factory: Callable[..., Any] | None = None) -> None:
    """A journal, one document after the other: each must be answered by a result or a named error."""
    session = Session(engine_factory)
    await session.start()
    try:
        for document in documents:
            answer = await asyncio.wait_for(_answer(session._stack, document), 60)
            for reply in [] if answer is None else (found if isinstance(found := json.loads(answer), list) else [found]):
                if (reply.get("error") or {}).get("code") == -32603 and "Internal error" in reply["error"]["message"]:
                    raise Finding(f"an internal error: {document[:2000]} -> {answer!r}")
    finally:
        await session.stop()
