"""``qpair serve``: SPDK's start-up flags and ours. argparse, for it is there already and starts in milliseconds."""

from __future__ import annotations

import argparse
import sys

from qpair.app.logs import FLAGS, LEVELS
from qpair.app.serve import PASSWORD_VARIABLE, HttpOptions, ServeOptions, run
from qpair.bdev.trace import parse_groups
from qpair.cli.unit import UNITS, unit
from qpair.errors import QpairError

__all__ = ["parser", "serve"]

# SPDK's flags about hugepages, PCI and DPDK: taken so that start scripts work, without effect here.
_IGNORED: tuple[tuple[tuple[str, ...], bool, str], ...] = (
    (("-s", "--mem-size"), True, "memory size in MB"),
    (("-u", "--no-pci"), False, "no PCI"),
    (("--no-huge",), False, "no hugepages: they are never needed"),
    (("-i", "--shm-id"), True, "shared memory id"),
    (("-p", "--main-core"), True, "main core"),
    (("-n", "--mem-channels"), True, "memory channels"),
    (("-g", "--single-file-segments"), False, "one file of hugepages"),
    (("-d", "--limit-coredump"), False, "limit the core dump"),
    (("-R", "--huge-unlink"), False, "unlink hugepage files"),
    (("-A", "--pci-allowed"), True, "allowed PCI device"),
    (("-B", "--pci-blocked"), True, "blocked PCI device"),
    (("--huge-dir",), True, "hugetlbfs mount"),
    (("--iova-mode",), True, "DPDK address mode"),
    (("--base-virtaddr",), True, "DPDK base address"),
    (("--env-context",), True, "DPDK arguments"),
    (("--num-trace-entries",), True, "trace entries"),
    (("--msg-mempool-size",), True, "message pool"),
    (("--vfio-vf-token",), True, "VFIO token"),
    (("--interrupt-mode",), False, "sleep when idle: always on, see --busy-poll"),
    (("--disable-cpumask-locks",), False, "no core locks: there are none"),
    (("--silence-noticelog",), False, "print warnings and errors only"),
)


def parser() -> argparse.ArgumentParser:
    """The flags of ``qpair serve``."""
    made = argparse.ArgumentParser(
        prog="qpair serve",
        description="Run a storage stack and answer JSON-RPC until SIGTERM or SIGINT.",
        epilog="Example: qpair serve -r /tmp/qpair.sock -m '[0,1]' -S /tmp -c config.json",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("-r", "--rpc-socket", default=ServeOptions.address, metavar="PATH|HOST:PORT", help="where to answer RPC (default %(default)s)")
    add("-m", "--cpumask", "--lcores", metavar="MASK", help="cores: 0x3 or [0,2-3] (default 0x1)")
    add("-c", "--config", "--json", metavar="FILE", help="JSON configuration to load first")
    add(
        "--takeover",
        action="store_true",
        help="take the place of the process that answers RPC at -r, with all that it serves",
    )
    add("--wait-for-rpc", action="store_true", help="wait for framework_start_init before the subsystems start")
    add("-S", dest="vhost_dir", metavar="DIR", help="directory of vhost sockets (default: here)")
    add("-f", dest="pid_file", metavar="FILE", help="write the process id there once ready")
    add("-L", "--logflag", action="append", default=[], metavar="FLAG", help=f"debug messages of {', '.join(FLAGS)} or all")
    add("--log-level", choices=list(LEVELS), default="NOTICE", help="print nothing less severe (default %(default)s)")
    add(
        "-e",
        "--tpoint-group",
        metavar="GROUP[:POINTS]",
        help="trace points on from the start: bdev, 0x8, bdev:0x3, bdev:BDEV_IO_DONE; several with commas",
    )
    add("--busy-poll", action="store_true", help="reactors never sleep")
    add(
        "--spin-us",
        type=int,
        default=ServeOptions.spin_us,
        metavar="US",
        help="spin so long without work before sleeping (default %(default)s)",
    )
    add("--driver", choices=("auto", "io_uring", "epoll"), default="auto", help="I/O driver (default %(default)s)")
    add("--no-pin", action="store_true", help="do not bind reactors to their cores")
    add("--print-unit", choices=UNITS, metavar="UNIT", help=f"print a systemd unit ({', '.join(UNITS)}) and end")
    http = made.add_argument_group("JSON-RPC by HTTP POST with Basic authentication (off unless asked for)").add_argument
    http("--rpc-http", metavar="HOST:PORT", help="answer there, too")
    http("--rpc-http-user", metavar="USER", help="who may")
    http(
        "--rpc-http-password-file", metavar="FILE", help=f"the password is its first line (default: {PASSWORD_VARIABLE} of the environment)"
    )
    http("--rpc-http-cert", metavar="FILE", help="PEM of a certificate and its key: HTTPS")
    ignored = made.add_argument_group("accepted from SPDK's command line, without effect")
    for names, takes_value, text in _IGNORED:
        if takes_value:
            ignored.add_argument(*names, metavar="X", help=text, dest=_ignored_name(names))
        else:
            ignored.add_argument(*names, action="store_true", help=text, dest=_ignored_name(names))
    return made


def serve(arguments: list[str]) -> int:
    """Parse, then serve; the exit code."""
    try:
        given = parser().parse_args(arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    if given.print_unit is not None:
        print(unit(given.print_unit), end="")
        return 0
    try:
        options = _options(given)
        options.again = [sys.executable, "-m", "qpair.cli", "serve", *(word for word in arguments if word != "--takeover"), "--takeover"]
        return run(options)
    except QpairError as error:
        print(f"qpair serve: {error}", file=sys.stderr)
        return 2


def _options(given: argparse.Namespace) -> ServeOptions:
    notes = [names[-1] for names, _, _ in _IGNORED if getattr(given, _ignored_name(names)) not in (None, False)]
    quiet = "--silence-noticelog" in notes
    flags: list[str] = []
    for flag in given.logflag:
        if flag == "all":
            flags.extend(FLAGS)
        elif flag in FLAGS:
            flags.append(flag)
        else:
            notes.append(f"-L {flag}")
    mask: str | None = given.cpumask
    if given.takeover:
        # So that the line that started the first process is good for its successors.
        notes += [f"{flag} beside --takeover" for flag, on in (("-c", given.config), ("--wait-for-rpc", given.wait_for_rpc)) if on]
        given.config, given.wait_for_rpc = None, False
    trace_mask, idle = (0, []) if given.tpoint_group is None else parse_groups(given.tpoint_group)
    notes += [f"-e {group}" for group in idle]
    return ServeOptions(
        address=given.rpc_socket,
        mask=f"[{mask}]" if mask is not None and mask[:1].isdigit() and "," in mask else mask,
        takeover=given.takeover,
        config=given.config,
        wait_for_rpc=given.wait_for_rpc,
        vhost_dir=given.vhost_dir,
        busy_poll=given.busy_poll,
        driver=given.driver,
        spin_us=given.spin_us,
        pin=not given.no_pin,
        log_flags=flags,
        log_level="WARNING" if quiet else "DEBUG" if flags else given.log_level,
        pid_file=given.pid_file,
        trace_mask=trace_mask,
        http=HttpOptions.of(given.rpc_http, given.rpc_http_user, given.rpc_http_password_file, given.rpc_http_cert)
        if given.rpc_http
        else None,
        notes=[note for note in notes if note != "--silence-noticelog"],
    )


def _ignored_name(names: tuple[str, ...]) -> str:
    return "ignored_" + names[-1].lstrip("-").replace("-", "_")
