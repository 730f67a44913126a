"""``PYTHONPATH=tools python3 -m linux_guest setup | run JOB.sh [JOB.sh ...] [-- QEMU ARGUMENTS] | qemu PROGRAM ARGUMENTS``."""

import os
import sys
from pathlib import Path

from . import Guest, SetupError, ensure


def main(words: list[str]) -> int:
    match words:
        case ["setup"]:
            ensure()
            return 0
        case ["run", *rest]:
            cut = rest.index("--") if "--" in rest else len(rest)
            outcome = Guest(ensure()).run([Path(job) for job in rest[:cut]], qemu_args=rest[cut + 1 :], on_line=print)
            return 1 if outcome.rc is None else outcome.rc
        case ["qemu", program, *rest]:
            guest = Guest(ensure())
            command = guest.qemu_command(program)
            os.execve(command[0], [*command, *rest], guest.environment)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        sys.exit(f"guest: {error}")
