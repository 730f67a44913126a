"""``qpair rpc METHOD --param value``: any method of a running server.

Parameters are ``--num-blocks 1024`` (or ``--num_blocks=1024``); a value is read as the method declares it, so a name that looks like a number stays a name; a method
that is not declared here gets JSON where the value is JSON, else text. ``--flag`` alone is true, ``--no-flag`` false. ``--json OBJECT`` gives all
parameters at once. The result is printed as JSON, a text as it is; with ``--json`` before the method, JSON in any case.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from qpair.cli.report import INTERRUPTED, Explained, explain, fail, near
from qpair.cli.report import USAGE as USAGE_CODE
from qpair.errors import InvalidArgument, QpairError
from qpair.rpc.address import DEFAULT_ADDRESS
from qpair.rpc.client import RpcClient, RpcError

__all__ = ["parse_params", "rpc"]

USAGE = f"""usage: qpair rpc [-r ADDRESS] [-t SECONDS] [--json] METHOD [--param value ...]
       qpair rpc METHOD --help           the method's parameters

  -r, --rpc-socket ADDRESS  where the server answers: PATH or HOST:PORT
                            (default {DEFAULT_ADDRESS})
  -t, --timeout SECONDS     wait so long for the answer (default 60)
  --json                    before METHOD: print JSON only, errors too
  --json OBJECT             after METHOD: all parameters at once

Examples:
  qpair rpc bdev_malloc_create --num-blocks 131072 --block-size 512 --name disk0
  qpair rpc bdev_get_bdevs --name disk0
  qpair rpc bdev_get_iostat --json '{{"names": ["disk0"]}}'
  qpair rpc rpc_get_methods
"""


@dataclass(slots=True)
class _Head:
    """What stands before the method's parameters."""

    address: str = DEFAULT_ADDRESS
    timeout_s: float = 60.0
    as_json: bool = False
    method: str | None = None
    rest: list[str] = field(default_factory=list)


def rpc(arguments: list[str]) -> int:
    """Call one method; 0 success, 1 the server refused, 2 wrong usage, 3 nobody answers."""
    head = _Head()
    try:
        _read_head(head, list(arguments))
        if head.method is None:
            print(USAGE, end="")
            return 0
        if head.rest in (["--help"], ["-h"]):
            return _help(head.method, as_json=head.as_json)
        params = parse_params(head.method, head.rest)
    except InvalidArgument as error:
        if not head.as_json:
            print(USAGE, file=sys.stderr)
        return fail("rpc", Explained(str(error), error.code, USAGE_CODE), as_json=head.as_json)
    try:
        with RpcClient(head.address, timeout_s=head.timeout_s) as client:
            result = client.call(head.method, **params)
    except KeyboardInterrupt:
        return INTERRUPTED
    except QpairError as error:
        return fail("rpc", explain(error, address=head.address, method=_refused(error, head.method), params=params), as_json=head.as_json)
    print(result if isinstance(result, str) and not head.as_json else json.dumps(result, indent=2))
    return 0


def _refused(error: QpairError, method: str) -> str | None:
    """The method, where it was called at all."""
    return method if isinstance(error, RpcError) else None


def _read_head(head: _Head, arguments: list[str]) -> None:
    while arguments:
        first = arguments.pop(0)
        if first in ("-h", "--help"):
            return
        if first == "--json":
            head.as_json = True
        elif first in ("-r", "-s", "--rpc-socket", "-t", "--timeout"):
            if not arguments:
                raise InvalidArgument(f"{first} needs a value")
            value = arguments.pop(0)
            if first in ("-t", "--timeout"):
                head.timeout_s = _seconds(first, value)
            else:
                head.address = value
        elif first.startswith("-"):
            raise InvalidArgument(f"{first} stands before the method; parameters come after it")
        else:
            head.method, head.rest = first, arguments
            return
    raise InvalidArgument("which method?")


def _seconds(flag: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise InvalidArgument(f"{flag} {value!r} is no number of seconds") from None
    if not 0 < seconds <= 86400:
        raise InvalidArgument(f"{flag} {value} is not above 0 and up to 86400 s")
    return seconds


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


def _help(method: str, *, as_json: bool) -> int:
    from qpair.app.rooms import load_rpc
    from qpair.rpc.registry import REGISTRY, schema_type

    load_rpc()
    found = REGISTRY.get(method)
    if found is None:
        guesses = near(method, REGISTRY.names(aliases=True))
        hints = [f"did you mean {' or '.join(guesses)}?"] if guesses else []
        hints.append("a server may know it all the same: qpair rpc rpc_get_methods")
        return fail("rpc", Explained(f"{method} is not declared here", -32601, hints=hints), as_json=as_json)
    fields = [(field.encode_name, schema_type(field.type), field.required) for field in found.fields()]
    if as_json:
        params = [{"name": name, "type": kind, "required": required} for name, kind, required in fields]
        print(json.dumps({"method": found.name, "summary": found.summary, "params": params}, indent=2))
        return 0
    print(f"{found.name}: {found.summary}")
    for name, kind, required in fields:
        print(f"  --{name.replace('_', '-'):<30} {kind:<8} {'required' if required else 'optional'}")
    return 0
