"""Fixtures of the tests of bdevs that stand on others."""

from __future__ import annotations

from typing import Any

import pytest

from missing import missing
from vbdevs import SPDK_RPC, Spdk


@pytest.fixture
def spdk(server: Any, client: Any, socket_path: str) -> Spdk:
    """``spdk-rpc`` on the running stack."""
    if not SPDK_RPC.exists():
        missing("spdk-rpc", "pip install spdk")
    return Spdk(client, socket_path)
