"""The guest itself: what a job says, what its exit status does, and that nothing outlives a test."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from linux_guest import Guest, GuestPaths, SetupError, ensure
from linux_guest import setup as guest_setup


def job(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_jobs_run_in_order_and_the_first_failure_is_the_guests(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "brought").write_text("hello from the host")
    jobs = [
        job(tmp_path, "first.sh", 'say words "$WORDS"\nsay file "$(cat /job/brought)"\n'),
        job(tmp_path, "second.sh", "say reached yes\nfalse\nsay reached no\n"),
        job(tmp_path, "third.sh", "exit 9\n"),
    ]
    outcome = guest.run(jobs, files=[tmp_path / "brought"], variables={"WORDS": "a 'quoted' $word"}, timeout_s=90)
    assert outcome.values == {"first:words": "a 'quoted' $word", "first:file": "hello from the host", "second:reached": "yes"}
    assert outcome.job_rc == {"first": 0, "second": 1, "third": 9}
    assert outcome.rc == 1
    assert not outcome.timed_out


def test_a_guest_past_its_time_limit_is_ended_and_says_so(guest: Guest, tmp_path: Path) -> None:
    outcome = guest.run([job(tmp_path, "hang.sh", "sleep 600\n")], timeout_s=15)
    assert outcome.timed_out
    assert outcome.rc is None
    assert 15 <= outcome.elapsed_s < 30


def test_leaving_the_block_ends_the_guest(guest: Guest, tmp_path: Path) -> None:
    with guest.start([job(tmp_path, "hang.sh", "pause\n")], timeout_s=90) as running:
        running.wait_for("GUEST-PAUSED", timeout_s=90)
        pid = running.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_waiting_for_words_of_a_guest_that_is_gone_ends_at_once(guest: Guest, tmp_path: Path) -> None:
    started = time.monotonic()
    with guest.start([job(tmp_path, "quiet.sh", "true\n")], timeout_s=90) as running, pytest.raises(TimeoutError, match="never said"):
        running.wait_for("never said", timeout_s=600)
    assert time.monotonic() - started < 90


def test_two_jobs_of_one_name_are_refused(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"need different names, not \['a.sh', 'a.sh'\]"):
        guest.run([job(tmp_path, "a.sh", ""), job(tmp_path / "other", "a.sh", "")])


def test_set_up_without_its_tools_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_setup.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SetupError, match=r"lacks vmlinux, initrd\.img, rootfs\.ext4, qemu-system-x86_64, and making it needs apt-get, mmdebstrap"
    ):
        ensure(GuestPaths(tmp_path))


def test_set_up_without_root_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_setup.os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match="run `PYTHONPATH=tools python3 -m linux_guest setup` once as root"):
        ensure(GuestPaths(tmp_path))


def test_two_set_ups_at_once_make_the_guest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = GuestPaths(tmp_path / "guest")
    inside, others_waiting = threading.Event(), threading.Event()
    made, words = [], []

    def make(paths: GuestPaths, say: guest_setup.Say) -> None:
        made.append(1)
        inside.set()
        assert others_waiting.wait(20)
        for part in paths.missing():
            part.parent.mkdir(parents=True, exist_ok=True)
            part.touch()

    def say(text: str) -> None:
        words.append(text)
        if "waiting" in text:
            others_waiting.set()

    monkeypatch.setattr(guest_setup, "_make", make)
    monkeypatch.setattr(guest_setup, "_refuse_if_impossible", lambda paths: None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ensure, paths, say)
        assert inside.wait(20)
        second = pool.submit(ensure, paths, say)
        assert (first.result(20), second.result(20)) == (paths, paths)
    assert made == [1]
    assert words[0] == f"guest: another process is setting it up (lock {paths.lock}), waiting"


def test_a_kernel_image_without_a_kernel_is_refused() -> None:
    with pytest.raises(SetupError, match="holds no zstd, gzip or xz stream"):
        guest_setup.extract_vmlinux(b"MZ" + bytes(1000) + b"\x1f\x8b\x08" + bytes(100) + b"\xfd7zXZ\0" + bytes(50))
