"""What the tests of stacked bdevs share: a running server with a real client, and its configuration saved and loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

SPDK_RPC = Path(sys.executable).parent / "spdk-rpc"


class Spdk:
    """``spdk-rpc`` against one socket. ``client``: the fixture that runs a command."""

    def __init__(self, client: Callable[..., Awaitable[tuple[int, str, str]]], socket: str) -> None:
        self._client = client
        self._command = [str(SPDK_RPC), "-s", socket]

    def at(self, socket: str) -> Spdk:
        """The same against another socket."""
        return Spdk(self._client, socket)

    async def __call__(self, *words: str, stdin: bytes | None = None) -> Any:
        """The answer of one command, which must succeed."""
        status, out, err = await self._client(*self._command, *words, stdin=stdin)
        assert status == 0, (words, out, err)
        try:
            return json.loads(out)
        except ValueError:
            return out.strip()

    async def refusal(self, *words: str) -> tuple[int, str]:
        """Code and message of one command, which must be refused."""
        status, out, err = await self._client(*self._command, *words)
        assert status != 0, (words, out)
        text = (out + err).partition("response:")[2]
        error = json.loads(text[text.index("{") : text.rindex("}") + 1])
        return error["code"], error["message"]


def bdev_calls(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of the bdev subsystem."""
    found: list[dict[str, Any]] = next(entry["config"] for entry in config["subsystems"] if entry["subsystem"] == "bdev")
    return found


@asynccontextmanager
async def reloaded(spdk: Spdk, make_stack: Callable[..., Any], socket: str) -> AsyncIterator[tuple[dict[str, Any], Any, Spdk]]:
    """What ``save_config`` says; and a second stack that has loaded it, with its client."""
    config = await spdk("save_config")
    async with make_stack() as second:
        await second.listen(socket)
        other = spdk.at(socket)
        await other("load_config", stdin=json.dumps(config).encode())
        await other("bdev_wait_for_examine")
        yield config, second, other
