"""Runs of the load generator by the engine's interface, and that an interpreter which hangs holds no I/O up."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from qpair import _engine as native

STALL_SECONDS = 2.0


def test_a_run_reports_what_it_did(driver: Any) -> None:
    engine = driver.engine
    driver.malloc("m0", 2048, 512)
    cores = [reactor["lcore"] for reactor in engine.reactors()]
    report = driver.wait(engine.perf_start("m0", pattern="randrw", read_percent=70, max_ios=20_000, io_bytes=4096, depth=16), 30)
    assert (report["ios"], report["bytes"], report["errors"]) == (20_000, 20_000 * 4096, 0)
    assert report["reads"] + report["writes"] == 20_000
    assert 12_000 < report["reads"] < 16_000
    assert [share["lcore"] for share in report["per_reactor"]] == cores
    assert sum(share["ios"] for share in report["per_reactor"]) == 20_000
    steps = [report["min_ns"], *(report["percentiles"][key] for key in ("50", "99", "99.9", "99.99")), report["max_ns"]]
    assert steps == sorted(steps)
    assert report["min_ns"] <= report["mean_ns"] <= report["max_ns"]
    assert isinstance(report["histogram"], bytes)
    assert len(report["histogram"]) > 40


def test_verify_finds_what_is_wrong(start: Callable[..., Any]) -> None:
    driver = start()
    driver.wait(driver.engine.bdev_null_create("n0", num_blocks=4096, block_size=512))
    report = driver.wait(driver.engine.perf_start("n0", pattern="randwrite", verify=True, max_ios=500, depth=8), 30)
    assert report["verify_errors"] > 0
    driver.malloc("m0", 4096, 512)
    report = driver.wait(driver.engine.perf_start("m0", pattern="randwrite", verify=True, max_ios=500, depth=8), 30)
    assert (report["verify_errors"], report["errors"], report["first_mismatch"]) == (0, 0, None)


def test_a_run_can_be_watched_and_stopped(start: Callable[..., Any]) -> None:
    driver = start()
    driver.malloc("m0", 2048, 512)
    token = driver.engine.perf_start("m0")
    time.sleep(0.1)
    first = driver.engine.perf_snapshot(token)
    time.sleep(0.1)
    second = driver.engine.perf_snapshot(token)
    assert 0 < first["ios"] < second["ios"]
    assert second["bytes"] == second["ios"] * 4096
    driver.engine.perf_stop(token)
    assert driver.wait(token)["ios"] >= second["ios"]
    for call in (driver.engine.perf_stop, driver.engine.perf_snapshot):
        with pytest.raises(native.EngineError) as caught:
            call(token)
        assert (caught.value.errno, caught.value.strerror) == (errno.ENOENT, f"run {token} is not under way")


def test_stopping_the_engine_ends_its_runs_with_their_reports(start: Callable[..., Any]) -> None:
    driver = start()
    driver.malloc("m0", 2048, 512)
    tokens = [driver.engine.perf_start("m0", depth=4) for _ in range(3)]
    time.sleep(0.05)
    driver.engine.stop(5000)
    assert all(driver.wait(token)["ios"] > 0 for token in tokens)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pattern": "sideways"}, "pattern sideways: randread, randwrite, randrw, read, write, rw, flush, unmap or write_zeroes"),
        ({"read_percent": 101}, "read_percent 101: 0 to 100"),
        ({"depth": 0}, "depth 0: 1 to 65536"),
        ({"reactors": [77]}, "reactors 77: out of {cores}"),
    ],
)
def test_impossible_runs_are_refused_and_answer_nothing(start: Callable[..., Any], options: dict[str, Any], text: str) -> None:
    driver = start()
    driver.malloc()
    cores = ", ".join(str(reactor["lcore"]) for reactor in driver.engine.reactors())
    while driver.drain():
        pass
    with pytest.raises(native.EngineError) as caught:
        driver.engine.perf_start("m0", **({"io_bytes": 512} | options))
    assert (caught.value.errno, caught.value.strerror) == (errno.EINVAL, f"Invalid argument: {text.format(cores=cores)}")
    assert driver.engine.events() == []


def burn() -> None:
    """Two seconds in one call that never lets the GIL go."""
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(STALL_SECONDS * 1e6)))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for Python and one for the reactor")
def test_io_goes_on_while_the_interpreter_hangs(start: Callable[..., Any]) -> None:
    driver = start()
    driver.wait(driver.engine.bdev_null_create("n0", num_blocks=1 << 20, block_size=512))
    token = driver.engine.perf_start("n0", depth=32)
    time.sleep(0.2)
    before = driver.engine.perf_snapshot(token)
    burn()
    after = driver.engine.perf_snapshot(token)
    driver.engine.perf_stop(token)
    report = driver.wait(token)
    during = (after["ios"] - before["ios"]) / STALL_SECONDS
    usual = before["ios"] / (before["elapsed_ns"] / 1e9)
    # A machine that others use too may take the core away, for a while; an interpreter's stall would be all of it.
    assert report["max_gap_ns"] < STALL_SECONDS * 1e9 / 4
    assert during > usual / 10
