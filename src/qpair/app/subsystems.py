"""Subsystems: what a stack consists of, what each needs, and the order that follows.

How it works: a room offers a `Subsystem`. `order` sorts them so that each comes after everything it depends on; `Stack` starts them in
that order and stops them in the reverse. The order is stable: of those that may come next, the one declared first does.

A room's ``config(stack)`` gives the calls that would bring it back to what it is now, as ``{"method": ..., "params": ...}``; it is what
``framework_get_config`` answers and what a saved configuration holds.

Errors: a dependency that is not there, a name declared twice and a cycle are each a `SubsystemError` that names the subsystems.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qpair.errors import SubsystemError

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["Subsystem", "order"]

ConfigEntry = Mapping[str, Any]


class Subsystem:
    """Base of all subsystems: a name, what it depends on, and its life. Override what is needed."""

    name: ClassVar[str] = ""
    depends_on: ClassVar[tuple[str, ...]] = ()

    async def start(self, stack: Stack) -> None:
        """Called after everything in ``depends_on`` has started."""

    async def stop(self, stack: Stack, deadline_ms: int) -> None:
        """Called before anything in ``depends_on`` is stopped. Must return within ``deadline_ms`` or be abandoned by name."""

    def config(self, stack: Stack) -> list[ConfigEntry]:
        """The calls that recreate the present state, in an order that works."""
        return []


def order(dependencies: Mapping[str, Iterable[str]]) -> list[str]:
    """The names of ``dependencies`` (name -> names it needs), each after all it needs."""
    needs = {name: tuple(dict.fromkeys(depends)) for name, depends in dependencies.items()}
    for name, depends in needs.items():
        for dependency in depends:
            if dependency not in needs:
                raise SubsystemError(f"subsystem {name!r} depends on {dependency!r}, which does not exist")
    dependents: dict[str, list[str]] = {name: [] for name in needs}
    missing = {name: len(depends) for name, depends in needs.items()}
    for name, depends in needs.items():
        for dependency in depends:
            dependents[dependency].append(name)
    ordered: list[str] = []
    rank = {name: index for index, name in enumerate(needs)}
    ready = [name for name in needs if missing[name] == 0]
    while ready:
        ready.sort(key=rank.__getitem__)
        name = ready.pop(0)
        ordered.append(name)
        for dependent in dependents[name]:
            missing[dependent] -= 1
            if missing[dependent] == 0:
                ready.append(dependent)
    if len(ordered) < len(needs):
        raise SubsystemError(f"subsystems depend on each other in a circle: {' -> '.join(_cycle(needs, set(needs) - set(ordered)))}")
    return ordered


def _cycle(needs: Mapping[str, tuple[str, ...]], left: set[str]) -> list[str]:
    """One circle among ``left``, each of which still waits for another of ``left``."""
    path: list[str] = []
    name = min(left)
    while name not in path:
        path.append(name)
        name = next(dependency for dependency in needs[name] if dependency in left)
    return [*path[path.index(name) :], name]
