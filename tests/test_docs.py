"""What the documents show is what the code says, and runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qpair.app.rooms import load_rpc
from qpair.cli.rpc import parse_params
from qpair.rpc.registry import REGISTRY

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md"]
BDEV = (ROOT / "docs/bdev.md").read_text()


def test_the_module_that_is_walked_through_is_the_one_that_runs() -> None:
    source = (ROOT / "crates/perf/examples/nth.rs").read_text()
    blocks = re.findall(r"```rust\n(.*?)```", BDEV, re.DOTALL)
    assert len(blocks) == 2
    assert all(block in source for block in blocks)


@pytest.mark.parametrize(("number", "out"), [(0, "True\nb'bye'\n"), (1, "m0 write 1 True\np0 write 1 True\n")])
def test_the_python_examples_of_the_bdev_page_run_as_pasted(tmp_path: Path, number: int, out: str) -> None:
    examples = re.findall(r"```python\n(.*?)```", BDEV, re.DOTALL)
    assert len(examples) == 2
    example = examples[number]
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "")


def test_the_example_of_the_limits_page_runs_as_pasted(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/qos.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines = "gold keeps its rate\nsilver keeps its rate\nthrottled for the first time by rw_ios_per_sec\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, lines, "")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_file_that_a_page_links_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def commands(page: Path, program: str) -> list[list[str]]:
    """The lines of a page that call ``program``, as a shell would split them."""
    lines = re.findall(rf"^ {{4}}(?:\$ )?{re.escape(program)} (.*)$", page.read_text(), re.MULTILINE)
    return [[word for word in shlex.split(line, comments=True) if word != "&"] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_call_that_a_page_shows_is_one_that_its_method_takes(page: Path) -> None:
    load_rpc()
    for words in commands(page, "qpair rpc"):
        while words[0] in ("-r", "-s"):
            del words[:2]
        method, arguments = words[0], words[1:]
        declared = REGISTRY.get(method)
        # One of cli.md is misspelt on purpose, and shows what is said then.
        if declared is None and method == "bdev_malloc_creat":
            continue
        assert declared is not None, f"{method} is no method"
        if arguments != ["--help"]:
            declared.decode(parse_params(method, arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_call_of_spdk_rpc_that_a_page_shows_is_one_that_spdk_rpc_makes(page: Path) -> None:
    load_rpc()
    for words in commands(page, "spdk-rpc"):
        done = subprocess.run([Path(sys.executable).with_name("spdk-rpc"), "--dry-run", *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stderr)
