"""The declared schema of JSON-RPC methods: names, parameter types, and the states in which each may be called.

How it works: `method` puts a `Method` into `REGISTRY` when its room is imported. Parameters are a `Params` subclass; `Method.decode` turns
a decoded JSON object into one, or raises `InvalidParameters` that names every unknown, missing or mistyped parameter.

States, as SPDK has them: *startup* (after ``--wait-for-rpc``, before ``framework_start_init``) and *runtime*.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from qpair.errors import InvalidParameters
from qpair.rpc.types import U64_MAX

__all__ = ["REGISTRY", "Method", "Params", "Registry", "method", "schema_type"]


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all parameter objects: keyword-only, unknown names refused."""


@cache
def _fields(params: type[Params]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """msgspec evaluates every annotation at each call, which costs more than most methods do."""
    return msgspec.structs.fields(params)


P = TypeVar("P", bound=Params)
Handler = Callable[[Any, Any], Awaitable[Any]]


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One declared method. ``handler(stack, params)`` is awaited."""

    name: str
    handler: Handler
    params: type[Params] | None
    startup: bool
    runtime: bool
    aliases: tuple[str, ...]
    summary: str

    def fields(self) -> tuple[msgspec.structs.FieldInfo, ...]:
        """The declared parameters, in order."""
        return _fields(self.params) if self.params is not None else ()

    def decode(self, raw: Any) -> Params | None:
        """``raw`` (absent: None) as this method's parameters; `InvalidParameters` names what is wrong."""
        if raw is not None and not isinstance(raw, dict):
            raise InvalidParameters(f"{self.name}: params must be an object of named parameters, got {type(raw).__name__}")
        if self.params is None:
            if raw:
                raise InvalidParameters(f"{self.name} takes no parameters, got {_names(raw)}")
            return None
        given: dict[str, Any] = raw or {}
        declared = {field.encode_name: field for field in self.fields()}
        strict = self.params.__struct_config__.forbid_unknown_fields
        if strict and (unknown := [name for name in given if name not in declared]):
            raise InvalidParameters(f"{self.name}: unknown parameter {_names(unknown)}")
        for name, value in given.items():
            if isinstance(value, int) and not -U64_MAX <= value <= U64_MAX:
                raise InvalidParameters(f"{self.name}: parameter {name!r}: the number is past {U64_MAX}")
        if missing := [name for name, field in declared.items() if field.required and name not in given]:
            raise InvalidParameters(f"{self.name}: missing parameter {_names(missing)}")
        try:
            return msgspec.convert(given, self.params)
        except msgspec.ValidationError as error:
            raise InvalidParameters(f"{self.name}: {_where(str(error))}") from None
        except UnicodeEncodeError as error:
            raise InvalidParameters(f"{self.name}: a text holds {error.object[error.start]!r}, which is half of a character") from None


def _names(names: Any) -> str:
    shown = [repr(name if len(name) <= 64 else name[:61] + "...") for name in list(names)[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _where(message: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.num_blocks`" with the parameter first."""
    what, separator, path = message.partition(" - at `$.")
    return f"parameter '{path.rstrip('`')}': {what}" if separator else message


def schema_type(annotation: Any) -> str:
    """What SPDK's public schema calls a parameter type: "uint32", "string", "boolean", "enum", "uuid", "array", "object"."""
    if get_origin(annotation) is Annotated:
        named = [meta.extra["schema"] for meta in annotation.__metadata__ if isinstance(meta, msgspec.Meta) and meta.extra]
        return str(named[0]) if named else schema_type(get_args(annotation)[0])
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return schema_type(next(argument for argument in arguments if argument is not type(None)))
    if get_origin(annotation) is Literal:
        return "enum"
    plain = {str: "string", bool: "boolean", list: "array", dict: "object", int: "int64", float: "double"}
    return plain.get(get_origin(annotation) or annotation, "object")


class Registry:
    """Methods by name; aliases point at the same `Method`."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._aliases: dict[str, Method] = {}

    def add(self, method: Method) -> None:
        """Declare ``method``; a name in use is a programming error (`ValueError`)."""
        for name in (method.name, *method.aliases):
            if name in self._methods or name in self._aliases:
                raise ValueError(f"JSON-RPC method {name!r} is declared twice")
        self._methods[method.name] = method
        for alias in method.aliases:
            self._aliases[alias] = method

    def get(self, name: str) -> Method | None:
        """The method of that name or alias."""
        return self._methods.get(name) or self._aliases.get(name)

    def names(self, *, aliases: bool = False) -> list[str]:
        """All names, in order of declaration."""
        return [*self._methods, *(self._aliases if aliases else ())]

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())


REGISTRY = Registry()
"""Every method of every imported room."""


def method(
    name: str,
    *,
    params: type[P] | None = None,
    startup: bool = False,
    runtime: bool = True,
    aliases: tuple[str, ...] = (),
    registry: Registry = REGISTRY,
) -> Callable[[Callable[[Any, P], Awaitable[Any]]], Callable[[Any, P], Awaitable[Any]]]:
    """Declare ``async def f(stack, params)`` as the JSON-RPC method ``name``. The function itself stays callable."""

    def declare(handler: Callable[[Any, P], Awaitable[Any]]) -> Callable[[Any, P], Awaitable[Any]]:
        summary = (handler.__doc__ or "").strip().partition("\n")[0]
        registry.add(Method(name=name, handler=handler, params=params, startup=startup, runtime=runtime, aliases=aliases, summary=summary))
        return handler

    return declare
