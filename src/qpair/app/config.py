"""Configuration files: SPDK's JSON format, loaded and saved.

Format: ``{"subsystems": [{"subsystem": "bdev", "config": [{"method": ..., "params": {...}}, ...]}, ...]}``; ``config`` may be null, an entry may be an array of
entries (a batch), and ``/* */`` and ``//`` comments are taken out first.

How it works: `parse` checks the whole file before anything is called. `load_startup` calls the entries whose methods belong to the startup state,
then the subsystems start, then `load_runtime` calls the rest, in the order of the file. The first refusal stops the load.

Errors: `ConfigError` names the file, the subsystem, the entry's number from 1, the method and the field. Limits: 16 MiB, 65536 entries.

`save` writes beside the target, syncs, and renames: the file is the old one or the new one, whole, at any instant.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from qpair.errors import ConfigError, NoSuchFile, QpairError, from_errno
from qpair.rpc.dispatch import call
from qpair.rpc.protocol import duplicates_in, loads
from qpair.rpc.registry import REGISTRY, Method

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["Config", "Entry", "load", "load_runtime", "load_startup", "parse", "read", "save", "snapshot"]

logger = logging.getLogger("qpair.app")

FILE_BYTES_MAX = 16 << 20
ENTRIES_MAX = 65536

# What is never closed reaches to the end of the file: else each of a million openings would be looked at to the end.
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*+\\?(?:"|\Z))|/\*.*?(?:\*/|\Z)|//[^\n]*', re.DOTALL)


class Entry(msgspec.Struct, frozen=True):
    """One call of a configuration, and where it stands."""

    subsystem: str
    number: int
    method: str
    params: dict[str, Any] | None

    def where(self) -> str:
        """ "subsystem 'bdev', entry 3, method 'bdev_malloc_create'"."""
        return f"subsystem {self.subsystem!r:.80}, entry {self.number}, method {self.method!r:.80}"


class Config(msgspec.Struct):
    """A parsed configuration: its calls in order, not yet called."""

    source: str
    entries: list[Entry] = msgspec.field(default_factory=list)


def read(path: str | os.PathLike[str]) -> Config:
    """Read and `parse` a file."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise NoSuchFile(f"configuration {name}: no such file") from None
    except OSError as error:
        raise from_errno(error.errno or 5, f"configuration {name}: {error.strerror}") from error
    return parse(data, source=name)


def parse(data: bytes, *, source: str = "configuration") -> Config:
    """Check the shape of everything, the names of all methods and all parameters; `ConfigError` otherwise."""
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{source}: longer than {FILE_BYTES_MAX} bytes")
    try:
        text = _COMMENT.sub(lambda match: match[1] or " ", data.decode("utf-8"))
        value = loads(text.encode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{source}: not JSON: {reason[:200]}") from None
    if not isinstance(value, dict) or not isinstance(value.get("subsystems"), list):
        raise ConfigError(f"{source}: it must be an object with an array 'subsystems'")
    if twice := duplicates_in(value):
        raise ConfigError(f"{source}: {twice[0][:64]!r} is given twice in one object")
    config = Config(source)
    for index, item in enumerate(value["subsystems"], 1):
        if not isinstance(item, dict) or not isinstance(item.get("subsystem"), str):
            raise ConfigError(f"{source}: subsystems, element {index}: it must be an object with a string 'subsystem'")
        calls = item.get("config")
        if calls is not None and not isinstance(calls, list):
            raise ConfigError(f"{source}: subsystem {item['subsystem']!r:.80}: 'config' must be an array or null")
        for number, (raw, inside) in enumerate(_flat(calls or []), 1):
            config.entries.append(_entry(source, item["subsystem"], number, raw, inside))
            if len(config.entries) > ENTRIES_MAX:
                raise ConfigError(f"{source}: more than {ENTRIES_MAX} entries")
    return config


def _flat(calls: list[Any]) -> Iterator[tuple[Any, bool]]:
    for item in calls:
        if isinstance(item, list):
            yield from ((inner, True) for inner in item)
        else:
            yield item, False


def _entry(source: str, subsystem: str, number: int, raw: Any, inside: bool) -> Entry:
    where = f"{source}: subsystem {subsystem!r:.80}, entry {number}"
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: it must be an object with 'method'{' (batches do not nest)' if inside else ''}")
    if unknown := [name for name in raw if name not in ("method", "params")]:
        raise ConfigError(f"{where}: unknown member {unknown[0][:64]!r}; an entry has 'method' and 'params'")
    name, params = raw.get("method"), raw.get("params")
    if not isinstance(name, str):
        raise ConfigError(f"{where}: 'method' must be a string")
    if params is not None and not isinstance(params, dict):
        raise ConfigError(f"{where}, method {name!r:.80}: 'params' must be an object")
    method = REGISTRY.get(name)
    entry = Entry(subsystem, number, name, params)
    if method is None:
        raise ConfigError(f"{source}: {entry.where()}: no such method")
    try:
        method.decode(params)
    except QpairError as error:
        raise ConfigError(f"{source}: {entry.where()}: {error}") from None
    return entry


async def load(stack: Stack, config: Config) -> None:
    """All of it: what belongs to startup, then the subsystems (if the stack still waits), then the rest."""
    if stack.state == "startup":
        await load_startup(stack, config)
        await stack.start_subsystems()
        await load_runtime(stack, config)
        return
    for entry in config.entries:
        if not _method(entry).runtime:
            logger.warning("%s: %s: skipped, it may only be called before the subsystems start", config.source, entry.where())
            continue
        await _call(stack, config, entry)


async def load_startup(stack: Stack, config: Config) -> None:
    """The calls that the startup state allows."""
    for entry in config.entries:
        if _method(entry).startup:
            await _call(stack, config, entry)


async def load_runtime(stack: Stack, config: Config) -> None:
    """The calls that `load_startup` left."""
    for entry in config.entries:
        if not _method(entry).startup:
            await _call(stack, config, entry)


def _method(entry: Entry) -> Method:
    method = REGISTRY.get(entry.method)
    assert method is not None  # `parse` has refused the others
    return method


async def _call(stack: Stack, config: Config, entry: Entry) -> None:
    try:
        await call(stack, entry.method, entry.params)
    except QpairError as error:
        reason = error.message if error.message == error.text else f"{error.text}: {error.message}"
        raise ConfigError(f"{config.source}: {entry.where()}: {reason}") from error


def snapshot(stack: Stack) -> dict[str, Any]:
    """The present configuration in the file's form: what ``spdk-rpc save_config`` gathers."""
    return {"subsystems": [{"subsystem": name, "config": stack.config(name)} for name in stack.subsystem_order()]}


def save(stack: Stack, path: str | os.PathLike[str]) -> None:
    """Write `snapshot` to ``path``, atomically, mode 0600."""
    target = os.path.abspath(os.fspath(path))
    text = json.dumps(snapshot(stack), indent=2) + "\n"
    directory = os.path.dirname(target)
    temporary = f"{target}.{secrets.token_hex(6)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_errno(error.errno or 5, f"configuration {target}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise from_errno(error.errno or 5, f"configuration {target}: {error.strerror}") from error
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
