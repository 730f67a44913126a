"""A real Linux, booted under emulation in seconds, for tests and for `make demo-vm`.

`ensure` makes the guest once a machine (root and apt needed), `Guest` boots it and runs jobs. Standard library only:
it runs before anything of qpair is built.
"""

from .machine import Guest, Outcome, RunningGuest, vhost_user_blk_args
from .paths import GuestPaths
from .setup import SetupError, ensure

__all__ = ["Guest", "GuestPaths", "Outcome", "RunningGuest", "SetupError", "ensure", "vhost_user_blk_args"]
