"""JSON-RPC methods of the process itself: what methods there are, states, subsystems, configuration, version and end."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from qpair.app import inert, version
from qpair.app.saving import begin, resume
from qpair.errors import InvalidParameters, NoSuchDevice, Unsupported
from qpair.rpc.registry import REGISTRY, Params, method
from qpair.rpc.types import KillSignal

if TYPE_CHECKING:
    from qpair.app.stack import Stack

TICKS_A_SECOND = 1_000_000_000
"""Every tick that qpair reports is a nanosecond."""

inert.declare()


class RpcGetMethods(Params):
    """``current``: only what the present state allows."""

    current: bool | None = None
    include_aliases: bool | None = None


@method("rpc_get_methods", params=RpcGetMethods, startup=True)
async def rpc_get_methods(stack: Stack, params: RpcGetMethods) -> list[str]:
    """Names of the methods."""
    startup = stack.state == "startup"
    names = []
    for name in REGISTRY.names(aliases=bool(params.include_aliases)):
        found = REGISTRY.get(name)
        if found is not None and (not params.current or (found.startup if startup else found.runtime)):
            names.append(name)
    return names


@method("spdk_get_version", startup=True)
async def spdk_get_version(stack: Stack, params: None) -> dict[str, Any]:
    """The version; the text names qpair, the fields its numbers."""
    return version.as_spdk()


class FrameworkGetConfig(Params):
    """``with_batches`` is accepted: there are no batches to flatten."""

    name: str
    with_batches: bool | None = None


@method("framework_get_config", params=FrameworkGetConfig)
async def framework_get_config(stack: Stack, params: FrameworkGetConfig) -> Any:
    """The calls that recreate one subsystem."""
    if (part := resume(params.name)) is not None:
        return part
    try:
        return stack.config(params.name)
    except NoSuchDevice:
        raise InvalidParameters(f"Subsystem '{params.name[:64]}' not found") from None


@method("framework_get_subsystems")
async def framework_get_subsystems(stack: Stack, params: None) -> list[dict[str, Any]]:
    """The subsystems in the order of starting, and what each depends on."""
    begin(stack)
    dependencies = stack.subsystem_dependencies()
    return [{"subsystem": name, "depends_on": list(dependencies[name])} for name in stack.subsystem_order()]


@method("framework_start_init", startup=True, runtime=False)
async def framework_start_init(stack: Stack, params: None) -> bool:
    """End the startup state: start the subsystems."""
    await stack.start_subsystems()
    return True


@method("framework_wait_init", startup=True)
async def framework_wait_init(stack: Stack, params: None) -> bool:
    """Answer when the subsystems have started."""
    await stack.wait_ready()
    return True


@method("framework_get_scheduler", startup=True)
async def framework_get_scheduler(stack: Stack, params: None) -> dict[str, Any]:
    """What framework_set_scheduler and scheduler_set_options said; there is none: pollers stay on the reactor that they were given."""
    said = stack.inert.last("scheduler", "framework_set_scheduler")
    options = stack.inert.last("scheduler", "scheduler_set_options")
    return {
        "scheduler_name": said.get("name", "static"),
        "scheduler_period": said.get("period", 0),
        "isolated_core_mask": options.get("isolated_core_mask", ""),
        "scheduling_core": options.get("scheduling_core", stack.cores[0]),
    }


@method("framework_get_governor")
async def framework_get_governor(stack: Stack, params: None) -> dict[str, Any]:
    """Nothing: no governor sets the cores' frequencies."""
    return {}


@method("framework_get_pci_devices")
async def framework_get_pci_devices(stack: Stack, params: None) -> list[Any]:
    """The PCI devices that this process drives itself: none."""
    return []


@method("framework_disable_cpumask_locks", startup=True)
async def framework_disable_cpumask_locks(stack: Stack, params: None) -> bool:
    """Let others use these cores: they always may."""
    return True


@method("framework_enable_cpumask_locks", startup=True)
async def framework_enable_cpumask_locks(stack: Stack, params: None) -> bool:
    """SPDK would keep other instances off these cores. Here reactors that sleep share them, so this is without effect."""
    stack.inert.report("framework_enable_cpumask_locks", "has no effect here: cores are shared")
    return True


class QpairTakeover(Params):
    """``socket``: where the asking process listens; ``protocols``: what it speaks; ``version``: its own, for the log."""

    socket: str
    protocols: list[int]
    version: str = ""


@method("qpair_takeover", params=QpairTakeover)
async def qpair_takeover(stack: Stack, params: QpairTakeover) -> bool:
    """Let the process that listens on ``socket`` take this one's place; ``qpair serve --takeover`` asks so. True: it may; what comes of it is in both logs."""
    if stack.takeover is None:
        raise Unsupported("takeover: this stack lives in a program of its own; only qpair serve can be taken over")
    await stack.takeover(params.socket, params.protocols)
    return True


class SpdkKillInstance(Params):
    """``sig_name`` as "SIGTERM"."""

    sig_name: KillSignal


@method("spdk_kill_instance", params=SpdkKillInstance, startup=True)
async def spdk_kill_instance(stack: Stack, params: SpdkKillInstance) -> bool:
    """End this process as that signal would. The answer is sent first where the signal allows it."""
    if stack.stop_requested is not None and params.sig_name in ("SIGTERM", "SIGINT"):
        stack.stop_requested(params.sig_name)
    else:
        os.kill(os.getpid(), signal.Signals[params.sig_name])
    return True
