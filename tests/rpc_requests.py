"""Generated JSON-RPC requests: for each declared method, parameters of the declared types, at their limits, of other types, too many, missing, nested.

Used by tests/rpc/test_generated.py (a short run) and by fuzz/python/run.py (target ``rpc_methods``). `check` runs a few of them, one after the other, on a stack of their
own, and holds every answer against what JSON-RPC and our errors promise: a result or a named error, never an internal one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from hypothesis import strategies as st

from qpair import Stack
from qpair.app.rooms import load_rpc
from qpair.rpc.dispatch import answer_document
from qpair.rpc.framing import Framer
from qpair.rpc.protocol import Document, Refusal, decode
from qpair.rpc.registry import REGISTRY, Method, schema_type

load_rpc()

# One ends the process; the others start processes that load what is named.
LEFT_OUT = {"spdk_kill_instance"} | {name for name in REGISTRY.names() if name.startswith("qpair_python")}

# Few, so that what one request makes, the next one finds, opens, claims and deletes.
NAMES = ("a", "b", "c", "Malloc0", "reactor_0", "all", "0x1", "[0]")
PATHS = ("disk.img", "nothing", "/dev/null", "/", ".")
INTEGERS = (0, 1, 2, 8, 100, 511, 512, 4096, 2**16 - 1, 2**16, 2**31 - 1, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
WRONG_INTEGERS = (-1, -(2**31), -(2**63), 2**32, 2**63, 2**64, 10**30, 10**4000)
# A wait is a wait: only those that end at once, or are refused.
WAITS = (0, 1, 5, 2**64 - 1)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([*INTEGERS, *WRONG_INTEGERS])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
texts = st.sampled_from(NAMES) | st.sampled_from(
    ["", "x" * 255, "x" * 256, "x" * 5000, "\0", "\n", "é", "\ud800", "%s%n", "a" * 107 + "b", "-", "..", "1", "true", "null", "ffff", "{}"]
)
wrong = (
    json_values
    | texts
    | st.sampled_from(WRONG_INTEGERS)
    | st.integers(1, 60).map(lambda depth: json.loads("[" * depth + "]" * depth))
    | st.integers(1, 60).map(lambda depth: json.loads('{"a":' * depth + "1" + "}" * depth))
)


def value(name: str, annotation: Any) -> st.SearchStrategy[Any]:
    """Of the declared type."""
    kind = schema_type(annotation)
    if "timeout" in name:
        return st.sampled_from(WAITS)
    if kind == "boolean":
        return st.booleans()
    if kind == "uuid":
        return st.sampled_from(
            [f"5b6a5f0e-7f0a-4b5c-9f33-00000000000{digit}" for digit in range(3)] + ["0" * 8 + "-0000-0000-0000-" + "0" * 12]
        )
    if kind == "enum":
        return st.sampled_from(choices(annotation))
    if kind == "array":
        return st.lists(texts, max_size=4)
    if kind == "object":
        return st.dictionaries(st.text(max_size=4), json_values, max_size=3)
    if kind == "string":
        return st.sampled_from(PATHS) if name in ("path", "filename", "traddr") else texts
    if kind == "double":
        return st.floats(allow_nan=False, allow_infinity=False)
    return st.sampled_from(INTEGERS)


def choices(annotation: Any) -> list[str]:
    arguments = get_args(annotation)
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return list(arguments)
    return next((found for argument in arguments if get_origin(argument) or get_args(argument) if (found := choices(argument))), [])


@st.composite
def params(draw: st.DrawFn, method: Method) -> Any:
    if draw(st.integers(0, 19)) == 0:
        return draw(wrong)
    given = {}
    for field in method.fields():
        how = draw(st.integers(0, 9))
        if how < 7 if field.required else how < 4:
            given[field.encode_name] = draw(value(field.encode_name, field.type))
        elif how == 9:
            given[field.encode_name] = draw(wrong)
    if draw(st.integers(0, 19)) == 0:
        given[draw(texts)] = draw(wrong)
    return given


@st.composite
def request(draw: st.DrawFn) -> dict[str, Any]:
    """One request as an object."""
    name = draw(st.sampled_from([name for name in REGISTRY.names(aliases=True) if name not in LEFT_OUT]))
    method = REGISTRY.get(name)
    assert method is not None
    made: dict[str, Any] = {"jsonrpc": "2.0", "id": draw(st.integers(0, 3) | st.sampled_from(["x", None])), "method": name}
    if method.fields() or draw(st.integers(0, 9)) == 0:
        made["params"] = draw(params(method))
    return made


requests = st.lists(request(), min_size=1, max_size=8)


async def check(made: list[dict[str, Any]], engine_factory: Callable[..., Any] | None = None) -> None:
    """All of them on one stack, which must then stop, and leave no task and no descriptor."""
    tasks, descriptors = len(asyncio.all_tasks()), _descriptors()
    with tempfile.TemporaryDirectory() as directory:
        before = os.getcwd()
        os.chdir(directory)
        try:
            Path("disk.img").write_bytes(bytes(1 << 16))
            stack = Stack(
                cores=min(os.sched_getaffinity(0)), pin=False, vhost_dir=directory, wait_for_rpc=True, engine_factory=engine_factory
            )
            async with stack:
                await _ask({"id": 0, "method": "framework_start_init"}, stack)
                for each in made:
                    await asyncio.wait_for(_ask(each, stack), 20)
        finally:
            os.chdir(before)
    del stack
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == tasks, [task.get_name() for task in asyncio.all_tasks()]
    assert _descriptors() == descriptors, "descriptors are left open"


def _descriptors() -> int:
    gc.collect()  # an engine closes its own when it goes, and a stack holds it in circles
    return len(os.listdir("/proc/self/fd"))


async def _ask(made: dict[str, Any], stack: Stack) -> None:
    text = json.dumps(made).encode()
    documents, error = Framer().feed(text)
    document = Document([Refusal(error.code, error.message)]) if error is not None else decode(documents[0])
    answer = await answer_document(stack, document)
    assert answer is not None
    assert b"Traceback" not in answer
    assert b"\n" not in answer
    reply = json.loads(answer)
    assert ("result" in reply) != ("error" in reply), reply
    if (refusal := reply.get("error")) is not None:
        assert isinstance(refusal["code"], int), refusal
        assert -4096 < refusal["code"] < 0 or refusal["code"] in (-32700, -32600, -32601, -32602), (made, refusal)
        assert refusal["message"], refusal
        assert len(json.dumps(refusal)) < 20_000, "what was sent does not come back whole"
