"""Every method against generated requests: a result or a named error, and nothing left behind. `make fuzz` runs the same for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rpc_requests
from qpair.errors import InvalidParameters
from qpair.rpc.registry import REGISTRY


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(made=rpc_requests.requests)
def test_generated_requests_are_answered_by_a_result_or_a_named_error(engine_factory: Callable[..., Any], made: list[Any]) -> None:
    asyncio.run(rpc_requests.check(made, engine_factory))


@pytest.mark.parametrize("name", REGISTRY.names())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parameters_decode_or_are_refused_by_name(name: str, data: st.DataObject) -> None:
    """Each method alone: what `Method.decode` lets through is of the declared types, and what it refuses names the method."""
    method = REGISTRY.get(name)
    assert method is not None
    raw = data.draw(rpc_requests.params(method))
    refusal, decoded = "", None
    try:
        decoded = method.decode(raw)
    except InvalidParameters as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith((f"{name}: ", f"{name} takes no parameters"))
        return
    assert (decoded is None) == (method.params is None)
    for field in method.fields():
        given_value = (raw or {}).get(field.encode_name)
        if given_value is not None:
            assert getattr(decoded, field.name) == given_value
