"""``python confined.py PROGRAM ARGUMENTS``: runs a program under what container engines forbid by default (their seccomp profile, without capabilities).

The calls are those that the public default profile of Docker and Podman leaves out for a process without capabilities; each fails with EPERM, clone3 with ENOSYS, as there.
"""

import ctypes
import errno
import os
import struct
import sys

# Numbers of x86-64.
FORBIDDEN = {
    "pivot_root": 155,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "reboot": 169,
    "init_module": 175,
    "mbind": 237,
    "set_mempolicy": 238,
    "get_mempolicy": 239,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "migrate_pages": 256,
    "unshare": 272,
    "move_pages": 279,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "open_by_handle_at": 304,
    "setns": 308,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "fsopen": 430,
    "clone3": 435,
}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_NUMBER, IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000


def program() -> bytes:
    """The filter: one comparison a call, each followed by its refusal."""
    steps = [struct.pack("HBBI", LOAD_NUMBER, 0, 0, 0)]
    for name, number in FORBIDDEN.items():
        error = errno.ENOSYS if name == "clone3" else errno.EPERM
        steps.append(struct.pack("HBBI", IF_EQUAL, 0, 1, number))
        steps.append(struct.pack("HBBI", RETURN, 0, 0, REFUSE | error))
    steps.append(struct.pack("HBBI", RETURN, 0, 0, ALLOW))
    return b"".join(steps)


def confine() -> None:
    """From here on, for this process and all that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program())
    described = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(code))
    for option, first, second in ((PR_SET_NO_NEW_PRIVS, 1, None), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, described)):
        if libc.prctl(option, first, second, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    confine()
    os.execv(sys.argv[1], sys.argv[1:])
