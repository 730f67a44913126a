"""How every command tells that it failed: one sentence, what to do next, an exit code; with ``--json`` the same as one JSON object.

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 no server answers, or it may not be asked; 130 interrupted.

How it works: `explain` makes an `Explained` of an error. What to do next is looked up where the error came from: a method that the server does not know is compared with
those that it does, a bdev's name with the names of its bdevs. A look-up that fails leaves the error as it is.

With ``--json`` the error goes to standard output, so that whoever reads JSON there always finds one document: ``{"error": {"code", "message", "hints"}}``. ``code`` is what
JSON-RPC carries: the server's code, or a negated errno.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from qpair.errors import QpairError

if TYPE_CHECKING:
    from qpair.rpc.client import RpcClient

__all__ = ["FAILED", "INTERRUPTED", "UNREACHABLE", "USAGE", "Explained", "explain", "fail", "near"]

FAILED = 1
USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130

NAMES_SHOWN = 8
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
NOT_IN_THIS_STATE = -1


@dataclass(slots=True)
class Explained:
    """An error as a command tells it."""

    message: str
    code: int
    exit_code: int = FAILED
    hints: list[str] = field(default_factory=list)


def fail(command: str, explained: Explained, *, as_json: bool, out: TextIO | None = None) -> int:
    """Print it; its exit code. ``out``: where JSON goes instead of standard output, when that carries data."""
    if as_json:
        print(
            json.dumps({"error": {"code": explained.code, "message": explained.message, "hints": explained.hints}}, indent=2),
            file=out or sys.stdout,
        )
    else:
        name = f"qpair {command}".rstrip()
        print(f"{name}: {explained.message}", *(f"  {hint}" for hint in explained.hints), sep="\n", file=sys.stderr)
    return explained.exit_code


def explain(error: QpairError, *, address: str | None = None, method: str | None = None, params: dict[str, Any] | None = None) -> Explained:
    """``address``: whom the command asked; ``method`` and ``params``: what, where it was one call that the user wrote."""
    from qpair.rpc.client import RpcError, Unreachable

    if isinstance(error, Unreachable):
        return _unreachable(error, address)
    explained = Explained(f"{method}: {error}" if method else str(error), error.code)
    if not isinstance(error, RpcError) or address is None:
        return explained
    if method is not None:
        explained.message = explained.message.replace(f": {method}: ", ": ") + f" (code {error.code})"
    if error.code == METHOD_NOT_FOUND and method is not None:
        explained.hints = _method_hints(address, method)
    elif error.code == INVALID_PARAMS and method is not None:
        explained.hints = [f"its parameters: qpair rpc {method} --help"]
    elif error.code == NOT_IN_THIS_STATE and "framework_start_init" in explained.message:
        explained.hints = [f"end its start-up phase: qpair rpc{_flag(address)} framework_start_init"]
    elif error.code == -errno.EEXIST and method is not None:
        explained.hints = [f"what there is: qpair ls{_flag(address)}"]
    elif error.code == -errno.EBUSY and method is not None:
        explained.hints = [f"who uses it: qpair ls{_flag(address)}"]
    elif error.code in (-errno.ENODEV, -errno.ENOENT):
        explained.hints = bdev_hints(address, [value for value in (params or {}).values() if isinstance(value, str)])
    return explained


def near(name: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that somebody who wrote ``name`` may have meant, best first."""
    import difflib

    plain = {known.lower(): known for known in names}
    wanted = name.lower()
    # of a short name half is enough to be near; long ones have much in common without being meant
    found = difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5 if len(wanted) < 8 else 0.8)
    found += [known for known in sorted(plain) if wanted and wanted in known and known not in found][: 3 - len(found)]
    return [plain[known] for known in found]


def bdev_hints(address: str, names: list[str], *, client: RpcClient | None = None) -> list[str]:
    """What to say to somebody who asked for bdevs called ``names``, of which one is not there."""
    bdevs = _asked(address, "bdev_get_bdevs", client=client)
    if not isinstance(bdevs, list):
        return []
    known = [str(bdev.get("name")) for bdev in bdevs]
    aliases = [str(alias) for bdev in bdevs for alias in bdev.get("aliases", [])]
    if not known:
        return ["there are no bdevs; make one: qpair rpc bdev_malloc_create --name disk0 --num-blocks 131072 --block-size 512"]
    missing = [name for name in names if name not in known and name not in aliases]
    if missing and (guesses := near(missing[0], known)):
        return [f"did you mean {' or '.join(guesses)}?"]
    shown = ", ".join(sorted(known)[:NAMES_SHOWN])
    more = f" and {len(known) - NAMES_SHOWN} more" if len(known) > NAMES_SHOWN else ""
    return [f"bdevs there: {shown}{more}; all of them: qpair ls{_flag(address)}"]


def _method_hints(address: str, method: str) -> list[str]:
    methods = _asked(address, "rpc_get_methods")
    every = f"all methods: qpair rpc{_flag(address)} rpc_get_methods"
    if not isinstance(methods, list):
        return [every]
    guesses = near(method, [str(known) for known in methods])
    return [f"did you mean {' or '.join(guesses)}?", every] if guesses else [every]


def _unreachable(error: QpairError, address: str | None) -> Explained:
    explained = Explained(str(error), error.code, UNREACHABLE)
    if address is None or "/" not in address:
        return explained
    if error.errno in (errno.EACCES, errno.EPERM):
        explained.message = f"permission denied on {address}{_owner(address)}"
        explained.hints = ["run this as that user, or as root; or start a server of your own: qpair serve -r PATH"]
    elif error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK):
        why = {
            errno.ENOENT: "there is no such socket",
            errno.ECONNREFUSED: "its server has gone",
            errno.ENOTSOCK: "that is no socket",
        }[error.errno]
        explained.message = f"no server answers on {address}: {why}"
        explained.hints = [f"start one: qpair serve -r {address}", "or name the socket of one that runs: -r PATH"]
    return explained


def _owner(address: str) -> str:
    """Of the socket, or of the first directory above it that may not be looked into."""
    try:
        found = os.stat(address)
    except OSError:
        return ", which is in a directory that you may not enter"

    def named(look_up: Callable[[], str], number: int) -> str:
        try:
            return look_up()
        except KeyError:
            return str(number)

    user = named(lambda: pwd.getpwuid(found.st_uid).pw_name, found.st_uid)
    group = named(lambda: grp.getgrgid(found.st_gid).gr_name, found.st_gid)
    return f", which is {user}'s (group {group}, mode {stat.S_IMODE(found.st_mode):04o})"


def _asked(address: str, method: str, *, client: RpcClient | None = None) -> Any:
    """The answer, or None: a hint is not worth another error."""
    from qpair.rpc.client import RpcClient

    try:
        if client is not None:
            return client.call(method)
        with RpcClient(address, timeout_s=2.0) as asking:
            return asking.call(method)
    except QpairError:
        return None


def _flag(address: str) -> str:
    from qpair.rpc.address import DEFAULT_ADDRESS

    return "" if address == DEFAULT_ADDRESS else f" -r {address}"
