"""Bdevs through the engine's own interface: geometry, single I/Os, statistics, and life with I/O in flight."""

from __future__ import annotations

import array
import errno
import random
from collections.abc import Callable
from typing import Any

import pytest

from qpair import _engine as native


def refusal(call: Callable[[], Any]) -> tuple[int | None, str | None]:
    with pytest.raises(native.EngineError) as caught:
        call()
    return caught.value.errno, caught.value.strerror


@pytest.mark.parametrize("kind", ["null", "malloc"])
@pytest.mark.parametrize(
    ("num_blocks", "block_size", "text"),
    [
        (0, 512, f"num_blocks 0: 1 to {(2**63 - 1) // 512}"),
        (2**64 - 1, 512, f"num_blocks {2**64 - 1}: 1 to {(2**63 - 1) // 512}"),
        (-1, 512, f"num_blocks -1: 0 to {2**64 - 1}"),
        (2**64, 512, f"num_blocks {2**64}: 0 to {2**64 - 1}"),
        (8, 0, "block_size 0: a power of two from 512 to 65536"),
        (8, 513, "block_size 513: a power of two from 512 to 65536"),
        (8, 131072, "block_size 131072: a power of two from 512 to 65536"),
        (8, 2**32, f"block_size {2**32}: 0 to {2**32 - 1}"),
    ],
)
def test_impossible_geometry_is_refused_by_name_value_and_limit(
    start: Callable[..., Any], kind: str, num_blocks: int, block_size: int, text: str
) -> None:
    create = getattr(start().engine, f"bdev_{kind}_create")
    assert refusal(lambda: create("d", num_blocks=num_blocks, block_size=block_size)) == (errno.EINVAL, f"Invalid argument: {text}")


def test_names_and_uuids_are_unique(start: Callable[..., Any]) -> None:
    engine = start().engine
    uuid = "8c7a2a44-6b05-4a9c-8e5b-0f6f3f9c2d11"
    engine.bdev_null_create("a", num_blocks=8, block_size=512, uuid=uuid)
    again = lambda name, uuid: refusal(lambda: engine.bdev_null_create(name, num_blocks=8, block_size=512, uuid=uuid))  # noqa: E731
    assert again("a", None) == (errno.EEXIST, "File exists: bdev a")
    assert again("b", uuid) == (errno.EEXIST, f"File exists: bdev a has uuid {uuid}")
    assert again("c", "nonsense") == (errno.EINVAL, "Invalid argument: uuid nonsense: 32 hexadecimal digits, as 8-4-4-4-12")
    assert again("", None) == (errno.EINVAL, "Invalid argument: name : 1 to 255 bytes")
    assert [info["name"] for info in engine.bdev_info(uuid)] == ["a"]


def test_an_unknown_bdev_is_no_such_device(start: Callable[..., Any]) -> None:
    driver = start()
    expected = (errno.ENODEV, "No such device: bdev x")
    for call in (driver.engine.bdev_open, driver.engine.bdev_info, driver.engine.bdev_iostat):
        assert refusal(lambda call=call: call("x")) == expected  # type: ignore[misc]
    assert refusal(lambda: driver.wait(driver.engine.bdev_unregister("x"))) == expected
    assert refusal(lambda: driver.wait(driver.engine.bdev_resize("x", 8))) == expected


def test_info_tells_geometry_and_who_uses_it(start: Callable[..., Any]) -> None:
    driver = start()
    driver.malloc("m0", 64, 4096, physical_block_size=8192, optimal_io_boundary=16)
    driver.open("m0")
    driver.engine.bdev_claim("m0", "lvol")
    (info,) = driver.engine.bdev_info("m0")
    told = {key: info[key] for key in ("name", "module", "block_size", "num_blocks", "physical_block_size", "optimal_io_boundary")}
    assert told == {
        "name": "m0",
        "module": "malloc",
        "block_size": 4096,
        "num_blocks": 64,
        "physical_block_size": 8192,
        "optimal_io_boundary": 16,
    }
    assert (info["claimed_by"], info["open_count"], info["removing"], info["readonly"], info["path"]) == ("lvol", 1, False, False, None)
    ops = {"read", "write", "flush", "unmap", "write_zeroes", "reset", "abort", "copy", "zcopy"}
    assert {op for op, supported in info["supported"].items() if supported} == ops


def test_a_claim_keeps_writers_away(start: Callable[..., Any]) -> None:
    driver = start()
    engine = driver.engine
    driver.malloc()
    engine.bdev_claim("m0", "lvol")
    busy = (errno.EBUSY, "Device or resource busy: bdev m0 is claimed by lvol")
    assert refusal(lambda: engine.bdev_open("m0")) == busy
    assert refusal(lambda: engine.bdev_claim("m0", "other")) == busy
    assert refusal(lambda: engine.bdev_release("m0", "other")) == busy
    engine.bdev_release("m0", "lvol")
    engine.bdev_claim("m0", "other")
    driver.wait(engine.bdev_unregister("m0"))  # a claim is against writers, not against the removal


def test_malloc_keeps_what_was_written(driver: Any) -> None:
    rng = random.Random(2)
    size, blocks = 512, 300
    disk = driver.open(driver.malloc("m0", blocks, size))
    image = bytearray(blocks * size)
    for _ in range(200):
        lba = rng.randrange(blocks)
        count = rng.randint(1, min(40, blocks - lba))
        op = rng.choice(["write", "write", "read", "unmap", "write_zeroes", "flush"])
        span = slice(lba * size, (lba + count) * size)
        if op == "write":
            data = rng.randbytes(count * size)
            assert driver.io(disk, "write", lba, count, data) is None
            image[span] = data
        elif op == "read":
            assert driver.io(disk, "read", lba, count) == bytes(image[span])
        elif op == "flush":
            assert driver.io(disk, "flush") is None
        else:
            assert driver.io(disk, op, lba, count) is None
            image[span] = bytes(count * size)
    assert driver.io(disk, "read", 0, blocks) == bytes(image)


def test_a_write_takes_any_buffer_and_copies_it_before_it_returns(start: Callable[..., Any]) -> None:
    driver = start()
    disk = driver.open(driver.malloc())
    words = array.array("I", range(128))
    expected = words.tobytes()
    token = driver.engine.bdev_io(disk, "write", 0, 1, words)
    words[0] = 77
    driver.wait(token)
    assert driver.io(disk, "read", 0, 1) == expected
    driver.io(disk, "write", 1, 1, memoryview(bytearray(b"x" * 512)))
    assert driver.io(disk, "read", 1, 1) == b"x" * 512
    with pytest.raises(TypeError):
        driver.engine.bdev_io(disk, "write", 0, 1, "text")
    with pytest.raises(TypeError):
        driver.engine.bdev_io(disk, "write", 0, 1, memoryview(bytes(1024))[::2])


def test_large_ios_move_whole(start: Callable[..., Any]) -> None:
    driver = start()
    disk = driver.open(driver.malloc("big", 65536, 512))
    data = random.Random(1).randbytes(32 << 20)
    driver.io(disk, "write", 0, 65536, data)
    assert driver.io(disk, "read", 0, 65536) == data


def test_bad_ios_are_refused_before_they_start(start: Callable[..., Any]) -> None:
    driver = start()
    engine = driver.engine
    disk, reader = driver.open(driver.malloc()), driver.open("m0", write=False)
    past = "bdev m0 has 256 blocks"
    invalid = [
        (("read", 256, 1), f"offset_blocks + num_blocks 256 + 1: {past}"),
        (("read", 2**64 - 1, 2), f"offset_blocks + num_blocks {2**64 - 1} + 2: {past}"),
        (("unmap", 255, 2), f"offset_blocks + num_blocks 255 + 2: {past}"),
        (("read", 0, 0), "num_blocks 0: at least 1"),
        (("read", -1, 1), f"offset_blocks -1: 0 to {2**64 - 1}"),
        (("write", 0, 1), "data None: a write needs a buffer"),
        (("write", 0, 2, bytes(512)), "data of 512 bytes: 1024 bytes"),
        (("erase", 0, 1), "op erase: read, write, flush, unmap, write_zeroes, reset, compare, compare_and_write or copy"),
    ]
    for args, text in invalid:
        assert refusal(lambda args=args: engine.bdev_io(disk, *args)) == (errno.EINVAL, f"Invalid argument: {text}")  # type: ignore[misc]
    only = (errno.EBADF, f"descriptor {reader} of bdev m0 is open for reading only")
    assert refusal(lambda: engine.bdev_io(reader, "write", 0, 1, bytes(512))) == only
    assert refusal(lambda: engine.bdev_io(reader, "unmap", 0, 1)) == only
    assert refusal(lambda: engine.bdev_io(999, "read", 0, 1)) == (errno.EBADF, "descriptor 999 is not open")
    engine.bdev_null_create("huge", num_blocks=2**40, block_size=512)
    huge = driver.open("huge")
    limit = "num_blocks 524289: at most 524288 in one I/O (268435456 bytes)"
    assert refusal(lambda: engine.bdev_io(huge, "read", 0, 524289)) == (errno.EINVAL, f"Invalid argument: {limit}")


def test_a_closed_descriptor_is_gone_after_its_last_io(start: Callable[..., Any]) -> None:
    driver = start()
    disk = driver.open(driver.malloc())
    reads = [driver.engine.bdev_io(disk, "read", i, 1) for i in range(10)]
    closed = driver.engine.bdev_close(disk)
    assert refusal(lambda: driver.engine.bdev_io(disk, "read", 0, 1)) == (errno.EBADF, f"descriptor {disk} is not open")
    assert refusal(lambda: driver.engine.bdev_close(disk)) == (errno.EBADF, f"descriptor {disk} is not open")
    assert [driver.wait(token) for token in reads] == [bytes(512)] * 10
    driver.wait(closed)
    assert driver.engine.bdev_info("m0")[0]["open_count"] == 0


def test_resizing_is_seen_and_announced(driver: Any) -> None:
    engine = driver.engine
    driver.wait(engine.bdev_null_create("n0", num_blocks=100, block_size=512))
    disk = driver.open("n0")
    assert refusal(lambda: engine.bdev_io(disk, "read", 100, 1))[0] == errno.EINVAL
    driver.wait(engine.bdev_resize("n0", 200))
    assert driver.io(disk, "read", 199, 1) == bytes(512)
    driver.wait(engine.bdev_resize("n0", 50))
    assert refusal(lambda: engine.bdev_io(disk, "read", 50, 1))[0] == errno.EINVAL
    assert (engine.bdev_info("n0")[0]["num_blocks"], engine.bdev_info("n0")[0]["version"]) == (50, 3)
    assert refusal(lambda: driver.wait(engine.bdev_resize("n0", 0))) == (
        errno.EINVAL,
        f"Invalid argument: num_blocks 0: 1 to {(2**63 - 1) // 512}",
    )
    assert [event.kind for event in driver.events_of(native.BdevEvent)] == ["added", "resized", "resized"]


def test_unregistering_completes_each_io_in_flight_once(driver: Any) -> None:
    engine = driver.engine
    disk = driver.open(driver.malloc())
    tokens = [engine.bdev_io(disk, "write", i % 256, 1, bytes(512)) for i in range(500)]
    gone = engine.bdev_unregister("m0")
    refused = 0
    for i in range(500):
        try:
            tokens.append(engine.bdev_io(disk, "read", i % 256, 1))
        except native.EngineError as error:
            refused += error.errno == errno.ENODEV
    driver.wait(gone)
    outcomes = {0: 0, errno.ENODEV: 0}
    for token in tokens:
        error = driver.reply(token).error
        outcomes[error.errno if error else 0] += 1
        assert len(driver.replies[token]) == 1
    assert sum(outcomes.values()) + refused == 1000
    assert [event.kind for event in driver.events_of(native.BdevEvent)] == ["added", "removing", "removed"]
    driver.wait(engine.bdev_close(disk))
    driver.malloc()


def test_a_reset_ends_and_io_goes_on(driver: Any) -> None:
    disk = driver.open(driver.malloc())
    tokens = [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(50)]
    reset = driver.engine.bdev_io(disk, "reset")
    tokens += [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(50)]
    assert driver.wait(reset) is None
    assert [driver.wait(token) for token in tokens] == [bytes(512)] * 100


def test_more_ios_than_the_reactor_has_wait_their_turn(start: Callable[..., Any]) -> None:
    driver = start(ios_per_reactor=256)
    ring = driver.engine.bdev_python_create("p0", num_blocks=8, block_size=512, depth=16)
    disk = driver.open("p0")
    tokens = [driver.engine.bdev_io(disk, "read", 0, 1) for _ in range(2000)]
    done = 0
    while done < 2000:
        for _, requests in ring.fetch():
            ring.finish(requests)
            done += len(requests)
        driver.drain(0.01)
    assert [driver.wait(token) for token in tokens] == [bytes(512)] * 2000


def test_iostat_counts_and_resets(driver: Any) -> None:
    engine = driver.engine
    disk = driver.open(driver.malloc("m0", 256, 512))
    driver.malloc("m1")
    driver.io(disk, "write", 0, 4, bytes(2048))
    driver.io(disk, "read", 0, 8)
    driver.io(disk, "read", 0, 8)
    driver.io(disk, "unmap", 0, 2)
    driver.io(disk, "write_zeroes", 0, 2)
    driver.io(disk, "flush")
    (stat,) = driver.wait(engine.bdev_iostat("m0", reset="all"))
    channel = stat["channels"][0]
    assert (len(stat["channels"]), channel["read_ios"], channel["lcore"]) == (1, 2, engine.reactors()[0]["lcore"])
    counted = {key: stat[key] for key in stat if not key.endswith("_ns") and key != "channels"}
    assert counted == {
        "name": "m0",
        "read_ios": 2,
        "read_bytes": 8192,
        "write_ios": 1,
        "write_bytes": 2048,
        "unmap_ios": 1,
        "unmap_bytes": 1024,
        "flush_ios": 1,
        "write_zeroes_ios": 1,
        "copy_ios": 0,
        "copy_bytes": 0,
        "errors": {},
        "sampled": None,
    }
    every = driver.wait(engine.bdev_iostat())
    assert [(stat["name"], stat["read_ios"]) for stat in every] == [("m0", 0), ("m1", 0)]


def test_a_disk_in_a_file_keeps_what_was_written(driver: Any, tmp_path: Any) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    driver.wait(driver.engine.bdev_file_create("f0", str(path), module="aio", block_size=512))
    disk = driver.open("f0")
    data = random.Random(4).randbytes(64 * 512)
    driver.io(disk, "write", 100, 64, data)
    driver.io(disk, "flush")
    assert driver.io(disk, "read", 100, 64) == data
    assert path.read_bytes()[100 * 512 : 164 * 512] == data
    (info,) = driver.engine.bdev_info("f0")
    assert (info["module"], info["path"], info["num_blocks"]) == ("aio", str(path), 2048)
    again = refusal(lambda: driver.engine.bdev_file_create("f0", str(path), module="aio"))
    assert again == (errno.EEXIST, "File exists: bdev f0")
    missing = driver.engine.bdev_file_create("f1", str(tmp_path / "none"), module="uring")
    assert refusal(lambda: driver.wait(missing))[0] == errno.ENOENT
    odd = driver.engine.bdev_file_create("f1", str(path), module="nfs")
    assert refusal(lambda: driver.wait(odd)) == (errno.EINVAL, "Invalid argument: module nfs: uring or aio")
    driver.wait(driver.engine.bdev_unregister("f0"))
    assert path.read_bytes()[100 * 512 : 164 * 512] == data


def test_a_refused_call_answers_nothing(start: Callable[..., Any]) -> None:
    driver = start()
    driver.malloc()
    while driver.drain():
        pass
    for _ in range(3):
        assert refusal(lambda: driver.engine.bdev_null_create("m0", num_blocks=8, block_size=512))[0] == errno.EEXIST
        assert refusal(lambda: driver.engine.bdev_open("x"))[0] == errno.ENODEV
        assert refusal(lambda: driver.engine.bdev_io(99, "read", 0, 1))[0] == errno.EBADF
    assert driver.engine.events() == []
