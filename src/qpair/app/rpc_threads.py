"""JSON-RPC methods about threads: reactors, their pollers, and on which cores they run.

A reactor is one thread and stands for SPDK's reactor and for its only thread: ``reactor_0`` with id 1 and so on, the same in every method here. Ticks are
nanoseconds. A poller that is polled is "running", one that sleeps until it is woken is "waiting"; nothing is ever paused, and there are no timed pollers
(timers are the reactor's own).

thread_set_cpumask binds the thread to other cores of the stack by the kernel's affinity; the reactor keeps the name of the core that it was made for.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from qpair.app.cores import format_mask, parse_mask
from qpair.app.rpc import TICKS_A_SECOND
from qpair.errors import InvalidArgument, InvalidParameters, from_errno
from qpair.rpc.registry import Params, method
from qpair.rpc.types import U64

if TYPE_CHECKING:
    from qpair.app.stack import Stack


@method("framework_get_reactors")
async def framework_get_reactors(stack: Stack, params: None) -> dict[str, Any]:
    """One object a reactor, with the processor time of its thread in the kernel's clock ticks."""
    reactors = []
    for number, reactor in enumerate(await stack.reactors(), 1):
        user, system = _thread_times(reactor["tid"])
        thread = {**_thread(number, reactor), "cpumask": _mask(reactor), "elapsed": reactor["busy_ns"] + reactor["idle_ns"]}
        reactors.append(
            {
                "lcore": reactor["lcore"],
                "numa_id": _numa_node(reactor["lcore"]),
                "tid": reactor["tid"],
                "busy": reactor["busy_ns"],
                "idle": reactor["idle_ns"],
                "in_interrupt": any(poller["state"] == "armed" for poller in reactor["pollers"]),
                "irq": 0,
                "sys": system,
                "usr": user,
                "lw_threads": [thread],
            }
        )
    return {"tick_rate": TICKS_A_SECOND, "pid": os.getpid(), "reactors": reactors}


@method("thread_get_stats")
async def thread_get_stats(stack: Stack, params: None) -> dict[str, Any]:
    """Busy and idle time of each thread."""
    threads = [
        {
            **_thread(number, reactor),
            "cpumask": _mask(reactor),
            "busy": reactor["busy_ns"],
            "idle": reactor["idle_ns"],
            "active_pollers_count": len(reactor["pollers"]),
            "timed_pollers_count": 0,
            "paused_pollers_count": 0,
        }
        for number, reactor in enumerate(await stack.reactors(), 1)
    ]
    return {"tick_rate": TICKS_A_SECOND, "ticks": time.monotonic_ns(), "threads": threads}


@method("thread_get_pollers")
async def thread_get_pollers(stack: Stack, params: None) -> dict[str, Any]:
    """The pollers of each thread, and how often they ran and found work."""
    threads = []
    for number, reactor in enumerate(await stack.reactors(), 1):
        pollers = [
            {
                "name": poller["name"],
                "id": index,
                "state": "running" if poller["state"] == "active" else "waiting",
                "run_count": poller["runs"],
                "busy_count": poller["busy_runs"],
            }
            for index, poller in enumerate(reactor["pollers"], 1)
        ]
        threads.append({**_thread(number, reactor), "active_pollers": pollers, "timed_pollers": [], "paused_pollers": []})
    return {"tick_rate": TICKS_A_SECOND, "threads": threads}


@method("thread_get_io_channels")
async def thread_get_io_channels(stack: Stack, params: None) -> dict[str, Any]:
    """Which bdevs each thread has a channel of. A thread has one channel of a bdev, whoever uses it: ``ref`` is 1."""
    channels: dict[int, list[dict[str, Any]]] = {}
    for entry in await stack.bdevs.iostat():
        for channel in entry["channels"]:
            channels.setdefault(channel["lcore"], []).append({"name": f"bdev_{entry['name']}", "ref": 1})
    threads = [
        {"name": _thread(number, reactor)["name"], "io_channels": channels.get(reactor["lcore"], [])}
        for number, reactor in enumerate(await stack.reactors(), 1)
    ]
    return {"tick_rate": TICKS_A_SECOND, "threads": threads}


class SetCpumask(Params):
    """``id`` as thread_get_stats gives it; ``cpumask`` as ``-m`` takes it, of which the stack's cores count."""

    id: U64
    cpumask: str


@method("thread_set_cpumask", params=SetCpumask)
async def thread_set_cpumask(stack: Stack, params: SetCpumask) -> bool:
    """Run a thread on other cores of the stack."""
    reactors = await stack.reactors()
    if not 1 <= params.id <= len(reactors):
        raise InvalidParameters(f"Thread {params.id} does not exist")
    try:
        wanted = parse_mask(params.cpumask)
    except InvalidArgument as error:
        raise InvalidParameters(f"parameter 'cpumask': {error.message}") from None
    chosen = set(wanted) & set(stack.cores)
    if not chosen:
        raise InvalidParameters(f"parameter 'cpumask': No CPU is selected from reactor mask {format_mask(stack.cores)}")
    tid = reactors[params.id - 1]["tid"]
    try:
        os.sched_setaffinity(tid, chosen)
    except OSError as error:
        raise from_errno(error.errno or 5, f"thread {params.id} (tid {tid}): {error.strerror}") from error
    return True


def _thread(number: int, reactor: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"reactor_{reactor['lcore']}", "id": number}


def _mask(reactor: dict[str, Any]) -> str:
    """Where the kernel lets it run."""
    try:
        return format_mask(os.sched_getaffinity(reactor["tid"]))
    except OSError:
        return format_mask([reactor["lcore"]])


def _numa_node(core: int) -> int:
    try:
        names = os.listdir(f"/sys/devices/system/cpu/cpu{core}")
    except OSError:
        return 0
    return next((int(name[4:]) for name in names if name.startswith("node") and name[4:].isdigit()), 0)


def _thread_times(tid: int) -> tuple[int, int]:
    """User and system time of a thread of this process, in clock ticks of the kernel."""
    try:
        with open(f"/proc/self/task/{tid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[11]), int(fields[12])
    except (OSError, IndexError, ValueError):
        return 0, 0
