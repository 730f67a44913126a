"""Every method against generated requests: a result or a named error, what is wrong refused by name, and nothing left behind. `make fuzz` runs the same for long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rpc_requests
from qpair.errors import InvalidParameters
from qpair.rpc.registry import REGISTRY

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "rpc").glob("*.json"))


@pytest.mark.parametrize("seed", range(4))
def test_generated_requests_are_answered_by_a_result_or_a_named_error(engine_factory: Callable[..., Any], seed: int) -> None:
    asked = asyncio.run(rpc_requests.check(rpc_requests.Seeded(seed), 1000, engine_factory=engine_factory))
    assert asked >= 1000


@pytest.mark.parametrize("vector", VECTORS, ids=lambda path: path.stem)
def test_what_fuzzing_found_stays_repaired(engine_factory: Callable[..., Any], vector: Path) -> None:
    asyncio.run(rpc_requests.replay(json.loads(vector.read_text()), engine_factory))


@pytest.mark.parametrize("name", REGISTRY.names())
def test_parameters_decode_or_are_refused_by_name(name: str) -> None:
    """Each method alone, 200 times: what fits the declared schema passes it as it was sent, what does not is refused by the method's name and the parameter's."""
    method = REGISTRY.get(name)
    assert method is not None
    choice = rpc_requests.Seeded(len(name))
    verdicts = set()
    for _ in range(200):
        made = rpc_requests.request(choice, [name])
        raw = None if made.params is None else json.loads(made.params)
        if made.wrong is not None and isinstance(raw, dict) and made.params != json.dumps(raw, separators=(",", ":")):
            continue  # one was given twice: refused before this
        verdicts.add(made.wrong is None)
        if made.wrong is None:
            decoded = method.decode(raw)
            for field in method.fields():
                if (given := (raw or {}).get(field.encode_name)) is not None and not isinstance(given, dict):
                    assert getattr(decoded, field.name) == given
        else:
            with pytest.raises(InvalidParameters) as caught:
                method.decode(raw)
            assert str(caught.value).startswith(name)
            assert json.dumps(made.wrong)[1:-1][:20] in json.dumps(str(caught.value))
    assert verdicts == {True, False}
