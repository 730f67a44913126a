"""The version, as Python and as SPDK's clients want it."""

from __future__ import annotations

from typing import Any

__all__ = ["VERSION", "as_spdk"]

VERSION = "0.1.0"


def as_spdk() -> dict[str, Any]:
    """The object that ``spdk_get_version`` answers."""
    major, minor, patch = (int(part) for part in VERSION.split("."))
    return {"version": f"qpair v{VERSION}", "fields": {"major": major, "minor": minor, "patch": patch, "suffix": ""}}
