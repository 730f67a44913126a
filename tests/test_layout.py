"""The house rules that a program can check: rooms, sizes, where `unsafe` lives, documentation, and who may read a clock."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CRATES = sorted(path.parent.name for path in (ROOT / "crates").glob("*/Cargo.toml"))
LINES_MAX = 600
# Rooms that users never see: the engine's ground, the bindings themselves, and what tests alone use.
ENGINE_ONLY = {"wire", "memory", "reactor", "python", "simkit"}
# Rooms whose Python side lives in another one, and why.
GUESTS = {
    "perf": "bdev/perf.py",
    "vbdev": "bdev/modules/__init__.py",
    "raid": "bdev/modules/raid.py",
}  # measuring is something that one does to a bdev
UNSAFE_HOMES = {"memory", "reactor", "python"}
# Code above the reactor is told the time and given threads, so that the simulator can play both.
CLOCK_READERS = {"memory", "reactor", "python"}
CLOCKS = re.compile(r"\b(Instant::now|SystemTime::now|thread::(sleep|spawn|Builder))\b")
CODE_FOLDERS = ("src", "crates", "tests", "tools", "benches", "fuzz")
UNSAFE = re.compile(r"\bunsafe\b\s*(\{|impl\b|fn\b|extern\b|trait\b)|#\[unsafe\(")


def code_files() -> list[Path]:
    """Every source file of the project, in any language we write. Build outputs are not in these folders."""
    found = [path for folder in CODE_FOLDERS for kind in ("*.rs", "*.py", "*.pyi") for path in (ROOT / folder).rglob(kind)]
    return sorted(path for path in found if "target" not in path.relative_to(ROOT).parts)


def rust_files(crate: str) -> list[Path]:
    return sorted((ROOT / "crates" / crate).rglob("*.rs"))


def without_comments(text: str) -> str:
    """Rust without line comments and the contents of strings, near enough for looking for words."""
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', re.sub(r"//[^\n]*", "", text))


def production_code(path: Path) -> str:
    """A Rust file up to its tests: they come last in a file, or have a file or folder of their own."""
    if path.stem.startswith("test") or {"tests", "benches", "examples"} & set(path.parts):
        return ""
    return without_comments(path.read_text()).split("#[cfg(test)]\nmod ")[0]


def names(paths: Iterator[Path] | list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_there_are_crates_and_files_to_look_at() -> None:
    assert {"wire", "memory", "reactor", "bdev", "vhost", "python"} <= set(CRATES)
    assert len(code_files()) > 50


@pytest.mark.parametrize("crate", [crate for crate in CRATES if crate not in ENGINE_ONLY])
def test_a_room_that_users_see_has_its_python_room(crate: str) -> None:
    home = ROOT / "src/qpair" / GUESTS.get(crate, f"{crate}/__init__.py")
    assert home.is_file(), f"crates/{crate} has no Python side: {home.relative_to(ROOT)} is missing"


def test_no_python_room_is_empty() -> None:
    rooms = [path for path in (ROOT / "src/qpair").iterdir() if path.is_dir() and path.name not in ("__pycache__", "_engine")]
    assert not names([room for room in rooms if not (room / "__init__.py").is_file()])


def test_no_file_is_longer_than_600_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in code_files()}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LINES_MAX}


@pytest.mark.parametrize("crate", [crate for crate in CRATES if crate not in UNSAFE_HOMES])
def test_unsafe_stays_in_its_three_crates(crate: str) -> None:
    assert "#![forbid(unsafe_code)]" in (ROOT / "crates" / crate / "src/lib.rs").read_text()
    assert not names([path for path in rust_files(crate) if UNSAFE.search(without_comments(path.read_text()))])


@pytest.mark.parametrize("crate", [crate for crate in CRATES if crate not in CLOCK_READERS])
def test_code_above_the_reactor_reads_no_clock_and_starts_no_thread(crate: str) -> None:
    assert not names([path for path in rust_files(crate) if CLOCKS.search(production_code(path))])


def test_every_rust_file_begins_with_its_module_doc() -> None:
    found = [path for crate in CRATES for path in rust_files(crate) if not path.read_text().startswith("//!")]
    assert not names(found)


def test_every_python_module_has_a_docstring() -> None:
    found = [path for path in code_files() if path.suffix in (".py", ".pyi") and path.read_text().strip()]
    assert not names([path for path in found if not ast.get_docstring(ast.parse(path.read_text()))])


def test_nothing_is_left_to_do() -> None:
    """Unfinished things are issues, not comments."""
    words = re.compile(
        r"\b("
        + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3))
        + r")\b|\b(to"
        + r"do|unimplem"
        + r"ented)!\(|raise NotImplem"
        + r"entedError"
    )
    assert not names([path for path in code_files() if words.search(path.read_text())])


def test_workspace_package_and_changelog_name_one_version() -> None:
    versions = {
        found[1]
        for name in ("Cargo.toml", "pyproject.toml")
        if (found := re.search(r'(?m)^version = "([^"]+)"', (ROOT / name).read_text()))
    }
    assert len(versions) == 1
    assert f"## [{versions.pop()}]" in (ROOT / "CHANGELOG.md").read_text()
