"""A blocking JSON-RPC client for scripts: one request, one answer, over a Unix socket or TCP.

Errors: `RpcError` carries the server's code, message and data; `Unreachable` when nobody answers.
"""

from __future__ import annotations

import json
import socket
from typing import Any, Self

import msgspec

from qpair.errors import QpairError
from qpair.rpc.address import DEFAULT_ADDRESS, parse_address

__all__ = ["RpcClient", "RpcError", "Unreachable"]

ANSWER_BYTES_MAX = 64 << 20


class RpcError(QpairError):
    """The server answered with an error. ``data`` says why, where it did."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        # what says why often begins by saying what
        said = message if not data else data if data.startswith(f"{message}: ") else f"{message}: {data}"
        super().__init__(said, errno=-code if -4096 < code < 0 else 5)
        self._code = code
        self.data = data

    @property
    def code(self) -> int:
        return self._code


class Unreachable(QpairError, ConnectionError):
    """Nobody answers there."""


class RpcClient:
    """``with RpcClient("/var/tmp/spdk.sock") as client: client.call("bdev_get_bdevs", name="disk0")``."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout_s: float = 60.0) -> None:
        self.address = address
        self._number = 0
        self._buffer = b""
        target = parse_address(address)
        try:
            if isinstance(target, str):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(timeout_s)
                self._socket.connect(target)
            else:
                self._socket = socket.create_connection(target, timeout=timeout_s)
        except OSError as error:
            raise Unreachable(
                f"no server answers on {address} ({error.strerror or error}); start one with: qpair serve -r {address}",
                errno=error.errno or 111,
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def call(self, method: str, **params: Any) -> Any:
        """The result; `RpcError` otherwise."""
        self._number += 1
        request: dict[str, Any] = {"jsonrpc": "2.0", "id": self._number, "method": method}
        if params:
            request["params"] = params
        try:
            self._socket.sendall(json.dumps(request).encode())
            answer = msgspec.json.decode(self._line())
        except TimeoutError:
            raise Unreachable(f"{self.address} did not answer {method} within {self._socket.gettimeout():.0f} s", errno=110) from None
        except OSError as error:
            raise Unreachable(f"{self.address}: {error.strerror or error}", errno=error.errno or 104) from None
        if (refusal := answer.get("error")) is not None:
            raise RpcError(refusal["code"], refusal["message"], refusal.get("data"))
        return answer["result"]

    def _line(self) -> bytes:
        parts = [self._buffer]
        size = len(self._buffer)
        while b"\n" not in parts[-1]:
            part = self._socket.recv(1 << 16)
            if not part:
                raise ConnectionResetError(104, "the server hung up before it answered")
            parts.append(part)
            size += len(part)
            if size > ANSWER_BYTES_MAX:
                raise ConnectionError(90, f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        return line
