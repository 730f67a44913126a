"""The exceptions of qpair: one base, each also the builtin exception that a Python caller expects.

How it works: every failure has a positive ``errno``; `QpairError.code` is what JSON-RPC carries (the negated errno, or one of
JSON-RPC's own codes), `QpairError.text` the fixed text that clients of SPDK match on ("No such device"), and the message one
sentence that names the field, the value and the limit.

`from_engine` is the only place where an engine error becomes one of these.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any, ClassVar

__all__ = [
    "AlreadyExists",
    "Busy",
    "ConfigError",
    "ForkedStack",
    "InvalidArgument",
    "InvalidParameters",
    "InvalidRequest",
    "IoFailed",
    "MethodNotFound",
    "NoMemory",
    "NoSpace",
    "NoSuchBdev",
    "NoSuchController",
    "NoSuchDevice",
    "NoSuchFile",
    "NotPermitted",
    "QpairError",
    "ReadOnly",
    "StackStopped",
    "SubsystemError",
    "TimedOut",
    "Unsupported",
    "from_engine",
    "from_errno",
]


class QpairError(Exception):
    """Base of all errors of qpair. ``errno`` is positive; ``str()`` is one sentence."""

    errno_default: ClassVar[int] = _errno.EIO
    rpc_code: ClassVar[int | None] = None
    rpc_text: ClassVar[str | None] = None

    def __init__(self, message: str = "", *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno: Any = self.errno_default if errno is None else errno  # an int; Any, for OSError's own says int | None
        self.message: str = message or self.text

    def __str__(self) -> str:
        return self.message

    @property
    def code(self) -> int:
        """The JSON-RPC error code: one of the protocol's own, else the negated errno."""
        return self.rpc_code if self.rpc_code is not None else -int(self.errno)

    @property
    def text(self) -> str:
        """The fixed text of the code, the same for every message ("No such device")."""
        return self.rpc_text if self.rpc_text is not None else os.strerror(self.errno)


class NoSuchDevice(QpairError, LookupError):
    """ENODEV: nothing has this name."""

    errno_default = _errno.ENODEV


class NoSuchBdev(NoSuchDevice):
    """ENODEV: no bdev has this name."""


class NoSuchController(NoSuchDevice):
    """ENODEV: no controller has this name."""


class NoSuchFile(QpairError, FileNotFoundError):
    """ENOENT: a path that is not there."""

    errno_default = _errno.ENOENT


class AlreadyExists(QpairError, FileExistsError):
    """EEXIST: the name is in use."""

    errno_default = _errno.EEXIST


class Busy(QpairError, OSError):
    """EBUSY: somebody else holds it (a claim, an open session)."""

    errno_default = _errno.EBUSY


class InvalidArgument(QpairError, ValueError):
    """EINVAL: a value out of its range; the message names the limit."""

    errno_default = _errno.EINVAL


class InvalidParameters(InvalidArgument):
    """JSON-RPC -32602: unknown, missing, duplicate or mistyped parameters; the message names them."""

    rpc_code = -32602
    rpc_text = "Invalid parameters"


class InvalidRequest(QpairError, ValueError):
    """JSON-RPC -32600: not a request."""

    errno_default = _errno.EINVAL
    rpc_code = -32600
    rpc_text = "Invalid request"


class MethodNotFound(QpairError, LookupError):
    """JSON-RPC -32601: no such method, or not in this state of the process."""

    errno_default = _errno.ENOSYS
    rpc_code = -32601
    rpc_text = "Method not found"


class ConfigError(InvalidArgument):
    """A configuration file was refused; the message names subsystem, entry, method and field."""


class SubsystemError(QpairError, RuntimeError):
    """A subsystem's dependencies cannot be ordered: one is missing, or they form a cycle."""

    errno_default = _errno.EINVAL


class IoFailed(QpairError, OSError):
    """EIO: a device could not do what it was asked."""


class ReadOnly(QpairError, OSError):
    """EROFS: a write to something read-only."""

    errno_default = _errno.EROFS


class NotPermitted(QpairError, PermissionError):
    """EPERM or EACCES."""

    errno_default = _errno.EPERM


class NoSpace(QpairError, OSError):
    """ENOSPC."""

    errno_default = _errno.ENOSPC


class NoMemory(QpairError, MemoryError):
    """ENOMEM."""

    errno_default = _errno.ENOMEM


class TimedOut(QpairError, TimeoutError):
    """ETIMEDOUT: a deadline passed."""

    errno_default = _errno.ETIMEDOUT


class Unsupported(QpairError, OSError):
    """EOPNOTSUPP: this device or build does not do that."""

    errno_default = _errno.EOPNOTSUPP


class StackStopped(QpairError, RuntimeError):
    """ESHUTDOWN: the stack is stopping or gone."""

    errno_default = _errno.ESHUTDOWN


class ForkedStack(StackStopped):
    """ESHUTDOWN: this process is a fork of the one that owns the stack; reactors do not survive a fork."""


_BY_ERRNO: dict[int, type[QpairError]] = {
    _errno.ENODEV: NoSuchDevice,
    _errno.ENOENT: NoSuchFile,
    _errno.EEXIST: AlreadyExists,
    _errno.EBUSY: Busy,
    _errno.EINVAL: InvalidArgument,
    _errno.EROFS: ReadOnly,
    _errno.EPERM: NotPermitted,
    _errno.EACCES: NotPermitted,
    _errno.ENOSPC: NoSpace,
    _errno.ENOMEM: NoMemory,
    _errno.ETIMEDOUT: TimedOut,
    _errno.EOPNOTSUPP: Unsupported,
    _errno.ESHUTDOWN: StackStopped,
    _errno.ECANCELED: StackStopped,
    _errno.EIO: IoFailed,
}


def from_errno(errno: int, message: str = "") -> QpairError:
    """The exception for a positive ``errno``; ``errno`` itself is kept when only its family is known."""
    return _BY_ERRNO.get(errno, QpairError)(message, errno=errno)


def from_engine(error: OSError) -> QpairError:
    """What Python raises for an engine error. The cause is kept by ``raise from_engine(e) from e``."""
    return from_errno(error.errno or _errno.EIO, error.strerror or str(error))
