"""Our declared parameters against SPDK's public schema, where a copy of it is at hand, and against facts of our own.

The copy is not part of this repository: QPAIR_SPDK_SCHEMA names it, or it lies as schema/schema.yaml in a checkout named by SPDK_DIR.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qpair.app.rooms import load_rpc
from qpair.rpc.registry import REGISTRY, schema_type

load_rpc()

# method -> (parameter, type, required), as public documentation of SPDK 26.09 states them
FACTS: dict[str, list[tuple[str, str, bool]]] = {
    "bdev_malloc_delete": [("name", "string", True)],
    "bdev_null_resize": [("name", "string", True), ("new_size", "uint64", True)],
    "bdev_uring_create": [("filename", "string", True), ("name", "string", True), ("block_size", "uint32", False), ("uuid", "uuid", False)],
    "bdev_get_bdevs": [("name", "string", False), ("timeout", "uint64", False)],
    "rpc_get_methods": [("current", "boolean", False), ("include_aliases", "boolean", False)],
    "spdk_kill_instance": [("sig_name", "enum", True)],
    "log_set_level": [("level", "enum", True)],
    "framework_start_init": [],
    "sock_set_default_impl": [("impl_name", "string", True)],
}

# Enumerations of methods without effect are kept as text, bit masks as arrays of text: any value is remembered.
LOOSE = {("string", "enum"), ("array", "bitmask")}


def declared(name: str) -> dict[str, tuple[str, bool]]:
    method = REGISTRY.get(name)
    assert method is not None
    return {field.encode_name: (schema_type(field.type), field.required) for field in method.fields()}


@pytest.mark.parametrize("name", sorted(FACTS))
def test_declared_parameters_are_the_documented_ones(name: str) -> None:
    assert declared(name) == {parameter: (kind, required) for parameter, kind, required in FACTS[name]}


def schema() -> dict[str, Any]:
    named = os.environ.get("QPAIR_SPDK_SCHEMA") or os.path.join(os.environ.get("SPDK_DIR", ""), "schema", "schema.yaml")
    if not Path(named).is_file():
        pytest.skip("no copy of SPDK's schema.yaml: set QPAIR_SPDK_SCHEMA or SPDK_DIR")
    yaml = pytest.importorskip("yaml", reason="reading SPDK's schema.yaml needs PyYAML")
    return {method["name"]: method for method in yaml.safe_load(Path(named).read_text())["methods"]}


def test_every_method_says_what_spdks_schema_says() -> None:
    theirs = schema()
    differences: list[str] = []
    for method in REGISTRY:
        if method.name.startswith("qpair_"):
            continue
        if method.name not in theirs:
            differences.append(f"{method.name}: not in the schema")
            continue
        wanted = {item["name"]: (item["type"], bool(item.get("required"))) for item in theirs[method.name].get("params", [])}
        ours = declared(method.name)
        for name in wanted.keys() | ours.keys():
            one, other = ours.get(name), wanted.get(name)
            if one != other and not (one and other and one[1] == other[1] and (one[0], other[0]) in LOOSE):
                differences.append(f"{method.name}.{name}: ours {one}, schema {other}")
    assert differences == []


def test_methods_without_effect_are_allowed_when_spdk_allows_them() -> None:
    early = {method.name for method in REGISTRY if method.startup and not method.runtime}
    assert {"bdev_set_options", "iobuf_set_options", "sock_impl_set_options", "nvmf_set_config", "framework_start_init"} <= early
    both = {method.name for method in REGISTRY if method.startup and method.runtime}
    assert {"bdev_nvme_set_options", "framework_set_scheduler", "rpc_get_methods", "spdk_get_version", "log_set_level"} <= both
