"""The ``qpair`` command.

``serve`` and ``rpc`` are dispatched here, before anything heavy is imported: a server answers its first request sooner, and a script may call ``qpair rpc``
a thousand times. Everything else is a typer application, imported when asked for.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code. 0 success, 1 failure, 2 wrong usage, 3 no server answers."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] == "serve":
        from qpair.cli.serve import serve

        return serve(arguments[1:])
    if arguments and arguments[0] == "rpc":
        from qpair.cli.rpc import rpc

        return rpc(arguments[1:])
    from qpair.cli.app import run

    return run(arguments)
