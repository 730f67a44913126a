"""JSON-RPC methods of the process itself: what methods there are, states, reactors, subsystems, configuration, logging, version and end."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from qpair.app import inert, version
from qpair.app.cores import format_mask
from qpair.app.logs import FLAGS, get_level, set_level
from qpair.errors import InvalidParameters, NoSuchDevice
from qpair.rpc.registry import REGISTRY, Params, method
from qpair.rpc.types import KillSignal, LogLevel

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
    try:
        return stack.config(params.name)
    except NoSuchDevice:
        raise InvalidParameters(f"Subsystem '{params.name[:64]}' not found") from None


@method("framework_get_subsystems")
async def framework_get_subsystems(stack: Stack, params: None) -> list[dict[str, Any]]:
    """The subsystems in the order of starting, and what each depends on."""
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


@method("framework_get_reactors")
async def framework_get_reactors(stack: Stack, params: None) -> dict[str, Any]:
    """One object a reactor; its pollers stand as threads, for a reactor of ours runs them itself."""
    reactors = []
    for reactor in await stack.reactors():
        lcore = reactor["lcore"]
        usage = _thread_seconds(reactor["tid"])
        threads = [
            {"name": poller["name"], "id": index, "cpumask": format_mask([lcore]), "elapsed": poller["busy_ns"]}
            for index, poller in enumerate(reactor["pollers"], 1)
        ]
        reactors.append(
            {
                "lcore": lcore,
                "numa_id": _numa_node(lcore),
                "tid": reactor["tid"],
                "busy": reactor["busy_ns"],
                "idle": reactor["idle_ns"],
                "in_interrupt": any(poller["state"] == "armed" for poller in reactor["pollers"]),
                "irq": 0,
                "sys": usage[1],
                "usr": usage[0],
                "lw_threads": threads,
            }
        )
    return {"tick_rate": TICKS_A_SECOND, "pid": os.getpid(), "reactors": reactors}


@method("thread_get_stats")
async def thread_get_stats(stack: Stack, params: None) -> dict[str, Any]:
    """One object a reactor (a reactor is the thread)."""
    threads = []
    for index, reactor in enumerate(await stack.reactors(), 1):
        threads.append(
            {
                "name": f"reactor_{reactor['lcore']}",
                "id": index,
                "cpumask": format_mask([reactor["lcore"]]),
                "busy": reactor["busy_ns"],
                "idle": reactor["idle_ns"],
                "active_pollers_count": len(reactor["pollers"]),
                "timed_pollers_count": 0,
                "paused_pollers_count": 0,
            }
        )
    return {"tick_rate": TICKS_A_SECOND, "ticks": time.monotonic_ns(), "threads": threads}


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


class LogSetLevel(Params):
    """``level``: ERROR, WARNING, NOTICE, INFO or DEBUG."""

    level: LogLevel


@method("log_set_level", params=LogSetLevel, startup=True)
async def log_set_level(stack: Stack, params: LogSetLevel) -> bool:
    """Drop what is less severe."""
    set_level(params.level)
    return True


@method("log_get_level", startup=True)
async def log_get_level(stack: Stack, params: None) -> str:
    """The present level."""
    return get_level()


@method("log_set_print_level", params=LogSetLevel, startup=True)
async def log_set_print_level(stack: Stack, params: LogSetLevel) -> bool:
    """Print nothing less severe on standard error."""
    set_level(params.level, printed=True)
    return True


@method("log_get_print_level", startup=True)
async def log_get_print_level(stack: Stack, params: None) -> str:
    """The present level of what is printed."""
    return get_level(printed=True)


@method("log_get_flags", startup=True)
async def log_get_flags(stack: Stack, params: None) -> dict[str, bool]:
    """The components whose debug messages can be switched on, and whether they are."""
    return {flag: logging.getLogger(f"qpair.{flag}").level == logging.DEBUG for flag in FLAGS}


class LogFlag(Params):
    """``flag``: one of log_get_flags, or "all"."""

    flag: str


@method("log_set_flag", params=LogFlag, startup=True)
async def log_set_flag(stack: Stack, params: LogFlag) -> bool:
    """Debug messages of one component on."""
    _set_flag(params.flag, logging.DEBUG)
    return True


@method("log_clear_flag", params=LogFlag, startup=True)
async def log_clear_flag(stack: Stack, params: LogFlag) -> bool:
    """Debug messages of one component off."""
    _set_flag(params.flag, logging.NOTSET)
    return True


def _set_flag(flag: str, level: int) -> None:
    if flag != "all" and flag not in FLAGS:
        raise InvalidParameters(f"parameter 'flag': {flag!r:.64} is none of {', '.join(FLAGS)}, all")
    for name in FLAGS if flag == "all" else (flag,):
        logging.getLogger(f"qpair.{name}").setLevel(level)


def _numa_node(core: int) -> int:
    try:
        names = os.listdir(f"/sys/devices/system/cpu/cpu{core}")
    except OSError:
        return 0
    return next((int(name[4:]) for name in names if name.startswith("node") and name[4:].isdigit()), 0)


def _thread_seconds(tid: int) -> tuple[int, int]:
    """User and system time of a thread of this process, in clock ticks of the kernel."""
    try:
        with open(f"/proc/self/task/{tid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[11]), int(fields[12])
    except (OSError, IndexError, ValueError):
        return 0, 0
