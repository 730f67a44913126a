"""What stands on others, under load from a vhost front end: any floor goes, comes back, shrinks or fails at any time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.front_end import READ_IN, FrontEnd
from hostile.process import Perf, RpcFailed, Serve, until

# Each: how the floors above "base" are made, the name of the top, and of a floor in the middle with the method that deletes it.
TOWERS: dict[str, tuple[list[tuple[str, dict[str, Any]]], str, tuple[str, dict[str, Any]]]] = {
    "passthrus": (
        [
            ("bdev_passthru_create", {"name": "p0", "base_bdev_name": "base"}),
            ("bdev_passthru_create", {"name": "p1", "base_bdev_name": "p0"}),
            ("bdev_passthru_create", {"name": "p2", "base_bdev_name": "p1"}),
        ],
        "p2",
        ("bdev_passthru_delete", {"name": "p1"}),
    ),
    "delay on split": (
        [
            ("bdev_split_create", {"base_bdev": "base", "split_count": 2}),
            (
                "bdev_delay_create",
                {
                    "name": "slow",
                    "base_bdev_name": "basep1",
                    "avg_read_latency": 300,
                    "p99_read_latency": 2000,
                    "avg_write_latency": 300,
                    "p99_write_latency": 2000,
                },
            ),
            ("bdev_passthru_create", {"name": "top", "base_bdev_name": "slow"}),
        ],
        "top",
        ("bdev_delay_delete", {"name": "slow"}),
    ),
    "raid1": (
        [
            ("bdev_null_create", {"name": "other", "num_blocks": 16384, "block_size": 512}),
            ("bdev_raid_create", {"name": "r", "raid_level": "1", "base_bdevs": ["base", "other"]}),
            ("bdev_passthru_create", {"name": "top", "base_bdev_name": "r"}),
        ],
        "top",
        ("bdev_raid_delete", {"name": "r"}),
    ),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serve]:
    with Serve(tmp_path) as there:
        yield there
        assert there.end() == 0, there.log()
        assert not there.lines("Traceback"), there.log()


def build(server: Serve, name: str) -> str:
    floors, top, _ = TOWERS[name]
    server.rpc("bdev_null_create", name="base", num_blocks=16384, block_size=512)
    for method, params in floors:
        server.rpc(method, **params)
    return top


def names(server: Serve) -> set[str]:
    return {bdev["name"] for bdev in server.rpc("bdev_get_bdevs")}


def load(server: Serve, path: Path, top: str) -> Perf:
    perf = Perf(f"vhost:{path}", "--time", "30", "--depth", "16", "--pattern", "randrw", "--mix", "50")
    until(lambda: server.rpc("bdev_get_iostat", names=[top])["bdevs"][0]["num_read_ops"] > 100, "the load")
    return perf


def end(perf: Perf) -> None:
    perf.process.terminate()
    _, err = perf.process.communicate(timeout=20)
    assert b"Traceback" not in err, err.decode()


@pytest.mark.parametrize("tower", ["passthrus", "delay on split"])
def test_a_base_that_goes_takes_the_tower_along_and_brings_it_back(server: Serve, tower: str) -> None:
    top = build(server, tower)
    everything = names(server)
    perf = load(server, server.export("c", top), top)
    server.rpc("bdev_null_delete", name="base")
    assert names(server) == set()
    end(perf)
    server.rpc("bdev_null_create", name="base", num_blocks=16384, block_size=512)
    server.rpc("bdev_wait_for_examine")
    if tower == "delay on split":
        assert names(server) == {"base"}  # a split is forgotten with its base, as SPDK's is
        server.rpc("bdev_split_create", base_bdev="base", split_count=2)
        server.rpc("bdev_wait_for_examine")
    assert names(server) == everything
    server.rpc("vhost_delete_controller", ctrlr="c")
    with FrontEnd(server.export("again", top)).ready() as front_end:
        assert front_end.io(front_end.queues[0], READ_IN, 0, 512)[0] == 0


@pytest.mark.parametrize("tower", list(TOWERS))
def test_a_floor_that_is_deleted_under_load_leaves_its_base_whole(server: Serve, tower: str) -> None:
    top = build(server, tower)
    perf = load(server, server.export("c", top), top)
    method, params = TOWERS[tower][2]
    server.rpc(method, **params)
    assert top not in names(server)
    assert "base" in names(server)
    end(perf)
    (base,) = server.rpc("bdev_get_bdevs", name="base")
    assert base["claimed"] is (tower != "raid1")


def test_a_raid1_goes_on_without_the_base_that_was_deleted(server: Serve) -> None:
    top = build(server, "raid1")
    path = server.export("c", top)
    perf = load(server, path, top)
    server.rpc("bdev_null_delete", name="base")
    assert names(server) == {"other", "r", "top"}
    before = server.rpc("bdev_get_iostat", names=[top])["bdevs"][0]
    until(lambda: server.rpc("bdev_get_iostat", names=[top])["bdevs"][0]["num_write_ops"] > before["num_write_ops"] + 100, "more writes")
    assert server.rpc("bdev_get_iostat", names=[top])["bdevs"][0]["io_error"] == {}
    end(perf)


@pytest.mark.parametrize("tower", list(TOWERS))
def test_the_last_failure_of_a_tower_that_is_pulled_at_from_all_sides_is_one_by_name(server: Serve, tower: str) -> None:
    """Deleting, creating, resizing and resetting limits in any order: the server answers each call, with a result or a name."""
    rng = random.Random(tower)
    top = build(server, tower)
    perf = load(server, server.export("c", top), top)
    floors, _, deletion = TOWERS[tower]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("bdev_null_delete", {"name": "base"}),
        ("bdev_null_create", {"name": "base", "num_blocks": 16384, "block_size": 512}),
        ("bdev_null_resize", {"name": "base", "new_size": 4}),
        ("bdev_null_resize", {"name": "base", "new_size": 8}),
        ("bdev_set_qos_limit", {"name": top, "rw_ios_per_sec": 2000}),
        ("bdev_set_qos_limit", {"name": top, "rw_ios_per_sec": 0}),
        deletion,
        *floors,
    ]
    refusals: list[RpcFailed] = []
    for _ in range(60):
        method, params = rng.choice(calls)
        try:
            server.rpc(method, **params)
        except RpcFailed as refused:
            refusals.append(refused)
    named = (-32602, -1, -2, -16, -17, -19, -22, -95)
    assert not [str(refused) for refused in refusals if refused.code not in named]
    end(perf)
    assert server.rpc("spdk_get_version")["version"].startswith("qpair")
