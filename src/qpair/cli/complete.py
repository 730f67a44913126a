"""Shell completion: what may stand at a place of the command line, asked of the running server where that knows it.

How it works: typer calls a function here for the word under the cursor. Names of bdevs and methods come from the server that the line names with ``-r`` (else the default one),
which gets `TIMEOUT_S` to answer; where none does, methods are those declared here, and bdevs none. Nothing is ever printed but completions.

Errors: none; a completion that fails completes nothing.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from qpair.rpc.address import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from argparse import ArgumentParser

__all__ = ["RpcCommand", "ServeCommand", "bdevs", "files", "join_colons", "patterns", "sockets", "targets", "words"]

TIMEOUT_S = 0.3
SOCKET_PLACES = ("/var/tmp/*.sock", "/tmp/*.sock", "*.sock")


@dataclass(frozen=True, slots=True)
class _Item:
    """What the shell's formatters want of a completion."""

    value: str
    help: str | None = None
    type: str = "plain"


def words(*known: str) -> Callable[[str], list[str]]:
    """A completion that offers ``known``."""

    def offered(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return offered


def bdevs(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of the server's bdevs, with size and kind."""
    return [(name, told) for name, told in _bdevs(ctx.params.get("address") or DEFAULT_ADDRESS) if name.startswith(incomplete)]


def targets(ctx: typer.Context, incomplete: str) -> list[str]:
    """Forms of a target; after ``bdev:`` the server's bdevs, after ``file:`` and ``vhost:`` paths."""
    kind, separator, rest = incomplete.partition(":")
    if not separator:
        return [f"{form}:" for form in ("bdev", "file", "malloc", "null", "python", "vhost") if form.startswith(incomplete)]
    if kind == "bdev":
        return [f"bdev:{name}" for name, _ in _bdevs(ctx.params.get("address") or DEFAULT_ADDRESS) if name.startswith(rest)]
    return [f"{kind}:{path}" for path in files(rest)] if kind in ("file", "vhost") else []


def join_colons(environ: MutableMapping[str, str]) -> str:
    """bash takes a colon for the end of a word; here a target is one word. The words that it passes are put together again; the result is what bash has
    already of the last one, and does not want to be offered again."""
    if environ.get("_QPAIR_COMPLETE") != "complete_bash":
        return ""
    given = environ.get("COMP_WORDS", "").split("\n")
    at = int(environ.get("COMP_CWORD", "0"))
    words: list[str] = []
    for index, word in enumerate(given[: at + 1]):
        glued = bool(words) and index and (word == ":" or given[index - 1] == ":")
        if glued:
            words[-1] += word
        else:
            words.append(word)
    environ["COMP_WORDS"] = "\n".join(words)
    environ["COMP_CWORD"] = str(len(words) - 1)
    return words[-1].rpartition(":")[0] + ":" if len(words) <= at and ":" in words[-1] else ""


def patterns(incomplete: str) -> list[str]:
    """Patterns of `qpair perf`."""
    from qpair.bdev.perf import PATTERNS

    return [pattern for pattern in PATTERNS if pattern.startswith(incomplete)]


def files(incomplete: str) -> list[str]:
    """Paths that begin so; directories with a slash."""
    found = sorted(glob.glob(glob.escape(os.path.expanduser(incomplete)) + "*"))
    return [path + "/" if os.path.isdir(path) else path for path in found]


def sockets(incomplete: str) -> list[str]:
    """Sockets where servers usually listen, and paths that begin so."""
    from qpair.cli.targets import is_socket

    if incomplete:
        return files(incomplete)
    return sorted({path for place in SOCKET_PLACES for path in glob.glob(place) if is_socket(path)})


class RpcCommand(TyperCommand):
    """``qpair rpc``: options, then a method, then its parameters."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """What may come next."""
        with contextlib.suppress(Exception):
            return _rpc_items(list(ctx.args), incomplete)
        return []


class ServeCommand(TyperCommand):
    """``qpair serve``: the flags that argparse knows."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """What may come next."""
        with contextlib.suppress(Exception):
            from qpair.cli.serve import parser

            return _flag_items(parser(), list(ctx.args), incomplete)
        return []


def _rpc_items(before: list[str], incomplete: str) -> list[_Item]:
    address, method, rest, wants = DEFAULT_ADDRESS, None, list(before), None
    while rest and method is None:
        word = rest.pop(0)
        if word in ("-r", "-s", "--rpc-socket", "-t", "--timeout"):
            wants = word
            if rest:
                value, wants = rest.pop(0), None
                address = value if word not in ("-t", "--timeout") else address
        elif not word.startswith("-"):
            method = word
    if wants is not None:
        return [_Item(path) for path in sockets(incomplete)] if wants not in ("-t", "--timeout") else []
    if method is None:
        if incomplete.startswith("-"):
            return _matching(
                {"--rpc-socket": "where the server answers", "--timeout": "seconds to wait", "--json": "print JSON only"}, incomplete
            )
        return _matching(_methods(address), incomplete)
    if rest and rest[-1].startswith("--") and "=" not in rest[-1] and not incomplete.startswith("-"):
        return [_Item(name, told) for name, told in _bdevs(address) if name.startswith(incomplete)]
    given = {word.partition("=")[0] for word in rest}
    return [item for item in _matching(_parameters(method), incomplete) if item.value not in given]


def _flag_items(parser: ArgumentParser, before: list[str], incomplete: str) -> list[_Item]:
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    last = actions.get(before[-1]) if before else None
    if last is not None and last.nargs != 0:
        choices: Iterable[Any] = last.choices or files(incomplete)
        return [_Item(str(choice)) for choice in choices if str(choice).startswith(incomplete)]
    shown = {action.option_strings[-1]: (action.help or "") % {"default": action.default, **vars(action)} for action in actions.values()}
    return _matching(shown, incomplete)


def _matching(known: dict[str, str], incomplete: str) -> list[_Item]:
    return [_Item(word, told or None) for word, told in known.items() if word.startswith(incomplete)]


def _methods(address: str) -> dict[str, str]:
    from qpair.app.rooms import load_rpc
    from qpair.rpc.registry import REGISTRY

    load_rpc()
    declared = {entry.name: entry.summary for entry in REGISTRY}
    answer = _ask(address, "rpc_get_methods")
    names = [str(name) for name in answer] if isinstance(answer, list) else declared
    return {name: declared.get(name, "") for name in sorted(names)}


def _parameters(method: str) -> dict[str, str]:
    from qpair.app.rooms import load_rpc
    from qpair.rpc.registry import REGISTRY, schema_type

    load_rpc()
    found = REGISTRY.get(method)
    if found is None:
        return {}
    return {
        f"--{field.encode_name.replace('_', '-')}": f"{schema_type(field.type)}{', required' if field.required else ''}"
        for field in found.fields()
    }


def _bdevs(address: str) -> list[tuple[str, str]]:
    from qpair.app.sizes import format_size

    answer = _ask(address, "bdev_get_bdevs")
    if not isinstance(answer, list):
        return []
    return [
        (str(bdev["name"]), f"{format_size(bdev['num_blocks'] * bdev['block_size'])} {bdev.get('product_name', '')}".strip())
        for bdev in answer
    ]


def _ask(address: str, method: str) -> Any:
    from qpair.errors import QpairError
    from qpair.rpc.client import RpcClient

    try:
        with RpcClient(address, timeout_s=TIMEOUT_S) as client:
            return client.call(method)
    except (QpairError, OSError, ValueError, KeyError):
        return None
