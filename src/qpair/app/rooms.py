"""Which rooms a stack has: one table of subsystems, in the order in which they are declared.

A room's subsystem is a class derived from `qpair.app.subsystems.Subsystem`, made with no arguments; the stack keeps it under ``attribute`` when it has one
(``stack.bdevs``, ``stack.vhost``). A room's RPC module is imported for its ``@method`` declarations. To add a room, add a line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qpair.app.inert import inert_subsystem
from qpair.app.subsystems import Subsystem
from qpair.bdev.modules import load_rpc as load_modules_rpc

__all__ = ["load_rpc", "make_subsystems"]

# attribute of Stack, module, class
ROOMS: tuple[tuple[str, str, str], ...] = (
    ("bdevs", "qpair.bdev.control", "BdevSubsystem"),
    ("virtio", "qpair.virtio.control", "VirtioSubsystem"),
    ("vhost", "qpair.vhost.control", "VhostSubsystem"),
)

RPC_MODULES = (
    "qpair.app.rpc",
    "qpair.app.rpc_log",
    "qpair.app.rpc_threads",
    "qpair.app.rpc_keys",
    "qpair.bdev.rpc",
    "qpair.bdev.rpc_events",
    "qpair.bdev.rpc_options",
    "qpair.bdev.rpc_trace",
    "qpair.bdev.measures",
    "qpair.virtio.rpc",
    "qpair.vhost.rpc",
)


def make_subsystems() -> tuple[list[Subsystem], dict[str, Any]]:
    """Fresh subsystems of one stack, and those that it shows as attributes. Names and dependencies are SPDK's."""
    attributes = {attribute: getattr(import_module(module), name)() for attribute, module, name in ROOMS}
    inert = [
        inert_subsystem("keyring"),
        inert_subsystem("iobuf"),
        inert_subsystem("sock"),
        inert_subsystem("vmd"),
        inert_subsystem("fsdev"),
        inert_subsystem("accel", "iobuf"),
        inert_subsystem("scheduler"),
        inert_subsystem("nvmf", "bdev", "keyring", "sock", "accel", "iobuf"),
        inert_subsystem("scsi", "bdev"),
        inert_subsystem("iscsi", "scsi", "sock"),
    ]
    return [*inert, *(room for room in attributes.values() if room.name)], attributes


def load_rpc() -> None:
    """Import every room's declared methods."""
    for module in RPC_MODULES:
        import_module(module)
    load_modules_rpc()
