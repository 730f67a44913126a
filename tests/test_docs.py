"""What the documents show is what the code says, and runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
BDEV = (ROOT / "docs/bdev.md").read_text()


def test_the_module_that_is_walked_through_is_the_one_that_runs() -> None:
    source = (ROOT / "crates/perf/examples/nth.rs").read_text()
    blocks = re.findall(r"```rust\n(.*?)```", BDEV, re.DOTALL)
    assert len(blocks) == 2
    assert all(block in source for block in blocks)


def test_the_python_example_of_the_bdev_page_runs_as_pasted(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", BDEV, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nb'bye'\n", "")


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
