"""What stands on what: the answers of a server as a graph of bdevs and exports, and the order in which a tree shows it.

How it works: qpair says in the member ``qpair`` of each bdev which bdevs it stands on and who claimed it. SPDK does not: there the bases are read from ``driver_specific``, where every
module names its base in one of a few ways (`BASE_KEYS`), and who claimed is guessed from who stands on it. A name counts as a base only where it is a bdev's name or alias. Exports (vhost, NVMe-oF, iSCSI, NBD, ublk) are found in
the answers of the methods in `EXPORTS`. Rates are differences of two bdev_get_iostat.

Errors: none; an answer that looks otherwise is read as far as it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EXPORTS", "Bdev", "Export", "Forest", "Line", "Rates", "rates"]

BASE_KEYS = (
    "base_bdev",
    "base_bdev_name",
    "base_bdevs",
    "base_bdevs_list",
    "base_name",
    "cache",
    "cache_bdev_name",
    "cache_device",
    "core_bdev_name",
    "core_device",
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one bdev, a second."""

    read_iops: float
    write_iops: float
    read_mb_per_s: float
    write_mb_per_s: float

    @property
    def iops(self) -> float:
        """Reads and writes."""
        return self.read_iops + self.write_iops


@dataclass(frozen=True, slots=True)
class Export:
    """What serves a bdev to somebody else. ``kind``: "vhost", "nvmf", "iscsi", "nbd", "ublk"; ``detail``: where, and how many are connected."""

    kind: str
    name: str
    bdev: str
    detail: str


@dataclass(slots=True)
class Bdev:
    """One bdev as the server tells of it."""

    name: str
    aliases: list[str]
    product: str
    block_size: int
    num_blocks: int
    claimed: bool
    claimed_by: str | None
    told: str
    """What else its module says that a user wants to see: a raid's state."""
    bases: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    rates: Rates | None = None

    @property
    def size_bytes(self) -> int:
        """Its capacity."""
        return self.num_blocks * self.block_size

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        shown = self.rates
        return {
            "name": self.name,
            "aliases": self.aliases,
            "product_name": self.product,
            "size_bytes": self.size_bytes,
            "block_size": self.block_size,
            "bases": self.bases,
            "used_by": self.users,
            "claimed": self.claimed,
            "claimed_by": self.claimed_by,
            "state": self.told or None,
            "exports": [{"kind": item.kind, "name": item.name, "detail": item.detail} for item in self.exports],
            "rates": None if shown is None else {name: round(getattr(shown, name), 3) for name in Rates.__slots__},
        }


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a tree. ``stem``: what is drawn before the name; ``again``: it was shown with all its branches before."""

    stem: str
    item: Bdev | Export
    again: bool = False


class Forest:
    """All bdevs and exports, by name, in the server's order."""

    def __init__(self, answer: Sequence[Mapping[str, Any]], exports: Iterable[Export]) -> None:
        names = {str(alias): str(raw["name"]) for raw in answer for alias in raw.get("aliases", [])}
        names |= {str(raw["name"]): str(raw["name"]) for raw in answer}
        self._names = names
        self.bdevs = {str(raw["name"]): _bdev(raw) for raw in answer}
        for raw in answer:
            bdev = self.bdevs[str(raw["name"])]
            bdev.bases = _bases(raw, names, bdev.name)
            for base in bdev.bases:
                self.bdevs[base].users.append(bdev.name)
        modules = {str(raw["name"]): _module(raw.get("driver_specific")) for raw in answer}
        for bdev in self.bdevs.values():
            if bdev.claimed and bdev.claimed_by is None and bdev.users:
                bdev.claimed_by = ", ".join(dict.fromkeys(modules[user] or user for user in bdev.users))
        self.exports = [export for export in exports if names.get(export.bdev) is not None]
        for export in self.exports:
            self.bdevs[names[export.bdev]].exports.append(export)

    def find(self, name: str) -> str | None:
        """The name of the bdev that has this name, alias or UUID."""
        return self._names.get(name)

    def connected(self, names: Iterable[str]) -> set[str]:
        """``names``, all they stand on, and all that stands on them."""
        chosen = set(names)
        for step in ("bases", "users"):
            left = list(names)
            seen = set(left)
            while left:
                for other in getattr(self.bdevs[left.pop()], step):
                    if other not in seen:
                        seen.add(other)
                        left.append(other)
            chosen |= seen
        return chosen

    def lines(self, *, chosen: set[str] | None = None, inverse: bool = False) -> list[Line]:
        """The tree: bases first, or with ``inverse`` exports first."""
        shown = [bdev for bdev in self.bdevs.values() if chosen is None or bdev.name in chosen]
        names = {bdev.name for bdev in shown}

        def below(item: Bdev | Export) -> list[Bdev | Export]:
            if isinstance(item, Export):
                return [self.bdevs[self._names[item.bdev]]] if inverse else []
            others = [self.bdevs[name] for name in (item.bases if inverse else item.users) if name in names]
            return [*others, *([] if inverse else item.exports)]

        roots: list[Bdev | Export]
        if inverse:
            roots = [export for bdev in shown for export in bdev.exports]
            roots += [bdev for bdev in shown if not bdev.exports and not names.intersection(bdev.users)]
        else:
            roots = [bdev for bdev in shown if not names.intersection(bdev.bases)]
        seen: set[str] = set()
        lines = [line for root in roots for line in _walk(root, below, "", "", seen)]
        # what stands on itself by way of others has no root
        for bdev in shown:
            if bdev.name not in seen:
                lines.extend(_walk(bdev, below, "", "", seen))
        return lines


def _walk(
    item: Bdev | Export, below: Callable[[Bdev | Export], list[Bdev | Export]], stem: str, indent: str, seen: set[str]
) -> Iterator[Line]:
    again = isinstance(item, Bdev) and item.name in seen
    under = below(item)
    yield Line(stem, item, again and bool(under))
    if again:
        return
    if isinstance(item, Bdev):
        seen.add(item.name)
    for index, child in enumerate(under):
        last = index == len(under) - 1
        yield from _walk(child, below, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  "), seen)


def rates(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Rates]:
    """By bdev, from two answers of bdev_get_iostat. Counters that were reset meanwhile count as none."""
    seconds = (after["ticks"] - before["ticks"]) / after["tick_rate"]
    earlier = {entry["name"]: entry for entry in before["bdevs"]}
    found: dict[str, Rates] = {}
    for entry in after["bdevs"]:
        old = earlier.get(entry["name"])
        if old is None or seconds <= 0:
            continue

        def rate(key: str, now: Mapping[str, Any] = entry, then: Mapping[str, Any] = old) -> float:
            return float(max(0, now.get(key, 0) - then.get(key, 0)) / seconds)

        found[str(entry["name"])] = Rates(
            rate("num_read_ops"), rate("num_write_ops"), rate("bytes_read") / 1e6, rate("bytes_written") / 1e6
        )
    return found


def _bdev(raw: Mapping[str, Any]) -> Bdev:
    own = raw.get("qpair")
    claimed_by = own.get("claimed_by") if isinstance(own, Mapping) else None
    return Bdev(
        name=str(raw["name"]),
        aliases=[str(alias) for alias in raw.get("aliases", [])],
        product=str(raw.get("product_name", "")),
        block_size=int(raw.get("block_size", 0)),
        num_blocks=int(raw.get("num_blocks", 0)),
        claimed=bool(raw.get("claimed")),
        claimed_by=str(claimed_by) if claimed_by else None,
        told=_told(raw.get("driver_specific")),
    )


def _module(specific: Any) -> str | None:
    if not isinstance(specific, Mapping):
        return None
    return next((str(key) for key in specific), None)


def _told(specific: Any) -> str:
    raid = specific.get("raid") if isinstance(specific, Mapping) else None
    if not isinstance(raid, Mapping):
        return ""
    told = f"{raid.get('raid_level', 'raid')} {raid.get('state', '')}".strip()
    total, there = raid.get("num_base_bdevs"), raid.get("num_base_bdevs_operational")
    if isinstance(total, int) and isinstance(there, int) and there < total:
        told += f", {there} of {total} bases"
    process = raid.get("process")
    if isinstance(process, Mapping) and isinstance(progress := process.get("progress"), Mapping):
        told += f", {process.get('type', 'rebuild')} {progress.get('percent', 0)} %"
    return told


def _bases(raw: Mapping[str, Any], names: Mapping[str, str], own: str) -> list[str]:
    """Names of the bdevs that a bdev stands on: said outright, or found in what its module says."""
    outright = raw.get("qpair")
    if isinstance(outright, Mapping) and "bases" in outright:
        found = _strings(outright["bases"])
    else:
        found = list(_named(raw.get("driver_specific")))
    return [name for name in dict.fromkeys(names[text] for text in found if text in names) if name != own]


def _named(value: Any) -> Iterator[str]:
    """Texts that stand under one of `BASE_KEYS`, at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in BASE_KEYS:
                yield from _strings(inner)
            yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _strings(value.get("name"))
    return [text for inner in value for text in _strings(inner)] if isinstance(value, list) else []


def _vhost(answer: Sequence[Mapping[str, Any]]) -> Iterator[Export]:
    for controller in answer:
        backend = controller.get("backend_specific") or {}
        connected = len(controller.get("sessions") or [])
        name, where = str(controller.get("ctrlr")), str(controller.get("socket", ""))
        detail = f"{where}, {connected} connected" if where else f"{connected} connected"
        block = backend.get("block") or {}
        if block.get("bdev"):
            yield Export("vhost", name, str(block["bdev"]), detail + (", read-only" if block.get("readonly") else ""))
        for target in backend.get("scsi") or []:
            for unit in target.get("luns") or []:
                yield Export("vhost", f"{name} target {target.get('scsi_dev_num')}", str(unit.get("bdev_name")), detail)


def _nvmf(answer: Sequence[Mapping[str, Any]]) -> Iterator[Export]:
    for subsystem in answer:
        where = ", ".join(
            f"{listener.get('trtype', '').lower()}://{listener.get('traddr')}:{listener.get('trsvcid')}"
            for listener in subsystem.get("listen_addresses") or []
        )
        for namespace in subsystem.get("namespaces") or []:
            yield Export("nvmf", f"{subsystem.get('nqn')} ns {namespace.get('nsid')}", str(namespace.get("bdev_name")), where)


def _iscsi(answer: Sequence[Mapping[str, Any]]) -> Iterator[Export]:
    for target in answer:
        for unit in target.get("luns") or []:
            yield Export("iscsi", f"{target.get('name')} lun {unit.get('lun_id')}", str(unit.get("bdev_name")), "")


def _nbd(answer: Sequence[Mapping[str, Any]]) -> Iterator[Export]:
    for disk in answer:
        yield Export("nbd", str(disk.get("nbd_device")), str(disk.get("bdev_name")), "")


def _ublk(answer: Sequence[Mapping[str, Any]]) -> Iterator[Export]:
    for disk in answer:
        yield Export("ublk", str(disk.get("ublk_device")), str(disk.get("bdev_name")), "")


EXPORTS: dict[str, Callable[[Sequence[Mapping[str, Any]]], Iterator[Export]]] = {
    "vhost_get_controllers": _vhost,
    "nvmf_get_subsystems": _nvmf,
    "iscsi_get_target_nodes": _iscsi,
    "nbd_get_disks": _nbd,
    "ublk_get_disks": _ublk,
}
