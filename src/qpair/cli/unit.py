"""``qpair serve --print-unit``: systemd's units for a server, of the program that prints them. They are in `units/`, as templates."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

__all__ = ["UNITS", "unit"]

UNITS = ("service", "socket")


def unit(kind: str) -> str:
    """The text of ``qpair.service`` or ``qpair.socket``."""
    template = (Path(__file__).parent / "units" / f"qpair.{kind}").read_text(encoding="utf-8")
    return template.replace("{program}", _program())


def _program() -> str:
    """Where the command is, that was called or would be found."""
    called = Path(sys.argv[0])
    if called.name == "qpair" and called.exists():
        return str(called.absolute())
    return shutil.which("qpair") or str(Path(sys.executable).with_name("qpair"))
