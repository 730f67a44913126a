"""Documents to calls, answers to bytes: each refusal has its code and names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpair.errors import AlreadyExists, InvalidParameters, MethodNotFound, NoSuchBdev
from qpair.rpc.protocol import Call, Refusal, decode, encode_error, encode_exception, encode_result


def only(document: str | bytes) -> Call | Refusal:
    decoded = decode(document.encode() if isinstance(document, str) else document)
    assert len(decoded.items) == 1
    return decoded.items[0]


def test_a_request_without_the_jsonrpc_member_is_accepted() -> None:
    assert only('{"method": "x", "id": "seven", "params": {"a": 1}}') == Call("x", {"a": 1}, "seven", True)


def test_a_request_without_id_wants_no_reply_and_a_null_id_wants_one() -> None:
    quiet, asking = only('{"method":"x"}'), only('{"method":"x","id":null}')
    assert isinstance(quiet, Call)
    assert not quiet.wants_reply
    assert isinstance(asking, Call)
    assert asking.wants_reply


@pytest.mark.parametrize(
    ("document", "code", "message"),
    [
        ("{", -32700, "Parse error: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"method":"x","id":NaN}', -32700, "Parse error: NaN is not JSON"),
        (b'{"method":"\xff"}', -32700, "Parse error: 'utf-8' codec can't decode byte 0xff in position 11: invalid start byte"),
        ("[]", -32600, "Invalid request: the batch is empty"),
        ('{"id":1}', -32600, "Invalid request: method must be a string, got null"),
        ('{"method":1,"id":1}', -32600, "Invalid request: method must be a string, got a number"),
        ('{"method":"x","id":[1]}', -32600, "Invalid request: id must be a string, a number or null, got an array"),
        ('{"method":"x","method":"y","id":1}', -32600, "Invalid request: member 'method' is given twice"),
        ('{"jsonrpc":"1.0","method":"x","id":1}', -32600, "Invalid request: jsonrpc must be '2.0'"),
        ('{"method":"x","id":1,"extra":0}', -32600, "Invalid request: unknown member 'extra'"),
        ('{"method":"x","id":1,"params":"p"}', -32600, "Invalid request: params must be an object, got a string"),
    ],
)
def test_what_is_no_request_is_refused_by_name(document: str | bytes, code: int, message: str) -> None:
    refusal = only(document)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.message) == (code, message)


def test_a_batch_is_decoded_item_by_item() -> None:
    decoded = decode(b'[{"method":"a","id":1}, 5, {"method":"b"}]')
    assert decoded.batch
    assert decoded.items == [
        Call("a", None, 1, True),
        Refusal(-32600, "Invalid request: it must be an object, got a number"),
        Call("b", None, None, False),
    ]


def test_a_batch_past_the_limit_is_refused_whole() -> None:
    refusal = only("[" + ",".join(["{}"] * 1025) + "]")
    assert refusal == Refusal(-32600, "Invalid request: a batch of 1025 is more than 1024")


def test_a_number_of_too_many_digits_is_a_parse_error() -> None:
    refusal = only('{"method":"x","id":1,"params":{"n":' + "9" * 5000 + "}}")
    assert isinstance(refusal, Refusal)
    assert refusal.code == -32700
    assert "4300 digits" in refusal.message


@given(
    st.text() | st.integers() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.recursive(st.integers() | st.text(), st.lists),
)
def test_ids_and_results_are_echoed(identity: Any, result: Any) -> None:
    answer = encode_result(identity, result)
    assert b"\n" not in answer
    assert json.loads(answer) == {"jsonrpc": "2.0", "id": identity, "result": result}


def test_an_id_that_is_a_lone_surrogate_is_echoed() -> None:
    call = only('{"method":"x","id":"\\ud800"}')
    assert isinstance(call, Call)
    assert json.loads(encode_result(call.id, True))["id"] == "\ud800"


@given(st.binary(max_size=80))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    for item in decode(data).items:
        if isinstance(item, Refusal):
            json.loads(encode_error(item.id, item.code, item.message))


@pytest.mark.parametrize(
    ("error", "code", "message", "data"),
    [
        (NoSuchBdev("no bdev is named 'x'"), -19, "No such device", "no bdev is named 'x'"),
        (AlreadyExists("bdev name 'x' is in use"), -17, "File exists", "bdev name 'x' is in use"),
        (InvalidParameters("m: unknown parameter 'q'"), -32602, "Invalid parameters: m: unknown parameter 'q'", None),
        (MethodNotFound("no method is named 'q'"), -32601, "Method not found", "no method is named 'q'"),
    ],
)
def test_errors_carry_the_code_and_the_text_that_clients_match(error: Any, code: int, message: str, data: str | None) -> None:
    answer = json.loads(encode_exception(1, error))["error"]
    assert (answer["code"], answer["message"], answer.get("data")) == (code, message, data)
