"""The fixtures of the vhost room's tests: the initiator is tested against our own target, in one process."""

from vhost.conftest import controller, count_fds, recorder, recording_stack  # noqa: F401
