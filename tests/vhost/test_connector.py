"""Controllers that connect to a front end that listens: whoever starts first, whoever goes, and what they say meanwhile."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qpair.errors import InvalidArgument
from qpair.vhost import connector
from qpair.vhost import messages as m
from vhost.conftest import eventually
from vhost.engine_double import VhostEngine
from vhost.peer import Peer


class FrontEnd:
    """Listens as QEMU does with ``server=on``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(str(path))
        self.sock.listen(1)
        self.sock.setblocking(False)

    async def accept(self, timeout_s: float = 5) -> Peer:
        connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(self.sock), timeout_s)
        return Peer(connection)

    def close(self) -> None:
        self.sock.close()
        with suppress(FileNotFoundError):
            self.path.unlink()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(connector, "PAUSE_MAX_S", 0.04)


async def said(stack: Any) -> Any:
    [shown] = await stack.rpc("vhost_get_controllers", name="vhost.0")
    return shown["qpair"]


async def test_a_front_end_that_listens_first_is_connected_to(recording_stack: Any, tmp_path: Path) -> None:
    front_end = FrontEnd(tmp_path / "vhost.0")
    await recording_stack.vhost.create("vhost.0", "disk0", client=True)
    peer = await front_end.accept()
    await peer.agree()
    assert await said(recording_stack) == {"client": True, "not_connected": None}
    await recording_stack.vhost.delete("vhost.0", force=True)
    assert await peer.closed()
    assert front_end.path.exists(), "the file is the front end's"
    peer.close()
    front_end.close()


async def test_one_that_comes_later_is_connected_to_and_each_reason_is_told_once(
    recording_stack: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await recording_stack.vhost.create("vhost.0", "disk0", client=True)
    await eventually(lambda: "No such file or directory" in caplog.text, "the reason")
    await asyncio.sleep(0.2)
    assert await said(recording_stack) == {"client": True, "not_connected": "No such file or directory"}
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "vhost.0"))
    await eventually(lambda: "Connection refused" in caplog.text, "the next reason")
    (tmp_path / "vhost.0").unlink()
    front_end = FrontEnd(tmp_path / "vhost.0")
    peer = await front_end.accept()
    await peer.agree()
    tries = [record.getMessage() for record in caplog.records if "cannot connect" in record.getMessage()]
    assert len(tries) in (2, 3), tries  # between the stale file and the listener there may be no file once more
    assert tries[0] == f"socket {tmp_path / 'vhost.0'}: cannot connect: No such file or directory; trying again"
    peer.close()
    front_end.close()


async def test_it_connects_again_after_the_front_end_has_gone(
    recording_stack: Any, recorder: VhostEngine, tmp_path: Path, count_fds: Callable[[], set[str]]
) -> None:
    front_end = FrontEnd(tmp_path / "vhost.0")
    await recording_stack.vhost.create("vhost.0", "disk0", client=True)
    before = None
    for number in range(5):
        peer = await front_end.accept()
        await peer.agree()
        if number == 1:
            before = len(count_fds())
        if number == 4:
            assert len(count_fds()) == before
        peer.close()
    front_end.close()
    await asyncio.sleep(0.05)
    again = FrontEnd(tmp_path / "vhost.0")
    peer = await again.accept()
    assert (await peer.ask(m.GetFeatures())).value
    assert recorder.names().count("vhost_session_open") == 6
    peer.close()
    again.close()


async def test_a_successor_is_connected_to_after_the_old_session_has_drained(
    recording_stack: Any, recorder: VhostEngine, tmp_path: Path
) -> None:
    front_end = FrontEnd(tmp_path / "vhost.0")
    await recording_stack.vhost.create("vhost.0", "disk0", client=True)
    peer = await front_end.accept()
    await peer.agree()
    recorder.held.add("vhost_session_close")
    peer.close()
    with pytest.raises(TimeoutError):
        await front_end.accept(0.2)
    recorder.release("vhost_session_close")
    successor = await front_end.accept()
    successor.close()
    front_end.close()


async def test_a_path_too_long_for_a_socket_is_refused(recording_stack: Any, recorder: VhostEngine) -> None:
    with pytest.raises(InvalidArgument, match=r"bytes long, the limit is 107$"):
        await recording_stack.vhost.create("v" * 120, "disk0", client=True)
    assert recorder.controllers == {}


async def test_a_listener_that_accepts_nobody_is_named(recording_stack: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX) as full:
        full.bind(str(tmp_path / "vhost.0"))
        full.listen(0)
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(tmp_path / "vhost.0"))
            await recording_stack.vhost.create("vhost.0", "disk0", client=True)
            await eventually(lambda: "its listener accepts nobody" in caplog.text, "the reason")
    os.unlink(tmp_path / "vhost.0")


async def test_a_session_that_moves_is_not_connected_to_anew_and_the_next_one_is(
    recording_stack: Any, recorder: VhostEngine, tmp_path: Path
) -> None:
    front_end = FrontEnd(tmp_path / "vhost.0")
    room = recording_stack.vhost
    await room.create("vhost.0", "disk0", client=True)
    peer = await front_end.accept()
    await peer.agree()
    [record] = await room.release(5)
    assert record.listener is None
    # As in a successor, where the controller is made before the session is there.
    await room._remove("vhost.0", "as if the process had ended", 5)
    room.expect([record])
    await room.create("vhost.0", "disk0", client=True)
    await asyncio.sleep(0.05)
    await room.resume([record])
    room.start_sessions()
    assert await peer.order(m.SetVringEnable(0, 1)) == 0
    assert await said(recording_stack) == {"client": True, "not_connected": None}
    with pytest.raises(TimeoutError):
        await front_end.accept(0.1)
    peer.close()
    again = await front_end.accept()
    await again.agree()
    again.close()
    front_end.close()
