"""SPDK's methods of trace points, by its own client and by hand; and ours that reads them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from missing import missing
from qpair.bdev.trace import POINTS
from qpair.errors import InvalidParameters, MethodNotFound, QpairError

BIN = Path(sys.executable).parent
ALL64 = "0xffffffffffffffff"


@pytest.fixture
def spdk_rpc(client: Any, server: Any, socket_path: str) -> Any:
    program = shutil.which("spdk-rpc", path=str(BIN)) or shutil.which("spdk-rpc")
    if program is None:
        missing("spdk-rpc", "pip install spdk")

    async def run(*arguments: str) -> tuple[int, Any]:
        code, out, err = await client(program, "-s", socket_path, *arguments)
        return code, json.loads(out) if code == 0 and out.strip() else out + err

    return run


async def test_spdk_rpc_turns_groups_and_points_on_and_off(spdk_rpc: Any) -> None:
    async def bdev() -> Any:
        code, masks = await spdk_rpc("trace_get_tpoint_group_mask")
        assert code == 0
        return masks["tpoint_group_mask"], masks["bdev"]["enabled"], masks["bdev"]["mask"], masks["bdev"]["tpoint_mask"]

    assert await bdev() == ("0x0", False, "0x8", "0x0")
    for group in ("bdev", "all"):
        assert await spdk_rpc("trace_enable_tpoint_group", group) == (0, "")
        assert await bdev() == ("0x8", True, "0x8", ALL64)
        assert await spdk_rpc("trace_disable_tpoint_group", group) == (0, "")
        assert await bdev() == ("0x0", False, "0x8", "0x0")
    assert await spdk_rpc("trace_set_tpoint_mask", "bdev", "0x1") == (0, "")
    assert await spdk_rpc("trace_set_tpoint_mask", "bdev", "0x12") == (0, "")
    assert await bdev() == ("0x8", True, "0x8", "0x13")
    assert await spdk_rpc("trace_clear_tpoint_mask", "bdev", "0x3") == (0, "")
    assert await bdev() == ("0x8", True, "0x8", "0x10")
    _, masks = await spdk_rpc("trace_get_tpoint_group_mask")
    wanted = [{"name": name, "tpoint_id": number, "enabled": number == 4} for number, name in enumerate(POINTS)]
    assert masks["bdev"]["tpoints"] == wanted
    assert [point["name"] for point in wanted[:4]] == ["BDEV_IO_START", "BDEV_IO_DONE", "BDEV_IOCH_CREATE", "BDEV_IOCH_DESTROY"]
    assert await spdk_rpc("trace_get_info") == (
        0,
        {"tpoint_shm_path": "", "tpoint_group_mask": "0x8", "bdev": {"mask": "0x8", "tpoint_mask": "0x10"}},
    )


async def test_an_unknown_group_is_refused_in_spdks_words(spdk_rpc: Any) -> None:
    for arguments in (
        ("trace_enable_tpoint_group", "nvmf_tcp"),
        ("trace_disable_tpoint_group", "x"),
        ("trace_set_tpoint_mask", "x", "0x1"),
    ):
        code, told = await spdk_rpc(*arguments)
        assert code == 1
        assert '"code": -32602' in told
        assert '"message": "Invalid parameters: parameter ' in told


@pytest.mark.parametrize("name", ["trace_set_tpoint_mask", "trace_clear_tpoint_mask"])
@pytest.mark.parametrize("mask", [-1, 2**64, 2**200, "0x1", 1.5, True, None, [1], {}])
async def test_a_mask_that_is_none_is_refused_by_name(stack: Any, name: str, mask: Any) -> None:
    with pytest.raises(InvalidParameters, match="tpoint_mask"):
        await call(stack, name, {"name": "bdev", "tpoint_mask": mask})
    assert stack.tracing.mask == 0


async def call(stack: Any, method: str, params: Any) -> Any:
    from qpair.app.rooms import load_rpc
    from qpair.rpc.dispatch import call as dispatch

    load_rpc()
    return await dispatch(stack, method, params)


@pytest.mark.parametrize("group", ["", "BDEV", "bdev ", "0x8", 8, None, "x" * 100_000, "\0", ["bdev"]])
async def test_a_group_that_is_none_is_refused_by_name(stack: Any, group: Any) -> None:
    for method in ("trace_enable_tpoint_group", "trace_disable_tpoint_group"):
        with pytest.raises(InvalidParameters, match="name") as refused:
            await call(stack, method, {"name": group})
        assert len(str(refused.value)) < 300
    assert stack.tracing.mask == 0


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"max_records": 0}, "'max_records': 0; 1 to 4096"),
        ({"max_records": 4097}, "'max_records': 4097; 1 to 4096"),
        ({"max_records": -1}, "max_records"),
        ({"max_records": 2**64}, "max_records"),
        ({"cursor": []}, "'cursor': 0 numbers; one for each of 1 reactors"),
        ({"cursor": [0, 0]}, "'cursor': 2 numbers"),
        ({"cursor": [-1]}, "cursor"),
        ({"cursor": [2**64]}, "'cursor': a number is past"),
        ({"cursor": ["0"]}, "cursor"),
        ({"cursor": 0}, "cursor"),
        ({"newest": 1}, "newest"),
        ({"unknown": 1}, "unknown"),
    ],
)
async def test_a_page_that_cannot_be_is_refused_by_name(stack: Any, params: Any, why: str) -> None:
    with pytest.raises(InvalidParameters) as refused:
        await call(stack, "qpair_trace_get", params)
    assert why in str(refused.value)


async def test_methods_without_parameters_take_none(stack: Any) -> None:
    for method in ("trace_get_info", "trace_get_tpoint_group_mask", "trace_clear"):
        with pytest.raises(InvalidParameters, match=f"{method} takes no parameters"):
            await call(stack, method, {"name": "bdev"})


async def test_records_are_read_page_by_page(stack: Any) -> None:
    await stack.malloc("m0", "1MiB")
    await stack.rpc("bdev_wait_for_examine")
    before = await stack.rpc("qpair_trace_get", newest=True)
    assert before == {"tick_rate": 1_000_000_000, "cursor": [0], "lost": 0, "records": []}
    await stack.rpc("trace_enable_tpoint_group", name="bdev")
    async with await stack.open("m0") as disk:
        await disk.write(0, bytes(512))
    cursor, seen = before["cursor"], []
    while (page := await stack.rpc("qpair_trace_get", cursor=cursor, max_records=2))["records"]:
        assert len(page["records"]) <= 2
        cursor = page["cursor"]
        seen += [(record["point"], record["bdev"]) for record in page["records"]]
    assert seen == [
        ("QPAIR_TRACE_SET", ""), ("BDEV_IOCH_CREATE", "m0"), ("BDEV_IO_START", "m0"), ("QPAIR_BDEV_IO_ISSUE", "m0"), ("BDEV_IO_DONE", "m0"),
        ("BDEV_IOCH_DESTROY", "m0"),
    ]  # fmt: skip
    assert (await stack.rpc("qpair_trace_get", cursor=[2**64 - 1]))["records"] == [], "beyond the newest: from now on"
    assert len((await stack.rpc("qpair_trace_get"))["records"]) == 6, "reading takes nothing away"
    assert await stack.rpc("trace_clear") is True
    assert (await stack.rpc("qpair_trace_get"))["records"] == []


async def test_before_the_subsystems_start_all_but_trace_clear_is_allowed(make_stack: Any) -> None:
    async with make_stack(wait_for_rpc=True) as stack:
        assert await stack.rpc("trace_set_tpoint_mask", name="bdev", tpoint_mask=3) is True
        assert (await stack.rpc("trace_get_info"))["bdev"]["tpoint_mask"] == "0x3"
        with pytest.raises((MethodNotFound, QpairError), match=r"framework_start_init|startup|state"):
            await stack.rpc("trace_clear")
