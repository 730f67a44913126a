"""What the README shows works as pasted."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_as_pasted(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(example.replace("/tmp/qpair-disk0.sock", str(tmp_path / "disk0.sock")))
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"b'hello, ring'\n[1-9][\d,]* random 4 KiB reads a second\n", done.stdout)


def test_the_python_example_is_short() -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


def test_every_file_that_the_readme_links_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert "docs/stack.svg" in links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_make_target_that_the_documents_name_exists() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)(?:`|\s+#| [A-Z]+=)", text)) <= targets


def test_ci_runs_what_the_documents_name() -> None:
    commands = re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert commands == ["make lint", "make test"]
    assert all(f"`{command}`" in README or f"    {command} " in README for command in commands)
