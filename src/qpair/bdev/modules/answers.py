"""Failures that SPDK answers by one code and a sentence of the method's own, where others are answered by errno and its text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qpair.errors import InvalidParameters, QpairError

__all__ = ["BadParameters", "InternalError", "said_as"]


class BadParameters(QpairError):
    """JSON-RPC -32602 with a sentence of its own."""

    rpc_code = -32602


class InternalError(QpairError):
    """JSON-RPC -32603 with a sentence of its own."""

    rpc_code = -32603


@contextmanager
def said_as(kind: type[QpairError], beginning: str = "") -> Iterator[None]:
    """Whatever fails inside is answered as ``kind``: ``beginning``, the errno's text, and in brackets why."""
    try:
        yield
    except InvalidParameters:
        raise
    except QpairError as error:
        why = f" ({error.message})" if error.message != error.text else ""
        raise kind(f"{beginning}{error.text}{why}", errno=error.errno) from error
