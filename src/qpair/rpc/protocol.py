"""JSON-RPC 2.0 without sockets: what a document asks, and the bytes that answer it.

Specification: JSON-RPC 2.0, with the liberties that SPDK's clients take: ``"jsonrpc"`` may be absent, members of an object may come in any
order, answers are compact JSON and a newline, in the order of the requests.

How it works: `decode` turns one document into `Call`s and refusals; `encode_result` and `encode_error` make one answer each; a batch is
answered by one array of those whose requests had an id.

Errors: -32700 not JSON; -32600 not a request, or an object that names a member twice; -32602 a parameter named twice (the message names it);
the method's own errors by `qpair.errors.QpairError`: the code is JSON-RPC's or the negated errno, the message SPDK's text, and ``data`` one sentence.

Limits: 1024 requests in a batch; integers of 4300 digits; 1000 characters of an error's text.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from qpair.errors import InvalidParameters, InvalidRequest, MethodNotFound, QpairError

__all__ = ["BATCH_MAX", "Call", "Document", "Refusal", "decode", "encode_batch", "encode_error", "encode_result"]

BATCH_MAX = 1024
ERROR_TEXT_MAX = 1000
_MEMBERS = frozenset(("jsonrpc", "method", "params", "id"))


class Call(msgspec.Struct, frozen=True):
    """One request. ``wants_reply`` is false for a notification."""

    method: str
    params: Any
    id: Any
    wants_reply: bool
    duplicates: tuple[str, ...] = ()


class Refusal(msgspec.Struct, frozen=True):
    """One thing that is no request, and its answer."""

    code: int
    message: str
    id: Any = None


class Document(msgspec.Struct, frozen=True):
    """What one document holds. ``fatal``: the stream cannot be trusted after it."""

    items: list[Call | Refusal]
    batch: bool = False
    fatal: bool = False


class _Object(dict[str, Any]):
    """A JSON object that remembers the names it was given twice."""

    __slots__ = ("duplicates",)
    duplicates: tuple[str, ...]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    found = _Object(plain)
    found.duplicates = _repeated([name for name, _ in pairs])
    return found


def _repeated(names: list[str]) -> tuple[str, ...]:
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for name in names:
        if name in seen:
            twice[name] = None
        seen.add(name)
    return tuple(twice)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def loads(document: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN. Objects that repeat a name come back as such (`duplicates_in`)."""
    return json.loads(document.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)


def duplicates_in(value: Any) -> tuple[str, ...]:
    """The names that ``value`` or anything inside it repeats."""
    found: list[str] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found.extend(getattr(item, "duplicates", ()))
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return tuple(dict.fromkeys(found))


def decode(document: bytes) -> Document:
    """One whole document as calls and refusals."""
    try:
        value = loads(document)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        return Document([Refusal(-32700, f"Parse error: {reason[:200]}")], fatal=True)
    if not isinstance(value, list):
        return Document([_request(value)])
    if not value:
        return Document([Refusal(-32600, "Invalid request: the batch is empty")])
    if len(value) > BATCH_MAX:
        return Document([Refusal(-32600, f"Invalid request: a batch of {len(value)} is more than {BATCH_MAX}")])
    return Document([_request(item) for item in value], batch=True)


def _request(value: Any) -> Call | Refusal:
    if not isinstance(value, dict):
        return Refusal(-32600, f"Invalid request: it must be an object, got {_kind(value)}")
    identity = value.get("id")
    if isinstance(identity, bool | dict | list):
        return Refusal(-32600, f"Invalid request: id must be a string, a number or null, got {_kind(identity)}")
    if twice := getattr(value, "duplicates", ()):
        return Refusal(-32600, f"Invalid request: member {twice[0][:64]!r} is given twice", identity)
    if value.get("jsonrpc", "2.0") != "2.0":
        return Refusal(-32600, "Invalid request: jsonrpc must be '2.0'", identity)
    if unknown := [name for name in value if name not in _MEMBERS]:
        return Refusal(-32600, f"Invalid request: unknown member {unknown[0][:64]!r}", identity)
    method = value.get("method")
    if not isinstance(method, str):
        return Refusal(-32600, f"Invalid request: method must be a string, got {_kind(method)}", identity)
    params = value.get("params")
    if "params" in value and params is not None and not isinstance(params, dict | list):
        return Refusal(-32600, f"Invalid request: params must be an object, got {_kind(params)}", identity)
    return Call(method, params, identity, "id" in value, duplicates_in(params))


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def refuse_duplicates(call: Call) -> None:
    """`InvalidParameters` when a parameter is named twice."""
    if call.duplicates:
        raise InvalidParameters(f"{call.method[:64]}: parameter {call.duplicates[0][:64]!r} is given twice")


def encode_result(identity: Any, result: Any) -> bytes:
    """The answer to a request that succeeded, without newline."""
    return b'{"jsonrpc":"2.0","id":' + _json(identity) + b',"result":' + _json(result) + b"}"


def encode_error(identity: Any, code: int, message: str, data: str | None = None) -> bytes:
    """The answer to one that failed, without newline."""
    error: dict[str, Any] = {"code": code, "message": _short(message)}
    if data is not None and data != message:
        error["data"] = _short(data)
    return b'{"jsonrpc":"2.0","id":' + _json(identity) + b',"error":' + _json(error) + b"}"


def _short(text: str) -> str:
    """What a request put into an error's text need not come back whole."""
    half = ERROR_TEXT_MAX // 2
    return text if len(text) <= ERROR_TEXT_MAX else f"{text[:half]} ... {text[-half:]}"


def encode_exception(identity: Any, error: QpairError) -> bytes:
    """As `encode_error`. Parameter errors name the parameters in the message; errno errors carry SPDK's text and say why in ``data``."""
    if isinstance(error, MethodNotFound):
        return encode_error(identity, error.code, error.text, error.message)
    if isinstance(error, InvalidParameters | InvalidRequest):
        return encode_error(identity, error.code, f"{error.text}: {error.message}" if error.message != error.text else error.text)
    if error.rpc_code is not None:
        return encode_error(identity, error.code, error.message)
    return encode_error(identity, error.code, error.text, error.message)


def encode_batch(answers: list[bytes]) -> bytes:
    """One array of answers, without newline."""
    return b"[" + b",".join(answers) + b"]"


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError):
        # An id may be a lone surrogate or an integer past 64 bits: legal JSON, which is echoed as it came.
        return json.dumps(value, separators=(",", ":")).encode("ascii")
