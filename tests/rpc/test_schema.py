"""Our declared parameters against SPDK's: its public schema, and what its own client sends.

``spdk_parameters.txt`` holds the facts of that schema: one method a line, and of each parameter the name, the type, the values of an enumeration, and whether it
is required (``!``). The schema itself is not part of this repository; where a copy is at hand (QPAIR_SPDK_SCHEMA names it, or SPDK_DIR a checkout) the facts are
checked against it, and ``python tests/rpc/test_schema.py COPY > tests/rpc/spdk_parameters.txt`` writes them anew.

What spdk-rpc sends is found out by asking its own argument parser (``pip install spdk``), with a client that only records.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from missing import missing
from qpair.app.rooms import load_rpc
from qpair.errors import InvalidParameters
from qpair.rpc.registry import REGISTRY, Method, schema_type

load_rpc()

FACTS = Path(__file__).parent / "spdk_parameters.txt"

# Values of enumerations of methods without effect are kept as text, bit masks as arrays of text: any value is remembered.
LOOSE = {("string", "enum"), ("array", "bitmask")}


def facts() -> dict[str, list[str]]:
    """Method -> ``name:type!`` or ``name:enum(a|b)``."""
    lines = [line.split() for line in FACTS.read_text().splitlines() if line and not line.startswith("#")]
    return {name: parameters for name, *parameters in lines}


def from_schema(path: str) -> dict[str, list[str]]:
    yaml = pytest.importorskip("yaml", reason="reading SPDK's schema.yaml needs PyYAML")
    schema = yaml.safe_load(Path(path).read_text())
    enums = {enum["name"]: "|".join(field["name"] for field in enum["fields"]) for enum in schema["enums"]}
    found = {}
    for method in schema["methods"]:
        found[method["name"]] = [
            f"{item['name']}:{item['type']}"
            + (f"({enums[item['class']]})" if item["type"] == "enum" else "")
            + ("!" if item.get("required") else "")
            for item in method.get("params", [])
        ]
    return found


def values(annotation: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, also of one that may be None."""
    arguments = get_args(annotation)
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return arguments
    return next((found for argument in arguments if (found := values(argument))), ())


def ours(method: Method) -> list[str]:
    said = []
    for field in method.fields():
        kind = schema_type(field.type)
        listed = f"({'|'.join(values(field.type))})" if kind == "enum" else ""
        said.append(f"{field.encode_name}:{kind}{listed}{'!' if field.required else ''}")
    return said


def agree(mine: str | None, theirs: str | None) -> bool:
    if mine is None or theirs is None:
        return False
    if mine.endswith("!") != theirs.endswith("!"):
        return False
    kind, wanted = (text.rstrip("!").partition(":")[2] for text in (mine, theirs))
    if (kind.partition("(")[0], wanted.partition("(")[0]) in LOOSE:
        return True
    if kind.startswith("enum(") and wanted.startswith("enum("):
        return set(kind[5:-1].split("|")) == set(wanted[5:-1].split("|"))
    return kind == wanted


def spdks() -> list[str]:
    return [method.name for method in REGISTRY if not method.name.startswith("qpair_")]


@pytest.mark.parametrize("name", spdks())
def test_a_method_has_the_parameters_types_and_enumerations_that_spdks_schema_says(name: str) -> None:
    method = REGISTRY.get(name)
    assert method is not None
    theirs = {text.partition(":")[0]: text for text in facts()[name]}
    mine = {text.partition(":")[0]: text for text in ours(method)}
    differences = [(mine.get(key), theirs.get(key)) for key in theirs.keys() | mine.keys() if not agree(mine.get(key), theirs.get(key))]
    assert differences == [], "(ours, SPDK's)"


def test_the_facts_are_those_of_the_schema() -> None:
    named = os.environ.get("QPAIR_SPDK_SCHEMA") or os.path.join(os.environ.get("SPDK_DIR", ""), "schema", "schema.yaml")
    if not Path(named).is_file():
        assert len(facts()) > 250, "without a copy of the schema, the facts are what they were when they were written"
        return
    assert facts() == from_schema(named)


class Recorder:
    """A client of spdk-rpc that sends nothing. What a method answers, the command may look at."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda **params: self.call(name, params)

    def call(self, name: str, params: dict[str, Any] | None = None) -> Any:
        self.calls.append((name, dict(params or {})))
        return []


@pytest.fixture(scope="module")
def commands() -> dict[str, argparse.ArgumentParser]:
    """spdk-rpc's sub-commands by name."""
    before = list(sys.path)
    try:
        from spdk import spdk_rpc
    except ImportError as error:
        missing("spdk", error)
    finally:
        sys.path[:] = before
    _, subparsers = spdk_rpc.create_parser()
    found: dict[str, argparse.ArgumentParser] = subparsers.choices
    return found


# One of these is a value of each text that a command takes: a name, a UUID, a mask, numbers, lists, hexadecimal digits, an address.
WORDS = ("name0", "6f1c0000-0000-4000-8000-0000000000aa", "0x1", "1", "16", "[0]", "a:1", "8:0", "all", "00112233445566778899aabbccddeeff")


def candidates(action: argparse.Action) -> Iterator[list[str]]:
    """What to write on the command line for one argument, in several ways."""
    flag = [action.option_strings[0]] if action.option_strings else []
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        yield flag
        return
    for word in action.choices or WORDS:
        yield [*flag, str(word)]


def said(commands: dict[str, argparse.ArgumentParser], method: Method, words: list[str]) -> dict[str, Any] | None:
    """The parameters that spdk-rpc sends for these words; None when it refuses them, or our method does."""
    recorder = Recorder()
    try:
        arguments = commands[method.name].parse_args(words)
        arguments.client = recorder
        arguments.func(arguments)
    except (SystemExit, ValueError, TypeError, KeyError, IndexError, AttributeError, argparse.ArgumentError, OSError):
        pass
    for name, params in recorder.calls:
        if name == method.name:
            given = {key: value for key, value in params.items() if value is not None}
            try:
                method.decode(given)
            except InvalidParameters:
                return None
            return given
    return None


def required(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    groups = [group._group_actions[0] for group in parser._mutually_exclusive_groups if group.required]
    return [action for action in parser._actions if (action.required and action.nargs not in ("*", "?")) or action in groups]


def test_our_methods_take_whatever_spdk_rpc_sends(commands: dict[str, argparse.ArgumentParser], capsys: pytest.CaptureFixture[str]) -> None:
    """Each option of each command in a value that both sides take; and each parameter of ours is one that some option sends."""
    refused: list[str] = []
    unsaid: list[str] = []
    covered = 0
    for name in spdks():
        method, parser = REGISTRY.get(name), commands.get(name)
        assert method is not None
        if parser is None:
            continue
        covered += 1
        needed = required(parser)
        combinations = itertools.islice(itertools.product(*(list(candidates(action)) for action in needed)), 5000)
        minimal = next(
            (words for each in combinations if said(commands, method, words := [*itertools.chain.from_iterable(each)]) is not None), None
        )
        if minimal is None:
            refused.append(f"{name}: {[action.dest for action in needed]}")
            continue
        sent = set(said(commands, method, minimal) or {})
        for action in parser._actions:
            if action in needed or isinstance(action, argparse._HelpAction):
                continue
            taken = [given for words in candidates(action) if (given := said(commands, method, [*minimal, *words])) is not None]
            if not taken:
                refused.append(f"{name}: {action.option_strings or action.dest}")
            sent.update(*taken)
        unsaid += [f"{name}.{field.encode_name}" for field in method.fields() if field.encode_name not in sent]
    capsys.readouterr()
    assert refused == [], "what spdk-rpc sends and we refuse"
    assert unsaid == [], "what spdk-rpc never sends"
    assert covered > 60


def test_methods_are_allowed_in_the_states_in_which_spdk_allows_them() -> None:
    early = {method.name for method in REGISTRY if method.startup and not method.runtime}
    assert {"bdev_set_options", "iobuf_set_options", "sock_impl_set_options", "nvmf_set_config", "framework_start_init"} <= early
    both = {method.name for method in REGISTRY if method.startup and method.runtime}
    assert {"bdev_nvme_set_options", "framework_set_scheduler", "rpc_get_methods", "spdk_get_version", "log_set_level"} <= both
    late = {method.name for method in REGISTRY if not method.startup}
    assert {"bdev_get_bdevs", "framework_get_config", "log_enable_timestamps", "notify_get_notifications", "thread_get_stats"} <= late


if __name__ == "__main__":
    print("# What SPDK's JSON-RPC methods take: name:type, (values of an enumeration), ! where required. See test_schema.py.")
    for method_name, parameters in from_schema(sys.argv[1]).items():
        print(method_name, *parameters)
