"""From a method's name and its raw parameters to its result: the one door through which sockets, configuration files and ``Stack.rpc`` call methods.

Errors: `MethodNotFound`; `WrongState` for a method of the other state (startup, runtime), with SPDK's code -1 and texts; `InvalidParameters`; whatever
the method raises. An engine refusal (`OSError`) becomes its `QpairError`; anything else is a defect, logged with its traceback and answered -32603.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from qpair.errors import InvalidParameters, MethodNotFound, QpairError, from_engine
from qpair.rpc.protocol import Call, Document, Refusal, encode_batch, encode_error, encode_exception, encode_result, refuse_duplicates
from qpair.rpc.registry import REGISTRY, Registry

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["CALLER", "Caller", "WrongState", "answer", "answer_document", "call"]

logger = logging.getLogger("qpair.rpc")


class Caller:
    """One connection, to methods that answer what belongs together in several requests. ``requests`` counts all of them."""

    def __init__(self) -> None:
        self.requests = 0
        self.kept: Any = None


CALLER: ContextVar[Caller] = ContextVar("qpair-caller")
"""Set while a request of a connection is answered; unset for HTTP and for calls in process."""


class WrongState(QpairError, RuntimeError):
    """The method exists, but not in the present state of the process (code -1)."""

    rpc_code = -1


_TOO_EARLY = "Method may only be called after framework is initialized using framework_start_init RPC."
_TOO_LATE = (
    "Method may only be called before framework is initialized. Use --wait-for-rpc command line parameter and then issue this RPC "
    "before the framework_start_init RPC."
)


async def call(stack: Stack, name: str, params: Any = None, *, registry: Registry = REGISTRY) -> Any:
    """The result of method ``name``. ``params`` is decoded JSON: an object, or None."""
    method = registry.get(name)
    if method is None:
        raise MethodNotFound(f"no method is named {name[:64]!r}")
    if stack.state == "startup" and not method.startup:
        raise WrongState(_TOO_EARLY)
    if stack.state != "startup" and not method.runtime:
        raise WrongState(_TOO_LATE)
    try:
        return await method.handler(stack, method.decode(params))
    except QpairError:
        raise
    except OSError as error:
        raise from_engine(error) from error
    except UnicodeEncodeError as error:
        # JSON can name half of a character; no path, name or log line can.
        raise InvalidParameters(f"a text holds {error.object[error.start]!r}, which is half of a character") from error


async def answer(stack: Stack, item: Call | Refusal, *, registry: Registry = REGISTRY) -> bytes | None:
    """The encoded answer of one request; None for a notification."""
    if isinstance(item, Refusal):
        return encode_error(item.id, item.code, item.message)
    reply: bytes
    if (caller := CALLER.get(None)) is not None:
        caller.requests += 1
    try:
        refuse_duplicates(item)
        reply = encode_result(item.id, await call(stack, item.method, item.params, registry=registry))
    except QpairError as error:
        level = logging.DEBUG if isinstance(error, InvalidParameters | MethodNotFound) else logging.INFO
        logger.log(level, "%s: %s", item.method[:64], error)
        reply = encode_exception(item.id, error)
    except Exception as error:
        logger.exception("method %s failed", item.method[:64])
        reply = encode_error(item.id, -32603, "Internal error", f"{type(error).__name__}: {error}"[:500])
    return reply if item.wants_reply else None


async def answer_document(stack: Stack, document: Document, *, registry: Registry = REGISTRY) -> bytes | None:
    """The encoded answers of a document, one after the other; None when nobody wants one."""
    answers = [reply for item in document.items if (reply := await answer(stack, item, registry=registry)) is not None]
    if not answers:
        return None
    return encode_batch(answers) if document.batch else answers[0]
