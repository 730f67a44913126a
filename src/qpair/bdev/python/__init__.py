"""Bdevs written in Python.

    class Ram(Bdev):
        def __init__(self, name: str = "ram0", size: str = "16MiB") -> None:
            super().__init__(name, size)
            self.store = bytearray(self.size_bytes)

        def read(self, requests: Sequence[Request]) -> None:
            for request in requests:
                request.data[:] = self.store[request.offset : request.end]

        def write(self, requests: Sequence[Request]) -> None:
            for request in requests:
                self.store[request.offset : request.end] = request.data

    disk = await stack.add(Ram())                   # in this process, on this loop
    disk = await stack.add(Ram, process=True)       # in a process of its own

How it works: the engine says once that requests wait; a runner fetches them in batches and calls one method an operation with all of that
operation's requests. A method may be plain or ``async``. When it returns, each request that it has not completed itself is completed: successfully.
Requests of one batch may be done in any order; a ``flush`` covers the writes completed before it came. In a worker process the same runner serves the same class.

Errors: a method that raises fails the requests it had not completed: with the errno of an ``OSError``, else EIO; the traceback is logged. ``request.fail(errno)``
fails one. Completing twice is a ``ValueError``.

A request's buffer is lent until completion: zeros to be filled for a read, the data of a write. What the request gave is released then; if you still hold a slice or an
array of it, that memory stays yours, unchanged, and is never used for another request: the engine takes fresh memory instead, which costs some microseconds.

Limits: ``depth`` requests at a time (default 128), ``max_io_bytes`` each (default 128 KiB). Plain methods run on the event loop: one that blocks holds up
RPC and the other Python bdevs in this process, though no other I/O of the engine. One that may block belongs into a worker process.
"""

from __future__ import annotations

from qpair.bdev.python.model import Answer, Bdev, Request
from qpair.bdev.python.runner import PythonBdevRunner

__all__ = ["Answer", "Bdev", "PythonBdevRunner", "Request"]
