"""qpair's own methods as commands of SPDK's client: ``spdk-rpc --plugin qpair.rpc.spdk_plugin qpair_bdev_set_limits --name disk0 ...``.

How it works: spdk-rpc calls `spdk_rpc_plugin_initialize` with its sub-commands; every declared method whose name begins with ``qpair_`` becomes one more, with an option for each parameter,
required where it is declared so. Values are read as ``qpair rpc`` reads them: texts as they are, everything else as JSON (``--superblock true``, ``--names '["a"]'``).

Errors: those of spdk-rpc, which prints what the server answers.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["spdk_rpc_plugin_initialize"]


def spdk_rpc_plugin_initialize(subparsers: Any) -> None:
    """Called by spdk-rpc."""
    from qpair.app.rooms import load_rpc
    from qpair.rpc.registry import REGISTRY, schema_type

    load_rpc()
    for method in REGISTRY:
        if not method.name.startswith("qpair_"):
            continue
        parser = subparsers.add_parser(method.name, help=method.summary, description=method.summary)
        for field in method.fields():
            kind = schema_type(field.type)
            reads = str if kind in ("string", "uuid", "enum") else _json
            flags = dict.fromkeys((f"--{field.encode_name.replace('_', '-')}", f"--{field.encode_name}"))
            parser.add_argument(*flags, dest=field.encode_name, type=reads, required=field.required, metavar=kind.upper())
        parser.set_defaults(func=_caller(method.name, [field.encode_name for field in method.fields()]))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from None


def _caller(name: str, parameters: list[str]) -> Any:
    def call(arguments: argparse.Namespace) -> None:
        given = {key: value for key in parameters if (value := getattr(arguments, key)) is not None}
        print(json.dumps(arguments.client.call(name, given), indent=2))

    return call
