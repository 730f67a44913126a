"""Fixtures for tests against foreign programs. A peer that is not here is a skip by name, and a failure in CI."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop.peers import QemuImg, QemuIo, QpairServer, StorageDaemon
from linux_guest import Guest, SetupError, ensure
from missing import missing


@pytest.fixture(scope="session")
def guest() -> Guest:
    """Boots Linux under emulation. The first test on a fresh machine makes it, which takes minutes."""
    try:
        return Guest(ensure())
    except SetupError as error:
        missing("the Linux guest", error)


@pytest.fixture(scope="session")
def qemu_io(guest: Guest) -> QemuIo:
    return QemuIo(guest)


@pytest.fixture(scope="session")
def qemu_img(guest: Guest) -> QemuImg:
    return QemuImg(guest)


@pytest.fixture
def storage_daemon(guest: Guest, tmp_path: Path) -> Iterator[Callable[..., StorageDaemon]]:
    """Starts QEMU storage daemons (see `StorageDaemon` for options) that end with the test."""
    with ExitStack() as running:
        yield lambda image=None, **options: running.enter_context(StorageDaemon(guest, tmp_path, image, **options))


@pytest.fixture
def qpair_server(tmp_path: Path) -> Iterator[QpairServer]:
    """``qpair serve`` on two cores."""
    with QpairServer(tmp_path) as server:
        yield server
