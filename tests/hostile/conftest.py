"""One server a module, with an innocent disk at work and a disk for the hostile to break."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostile.front_end import FrontEnd
from hostile.innocent import Innocent
from hostile.process import Serve
from missing import missing

pytest.importorskip("qpair._engine", reason="the engine is not built: run `make engine`")


@dataclass
class World:
    """A server, its innocent disk, and the socket of the victim, a disk of 4 MiB with 16 queues, made anew for each test."""

    server: Serve
    innocent: Innocent
    victim: Path

    def connect(self, **options: int) -> FrontEnd:
        return FrontEnd(self.victim, **options)

    def fine(self) -> None:
        """The process is alive and answers, and the innocent disk works."""
        assert self.server.alive, self.server.log()
        assert self.server.rpc("spdk_get_version")
        self.innocent.check()


@pytest.fixture(scope="module", params=["io_uring", "epoll"])
def _world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("w")
    with Serve(folder, "--driver", request.param, wait=False) as server:
        try:
            server.wait_ready()
        except RuntimeError as error:
            if request.param == "io_uring":
                missing("io_uring", error)
            raise
        server.malloc("m0")
        server.malloc("m1")
        with Innocent(server.export("innocent", "m0")) as innocent:
            there = World(server, innocent, folder / "victim")
            yield there
            there.fine()
        assert server.end() == 0, server.log()
        assert not server.lines("innocent"), server.log()


@pytest.fixture
def world(_world: World) -> Iterator[World]:
    _world.server.export("victim", "m1")
    yield _world
    _world.server.rpc("vhost_delete_controller", ctrlr="victim")
