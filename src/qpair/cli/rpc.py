"""``qpair rpc METHOD --param value``: any method of a running server.

Parameters are ``--num-blocks 1024`` (or ``--num_blocks=1024``); a value is read as the method declares it, so a name that looks like a number stays a name; a method
that is not declared here gets JSON where the value is JSON, else text. ``--flag`` alone is true, ``--no-flag`` false. ``--json OBJECT`` gives all
parameters at once. The result is printed as JSON, a text as it is.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from qpair.errors import InvalidArgument, QpairError
from qpair.rpc.address import DEFAULT_ADDRESS
from qpair.rpc.client import RpcClient, RpcError, Unreachable

__all__ = ["parse_params", "rpc"]

USAGE = f"""usage: qpair rpc [-r PATH|HOST:PORT] [-t SECONDS] METHOD [--param value ...] [--json OBJECT]
       qpair rpc METHOD --help        the method's parameters

  -r, --rpc-socket  where the server answers (default {DEFAULT_ADDRESS})
  -t, --timeout     seconds to wait for the answer (default 60)

Examples: qpair rpc bdev_malloc_create --num-blocks 131072 --block-size 512 --name disk0
          qpair rpc bdev_get_bdevs
          qpair rpc rpc_get_methods
"""


def rpc(arguments: list[str]) -> int:
    """Call one method; 0 success, 1 the server refused, 2 wrong usage, 3 nobody answers."""
    try:
        address, timeout_s, method, rest = _head(list(arguments))
        if method is None:
            print(USAGE, end="")
            return 0
        if rest in (["--help"], ["-h"]):
            return _help(method)
        params = parse_params(method, rest)
    except InvalidArgument as error:
        print(f"qpair rpc: {error}\n{USAGE}", file=sys.stderr, end="")
        return 2
    try:
        with RpcClient(address, timeout_s=timeout_s) as client:
            result = client.call(method, **params)
    except Unreachable as error:
        print(f"qpair rpc: {error}", file=sys.stderr)
        return 3
    except RpcError as error:
        print(f"qpair rpc: {method}: {error} (code {error.code})", file=sys.stderr)
        if error.code == -32601:
            print("qpair rpc: 'qpair rpc rpc_get_methods' lists what there is", file=sys.stderr)
        elif error.code == -32602:
            print(f"qpair rpc: 'qpair rpc {method} --help' lists its parameters", file=sys.stderr)
        return 1
    except QpairError as error:
        print(f"qpair rpc: {error}", file=sys.stderr)
        return 2
    print(result if isinstance(result, str) else json.dumps(result, indent=2))
    return 0


def _head(arguments: list[str]) -> tuple[str, float, str | None, list[str]]:
    address, timeout_s = DEFAULT_ADDRESS, 60.0
    while arguments:
        first = arguments.pop(0)
        if first in ("-h", "--help"):
            return address, timeout_s, None, []
        if first in ("-r", "-s", "--rpc-socket", "-t", "--timeout"):
            if not arguments:
                raise InvalidArgument(f"{first} needs a value")
            value = arguments.pop(0)
            if first not in ("-t", "--timeout"):
                address = value
                continue
            try:
                timeout_s = float(value)
            except ValueError:
                raise InvalidArgument(f"{first} {value!r} is no number of seconds") from None
            if not 0 < timeout_s <= 86400:
                raise InvalidArgument(f"{first} {value} is not above 0 and up to 86400 s")
        elif first.startswith("-"):
            raise InvalidArgument(f"{first} stands before the method; parameters come after it")
        else:
            return address, timeout_s, first, arguments
    raise InvalidArgument("which method?")


def parse_params(method: str, arguments: list[str]) -> dict[str, Any]:
    """The parameters in ``arguments`` as ``method`` declares them."""
    params: dict[str, Any] = {}
    texts = _declared_texts(method)
    position = 0
    while position < len(arguments):
        option = arguments[position]
        position += 1
        if not option.startswith("--") or len(option) == 2:
            raise InvalidArgument(f"{option!r}: write parameters as --name value")
        name, separator, value = option[2:].partition("=")
        name = name.replace("-", "_")
        has_value = bool(separator) or (position < len(arguments) and not arguments[position].startswith("--"))
        if has_value and not separator:
            value = arguments[position]
            position += 1
        if name == "json" and "json" not in texts:
            params.update(_object(value))
        elif name in params:
            raise InvalidArgument(f"parameter {name!r} is given twice")
        elif has_value:
            params[name] = value if texts.get(name) is True else _value(value)
        elif name.startswith("no_") and name not in texts:
            params[name[3:]] = False
        else:
            params[name] = True
    return params


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"--json: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument("--json: it must be an object")
    return value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _declared_texts(method: str) -> dict[str, bool]:
    """Parameter -> whether it is a text, for a method declared here."""
    from qpair.app.rooms import load_rpc
    from qpair.rpc.registry import REGISTRY, schema_type

    load_rpc()
    found = REGISTRY.get(method)
    return (
        {field.encode_name: schema_type(field.type) in ("string", "uuid", "enum") for field in found.fields()} if found is not None else {}
    )


def _help(method: str) -> int:
    from qpair.app.rooms import load_rpc
    from qpair.rpc.registry import REGISTRY, schema_type

    load_rpc()
    found = REGISTRY.get(method)
    if found is None:
        print(f"qpair rpc: {method} is not declared here; the server may know it: qpair rpc rpc_get_methods", file=sys.stderr)
        return 1
    print(f"{found.name}: {found.summary}")
    for field in found.fields():
        needed = "required" if field.required else "optional"
        print(f"  --{field.encode_name.replace('_', '-'):<30} {schema_type(field.type):<8} {needed}")
    return 0
