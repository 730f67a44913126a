"""The Rust engine as Python sees it.

Python decides, Rust moves: nothing here is called once per I/O, except by code that asked for single I/Os.

Asynchronous calls return a *token* (``int``) at once; the answer arrives later as one `Reply` from `Engine.events`. `Engine.event_fd` is
readable while events wait. Every token is answered exactly once, also through removal and shutdown (``ECANCELED``). A call that is refused before it reaches a reactor raises `EngineError`; then there
is no token. A stopped engine, and the copy of one in a forked child, refuse every call with ``ESHUTDOWN``.

The log is the process's: with several engines, the youngest live one tells it.

Units: ``*_blocks`` counts logical blocks of the bdev, ``*_bytes`` bytes, ``*_ns`` nanoseconds, ``*_us`` microseconds.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self, TypeAlias, final

__all__ = [
    "BdevEvent",
    "DelayControl",
    "Engine",
    "EngineError",
    "ErrorControl",
    "Event",
    "IoTimeout",
    "LogEvent",
    "PythonBdevRequest",
    "PythonBdevRing",
    "PythonBdevWork",
    "PythonFilterRing",
    "PythonWorker",
    "PythonWorkerDown",
    "PythonWorkerLink",
    "Reply",
    "SessionEvent",
    "VirtioLink",
    "VirtioMemory",
    "__version__",
]

__version__: str

class EngineError(OSError):
    """``errno`` is positive (``errno.ENODEV``...), ``strerror`` names the field, the value and the limit."""

@final
class Reply:
    token: int
    error: EngineError | None
    value: Any

@final
class BdevEvent:
    """A bdev appeared, went, changed its size or failed."""

    kind: Literal["added", "removing", "removed", "resized", "failed", "throttled"]
    name: str
    limit: tuple[str, int] | None
    """Of "throttled": SPDK's name of the limit that began to hold I/O back, and I/Os or bytes a second."""
    reason: str | None
    """Of "failed": one sentence."""

@final
class SessionEvent:
    """A vhost session ended itself (a hostile ring, dead memory): Python closes the socket. ``reason`` is one sentence."""

    session: int
    kind: Literal["queue_failed", "failed"]
    queue: int | None
    reason: str

@final
class LogEvent:
    level: Literal["error", "warning", "info", "debug"]
    component: str
    message: str
    suppressed: int
    """How many messages the rate limit dropped before this one."""

@final
class PythonBdevWork:
    """Requests wait in the ring of a Python bdev: call `PythonBdevRing.fetch`."""

    ring: int

@final
class PythonWorkerDown:
    """The engine severed a worker process (it lied, it was silent): end it, then `PythonWorkerLink.attach` the next."""

    link: int
    number: int
    reason: str

@final
class IoTimeout:
    """An I/O of a descriptor takes longer than its time-out, see `Engine.bdev_set_timeout`. It is still under way."""

    descriptor: int
    io: int
    """Its name, for `Engine.bdev_abort`."""
    op: str
    offset_blocks: int
    num_blocks: int
    age_ns: int

Event: TypeAlias = Reply | BdevEvent | SessionEvent | LogEvent | PythonBdevWork | PythonWorkerDown | IoTimeout

@final
class Engine:
    """Reactor threads and all that runs on them. One per process is usual, more are allowed."""

    event_fd: int
    driver: Literal["io_uring", "epoll"]

    def __new__(
        cls,
        *,
        cores: Sequence[int] = ...,
        pin: bool = True,
        driver: Literal["auto", "io_uring", "epoll"] = "auto",
        busy_poll: bool = False,
        spin_us: int = 50,
        ios_per_reactor: int = 8192,
    ) -> Self:
        """Starts one reactor a core. ``auto`` takes io_uring where the kernel allows it, else epoll with a thread pool."""

    def events(self, max_events: int = 256) -> list[Event]: ...
    def reactors(self) -> list[dict[str, Any]]:
        """One dict a reactor: ``lcore, tid, driver, responsive, busy_ns, idle_ns, sleeps, turns, messages, pollers: [{name, state
        ("active" | "armed"), busy_ns, runs, busy_runs}]``. Waits at most 100 ms for each reactor, without the GIL; one that does not
        answer is not ``responsive``, and its figures are the last it told."""

    def stop_bdevs(self, deadline_ms: int = 10_000) -> None:
        """Front ends, load runs and bdevs: what they had open is closed then. The reactors go on until ``stop``, which is all that is to come. Blocks without the GIL."""

    def stop(self, deadline_ms: int = 10_000) -> None:
        """Front ends, then bdevs, then reactors; each outstanding token is answered first. Idempotent. Blocks without the GIL."""

    # ---- bdevs (crates/bdev) -------------------------------------------------------------------------
    def bdev_null_create(
        self, name: str, *, num_blocks: int, block_size: int, uuid: str | None = None, physical_block_size: int = 0, metadata_bytes: int = 0
    ) -> int:
        """``metadata_bytes``: of each block, apart from its data. Reply value: None. Raises ``EEXIST`` for a name in use, ``EINVAL`` for geometry."""

    def bdev_malloc_create(
        self,
        name: str,
        *,
        num_blocks: int,
        block_size: int,
        uuid: str | None = None,
        physical_block_size: int = 0,
        optimal_io_boundary: int = 0,
        metadata_bytes: int = 0,
        contents: int | None = None,
    ) -> int:
        """``metadata_bytes``: 0, 8, 16, 32, 64 or 128. ``contents``: what ``bdev_malloc_contents`` gave for a disk of this shape; the descriptor is duplicated."""

    def bdev_malloc_contents(self, name: str) -> int:
        """A memfd of all that a malloc bdev holds, which the caller owns. It is copied (some 0.3 s a GiB) unless the bdev was made of such a memfd."""

    def bdev_file_create(
        self,
        name: str,
        path: str,
        *,
        module: Literal["uring", "aio"],
        block_size: int = 0,
        readonly: bool = False,
        fallocate: bool = False,
        uuid: str | None = None,
    ) -> int:
        """``block_size`` 0 takes the file's own. O_DIRECT where the file system takes it."""

    def bdev_python_create(
        self,
        name: str,
        *,
        num_blocks: int,
        block_size: int,
        depth: int = 128,
        max_io_bytes: int = 131072,
        uuid: str | None = None,
        readonly: bool = False,
    ) -> PythonBdevRing: ...
    def bdev_filter_create(
        self,
        name: str,
        base: str,
        *,
        before: Sequence[str],
        after: Sequence[str],
        ranges: Sequence[tuple[int, int]] | None = None,
        depth: int = 128,
        max_io_bytes: int = 131072,
        uuid: str | None = None,
    ) -> PythonFilterRing:
        """A bdev on ``base``, which is claimed. Operations ``before`` and ``after`` are shown, on ``ranges`` (first block, number of blocks); None: everywhere.
        Shown are read, write, flush, unmap, write_zeroes. ``ENOTSUP`` for a zoned base."""

    def bdev_python_worker_create(
        self,
        name: str,
        *,
        num_blocks: int,
        block_size: int,
        depth: int = 128,
        max_io_bytes: int = 131072,
        uuid: str | None = None,
        readonly: bool = False,
        timeout_ms: int = 30000,
        while_down: Literal["wait", "fail"] = "wait",
    ) -> PythonWorkerLink:
        """A bdev that a worker process will serve. ``timeout_ms``: a worker that has a request for longer is severed; 0: never. ``while_down``: what I/O does
        while there is no worker."""

    def bdev_virtio_create(
        self, name: str, *, features: int, config: bytes, memory: VirtioMemory, queues: Sequence[tuple[int, int, int]]
    ) -> VirtioLink:
        """The driver's side of virtio-blk rings that `VirtioMemory` laid out. ``queues``: (size, kick fd, call fd); fds are duplicated."""

    def bdev_passthru_create(self, name: str, base: str, *, uuid: str | None = None) -> int:
        """A bdev that passes everything on to ``base``, which it claims. ``ENODEV``, ``EBUSY`` (claimed), ``EINVAL`` (stacked too high)."""

    def bdev_parts_create(self, base: str, module: Literal["split", "gpt"], parts: list[tuple[str, int, int, str | None]]) -> int:
        """Ranges of ``base``, which they claim together, as (name, offset_blocks, num_blocks, uuid): all of them, or none. Reply: None."""

    def bdev_delay_create(
        self, name: str, base: str, *, avg_read: int, p99_read: int, avg_write: int, p99_write: int, uuid: str | None = None
    ) -> DelayControl:
        """A bdev that holds what comes back from ``base``. Latencies in microseconds."""

    def bdev_error_create(self, name: str, base: str, *, uuid: str | None = None) -> ErrorControl:
        """A bdev on ``base`` that errors can be injected into."""

    def bdev_zone_block_create(self, name: str, base: str, *, zone_capacity: int, optimal_open_zones: int, uuid: str | None = None) -> int:
        """A zoned bdev on ``base``; ``zone_capacity`` in blocks. Reply: None. ``EEXIST``: the base is zoned already."""

    def bdev_zone_io(
        self,
        descriptor: int,
        action: Literal["append", "report", "open", "close", "finish", "reset"],
        offset_blocks: int,
        num_blocks: int,
        data: Any = None,
    ) -> int:
        """One I/O on zones; ``offset_blocks`` is where a zone begins. ``num_blocks``: an append's; else whole zones, one unless for a report. Reply value: the
        first block written (append), 64 bytes a zone (report: NVMe's zone descriptors), else None."""

    def bdev_unregister(self, name: str, *, deadline_ms: int = 10_000) -> int:
        """What stands on it goes first; then: stop new I/O, drain or abort, close channels, gone. Reply: None. ``ENODEV``."""

    def bdev_resize(self, name: str, num_blocks: int) -> int: ...
    def bdev_info(self, name: str | None = None) -> list[dict[str, Any]]:
        """Snapshots: ``name, module, uuid, aliases, block_size, num_blocks, write_unit, physical_block_size,
        optimal_io_boundary, max_io_blocks, max_segments, readonly, claimed_by, removing, open_count, write_cache,
        supported: {op: bool}, zoned: None or {zone_size, zone_capacity, max_open_zones, max_active_zones, optimal_open_zones, max_append_blocks}, path, bases: [name of a bdev right below], version``."""

    def bdev_iostat(self, name: str | None = None, *, reset: Literal["none", "all", "maxmin", "error"] = "none") -> int:
        """Reply: list of dicts ``name, channels: [...], sampled: (period_us, depth, io_time_us, weighted_io_time_us) | None`` and, in them and in each channel (beside its
        ``lcore``): ``{read,write,unmap,copy}_{ios,bytes,ns}, max_..._ns, min_..._ns, flush_ios, write_zeroes_ios, errors: {kind: count}``. Kinds: "aborted",
        "miscompare", "nomem", "failed". Told as they were before ``reset``."""

    def bdev_set_limits(self, name: str, rates: tuple[int | None, int | None, int | None, int | None]) -> int:
        """``rates``: I/Os, bytes, bytes read, bytes written a second; None: as before, 0: no limit. Reply: None, when all reactors keep it. ``ENODEV``."""

    def qos_group_create(self, group: str, rates: tuple[int | None, int | None, int | None, int | None]) -> int:
        """``EEXIST``."""

    def qos_group_set(self, group: str, rates: tuple[int | None, int | None, int | None, int | None]) -> int:
        """``ENOENT``."""

    def qos_group_delete(self, group: str) -> int:
        """``ENOENT``."""

    def qos_group_add(self, group: str, bdev: str) -> int:
        """``ENOENT``, ``ENODEV``, ``EBUSY`` for a bdev that is in a group."""

    def qos_group_remove(self, group: str, bdev: str) -> int:
        """``ENOENT``, ``ENODEV``, ``EINVAL`` for a bdev that is not in it."""

    def qos_groups(self) -> list[dict[str, Any]]:
        """``name, limits: (4 rates), bdevs``."""

    def bdev_enable_histogram(
        self, name: str, enable: bool, *, ops: Sequence[str] | None = None, granularity: int = 7, min_ns: int = 1000, max_ns: int = ...
    ) -> int:
        """Begins anew, or ends. ``ops``: by SPDK's names of I/O types; None: all."""

    def bdev_histogram(self, name: str) -> int:
        """Reply: ``granularity, min_range, max_range, buckets: bytes`` (little-endian 64-bit counts). ``EFAULT`` unless enabled."""

    def bdev_set_sampling(self, name: str, period_us: int) -> int: ...
    def trace_set(self, points: int) -> int:
        """These trace points on (a mask of bits, see `qpair.bdev.trace.POINTS`), others off. Reply: None, when all reactors do so."""

    def trace_read(self, cursor: Sequence[int], max_records: int) -> int:
        """``cursor``: of each reactor the number of the first record wanted; missing: the oldest there is, too large: those to come. Reply: one dict a reactor,
        ``lcore, records: bytes`` (48 each, see `qpair.bdev.trace.decode`), ``next`` (cursor to go on from), ``lost`` (overwritten before), ``names: {number: bdev}``.
        ``max_records``: of each reactor, 0 to 4096."""

    def bdev_set_overdue(self, name: str, timeout_ms: int) -> int:
        """A `BdevEvent` "failed" when an I/O of the bdev, whoever submitted it, takes longer; told once, and again when ten seconds passed without such an I/O. 0 ends it."""

    def bdev_set_timeout(self, descriptor: int, timeout_ms: int) -> None:
        """`IoTimeout` for each I/O of that descriptor that takes longer, and again for each further time-out that passes; 0 ends it. An I/O is told up to a
        quarter of the time-out (at least 1 ms, at most 1 s) later."""

    def bdev_abort(self, descriptor: int, io: int) -> None:
        """Asks for an early end of an I/O that `IoTimeout` told of; one that ended meanwhile is left alone."""

    def bdev_claim(self, name: str, owner: str) -> None: ...
    def bdev_release(self, name: str, owner: str) -> None: ...
    def bdev_open(self, name: str, *, write: bool = True) -> int:
        """Reply value: a descriptor (int), closed by `bdev_close`."""

    def bdev_close(self, descriptor: int) -> int: ...
    def bdev_io(
        self,
        descriptor: int,
        op: Literal["read", "write", "flush", "unmap", "write_zeroes", "reset", "compare", "compare_and_write", "copy"],
        offset_blocks: int = 0,
        num_blocks: int = 0,
        data: Any = None,
        *,
        source_blocks: int = 0,
        metadata: Any = None,
        fua: bool = False,
        drain: bool = False,
        view: bool = False,
    ) -> int:
        """One I/O by way of a bounce buffer, up to 256 MiB; the layer splits what the device cannot take. ``data`` (write, compare; for compare_and_write
        what is expected and then, as long, what is to be written): anything with the buffer protocol, copied before this returns. ``source_blocks``: where a
        copy reads. ``metadata``: for a write those that go with the data; for a read anything but None asks for them. ``fua``: durable when done. ``drain``: a
        reset that lets what is in flight end by itself. Reply value: bytes for read (with metadata: both), else None; ``EILSEQ`` when a comparison fails. ``view``: a
        read answers a read-only memoryview of the memory that the device put it in, which is set aside as long as any view of it lives, and used again after that."""

    # ---- RAID (crates/raid) --------------------------------------------------------------------------
    def bdev_raid_create(
        self,
        name: str,
        *,
        level: Literal["raid0", "raid1", "concat"],
        base_bdevs: Sequence[str],
        strip_size_kb: int = 0,
        uuid: str | None = None,
        superblock: bool = False,
    ) -> int:
        """Members that are not there are waited for (`bdev_raid_examine`). Reply: None. ``EEXIST``: a name in use, or a member with another array's
        superblock; ``EBUSY``: a member that is claimed; ``EINVAL``: geometry."""

    def bdev_raid_delete(self, name: str, *, clear_superblock: bool = False) -> int: ...
    def bdev_raid_add_base(self, name: str, base_bdev: str) -> int:
        """Reply: None, when an online mirror has begun to rebuild. ``EPERM`` while it is being rebuilt already, ``EINVAL`` without an empty slot."""

    def bdev_raid_remove_base(self, base_bdev: str) -> int: ...
    def bdev_raid_start(self, name: str) -> int:
        """A mirror that waits for members, without them. Reply: None. ``EBUSY``: it waits for nothing; ``EINVAL``: not a mirror, or nobody current is there."""

    def bdev_raid_examine(self, bdev: str) -> int:
        """A bdev that appeared. Reply: 1 if it is a member of an array, else 0. ``EBUSY``: its superblock is newer than its array."""

    def bdev_raid_info(self) -> list[dict[str, Any]]:
        """``name, uuid, strip_size_kb, state ("online" | "configuring" | "offline"), raid_level, superblock, num_base_bdevs,
        num_base_bdevs_discovered, num_base_bdevs_operational, process: (target, blocks done, blocks) | None, base_bdevs: [{name (str | None), uuid,
        is_configured, data_offset, data_size}]``."""

    def bdev_raid_set_options(self, *, process_window_size_kb: int, process_max_bandwidth_mb_sec: int) -> None: ...
    def bdev_raid_shut_down(self) -> None:
        """Members that go from now on are not recorded as missing; arrays go with them."""

    @staticmethod
    def raid_superblock_decode(data: bytes) -> dict[str, Any]:
        """``version (major, minor), flags, uuid, name, raid_size, block_size, raid_level, strip_size, state, seq_number, num_base_bdevs, base_bdevs: ({uuid,
        data_offset, data_size, state ("missing" | "configured" | "failed" | "spare"), flags, slot}, ...)``; ``EINVAL`` names the field."""

    @staticmethod
    def raid_superblock_encode(fields: dict[str, Any]) -> bytes:
        """What `raid_superblock_decode` gives, as bytes; the version and the checksum are made."""

    # ---- vhost (crates/vhost) ------------------------------------------------------------------------
    def vhost_blk_create(
        self, name: str, bdev: str, *, reactors: Sequence[int] = (), readonly: bool = False, num_queues: int = 16, packed_ring: bool = False
    ) -> int:
        """A virtio-blk device with no socket: Python listens and opens a session a connection. ``reactors``: lcores whose
        reactors take the queues, round robin; empty means all. Reply: None."""

    def vhost_blk_delete(self, name: str, *, deadline_ms: int = 10_000) -> int: ...
    def vhost_blk_info(self, name: str | None = None) -> list[dict[str, Any]]:
        """``name, bdev, readonly, num_queues, reactors, device_features (int), sessions: [{id, features, queues: [{index, size, state
        ("stopped" | "running" | "draining" | "failed"), lcore, avail_idx, used_idx, requests, kicks, interrupts, inflight}]}]``.
        ``bdev`` is empty once it is gone."""

    def vhost_blk_set_reactors(self, name: str, reactors: Sequence[int]) -> int:
        """The queues run on these lcores' reactors in turn, those of a live session too: each stops, moves and goes on before the reply."""

    def vhost_blk_set_coalescing(self, name: str, delay_base_us: int, iops_threshold: int) -> int:
        """Holds back interrupts of a queue that answers more than ``iops_threshold`` requests a second. A delay of 0: never."""

    def vhost_session_open(self, controller: str) -> int:
        """Reply value: session id. One live session a controller: ``EBUSY`` otherwise."""

    def vhost_session_close(self, session: int, *, deadline_ms: int = 10_000) -> int:
        """Drains every ring, crosses a barrier over its reactors, drops all memory; then replies."""

    def vhost_set_features(self, session: int, features: int) -> int: ...
    def vhost_set_protocol_features(self, session: int, features: int) -> int: ...
    def vhost_set_mem_table(self, session: int, regions: Sequence[tuple[int, int, int, int, int]]) -> int:
        """``(guest_address, size_bytes, user_address, mmap_offset, fd)``. Live rings are drained, moved to the new table and restarted before the reply."""

    def vhost_set_vring_num(self, session: int, queue: int, size: int) -> int: ...
    def vhost_set_vring_addr(self, session: int, queue: int, flags: int, desc: int, used: int, avail: int, log: int) -> int: ...
    def vhost_set_vring_base(self, session: int, queue: int, base: int) -> int: ...
    def vhost_get_vring_base(self, session: int, queue: int, *, deadline_ms: int = 5_000) -> int:
        """Stops the ring: replies the base when all is done. What is in flight after ``deadline_ms``, the controller's from then on, is asked to end early."""

    def vhost_set_vring_kick(self, session: int, queue: int, fd: int | None) -> int:
        """Starts the ring (vhost-user: "rings are started by a kick or by this message"). None: poll only."""

    def vhost_set_vring_call(self, session: int, queue: int, fd: int | None) -> int: ...
    def vhost_set_vring_err(self, session: int, queue: int, fd: int | None) -> int: ...
    def vhost_set_vring_enable(self, session: int, queue: int, enabled: bool) -> int: ...
    def vhost_get_inflight_fd(self, session: int, num_queues: int, queue_size: int) -> int:
        """Reply: ``(fd, mmap_size, mmap_offset)``; the caller owns fd."""

    def vhost_set_inflight_fd(self, session: int, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int) -> int: ...
    def vhost_get_config(self, session: int) -> bytes:
        """The whole virtio_blk_config of this controller now (Virtio 1.2, 5.2.4); callers cut or zero-pad it."""

    def vhost_set_log_base(self, session: int, fd: int, mmap_size: int, mmap_offset: int) -> int:
        """Token. Writes to guest memory are marked there while LOG_ALL is set. EINVAL for what is too small, or no memory."""

    def vhost_set_log_fd(self, session: int, fd: int) -> int: ...
    def vhost_set_writeback(self, session: int, writeback: bool) -> int:
        """Token. False: each write is durable before it is answered. EINVAL for True without a write cache."""

    def vhost_reset_device(self, session: int) -> int: ...

    # ---- load generator (crates/perf) ------------------------------------------------------------------
    def perf_start(
        self,
        bdev: str,
        *,
        pattern: Literal["randread", "randwrite", "randrw", "read", "write", "rw", "flush", "unmap", "write_zeroes"] = "randread",
        read_percent: int = 100,
        io_bytes: int = 4096,
        depth: int = 128,
        reactors: Sequence[int] = (),
        duration_ms: int = 0,
        max_ios: int = 0,
        verify: bool = False,
        seed: int = 1,
        offset_blocks: int = 0,
        length_blocks: int = 0,
    ) -> int:
        """Reply (when the run ends): ``{ios, reads, writes, bytes, errors, verify_errors, first_mismatch (str | None), removed (bool: the
        bdev went away under the run), elapsed_ns, mean_ns (float), min_ns, max_ns,
        percentiles: {"50": ns, "99": ns, "99.9": ns, "99.99": ns}, per_reactor: [{lcore, ios}], max_gap_ns, histogram: bytes (HdrHistogram V2)}``."""

    def perf_snapshot(self, token: int) -> dict[str, Any]:
        """Of a run under way: ``ios, bytes, errors, elapsed_ns``. ``ENOENT`` once it has ended, also from `perf_stop`."""

    def perf_stop(self, token: int) -> None: ...

@final
class PythonBdevRequest:
    """One I/O for Python. One that is dropped without having been completed fails with EIO."""

    op: Literal["read", "write", "flush", "unmap", "write_zeroes", "reset"]
    offset: int
    length: int
    end: int
    done: bool
    data: memoryview
    """A pooled buffer: zeros to be filled for read, read-only data for write, empty for the others. ``ValueError`` once done; a view that is still held then (a
    slice, an array) keeps its bytes, and what is done to them reaches nobody."""

    errno: int
    """Of a filter's request, after: how the base ended it."""

    def complete(self, errno: int = 0) -> None:
        """``ValueError`` for one that was completed before. A filter's ends well so, without or in spite of the base."""

    def fail(self, errno: int) -> None: ...
    def pass_on(self) -> None:
        """A filter's request goes on as it is. ``ValueError`` for another bdev's."""

@final
class PythonBdevRing:
    """The engine's side of a bdev whose I/O Python does. Level-triggered: `PythonBdevWork` comes once until `fetch` finds nothing."""

    id: int
    buffers_kept: int
    """Buffers of which Python still held a view when their request was completed, ever. They were left to it."""

    def fetch(self, max_requests: int = 64) -> list[tuple[str, tuple[PythonBdevRequest, ...]]]:
        """Requests by operation: "read", "write", "flush", "unmap", "write_zeroes", "reset"."""

    def finish(self, requests: Iterable[PythonBdevRequest], errno: int = 0) -> None:
        """Completes those that are not done, in one crossing."""

    def close(self) -> None: ...

@final
class PythonFilterRing:
    """The engine's side of a filter. Level-triggered as `PythonBdevRing`; requests are grouped by the methods "before" and "after"."""

    id: int
    buffers_kept: int
    def fetch(self, max_requests: int = 64) -> list[tuple[str, tuple[PythonBdevRequest, ...]]]: ...
    def finish(self, requests: Iterable[PythonBdevRequest], errno: int = 0) -> None:
        """Those that are not done: 0 lets them go on as they are."""

    def show(self, *, before: Sequence[str], after: Sequence[str], ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """For I/O that is submitted from now on."""

    def close(self) -> None: ...

@final
class PythonWorkerLink:
    """The engine's side of a bdev that a worker process serves. Nothing that the worker writes is trusted."""

    id: int
    stride: int
    def attach(self) -> tuple[int, int, int, int, int]:
        """Memory for the next worker: its number, then descriptors (control, memory, work, done) that are the caller's. The worker before must be gone."""

    def sever(self, number: int, why: str) -> None:
        """That worker is no more: what it had fails with EIO. Nothing, if it is not the one attached."""

    def while_down(self, while_down: Literal["wait", "fail"]) -> None: ...
    def close(self) -> None: ...

@final
class PythonWorker:
    """A worker process's end. ``work_fd`` is readable when requests wait, or the ring was closed: call `rung` then. Descriptors are duplicated."""

    buffers_kept: int
    closed: bool
    def __new__(cls, control_fd: int, memory_fd: int, work_fd: int, done_fd: int, *, depth: int, stride: int, block_size: int) -> Self: ...
    def rung(self) -> int: ...
    def fetch(self, max_requests: int = 64) -> list[tuple[str, tuple[PythonBdevRequest, ...]]]: ...
    def finish(self, requests: Iterable[PythonBdevRequest], errno: int = 0) -> None: ...
    def close(self) -> None: ...

@final
class DelayControl:
    """The latencies of one delay bdev. Without effect once that is gone."""

    def set(self, latency: Literal["avg_read", "p99_read", "avg_write", "p99_write"], micros: int) -> None:
        """Counts for what comes back from the base from now on."""

@final
class ErrorControl:
    """What is injected into one error bdev. Without effect once that is gone."""

    def inject(
        self,
        io_type: Literal["read", "write", "unmap", "flush", "all"],
        error_type: Literal["failure", "pending", "corrupt_data", "nomem", "nvme_failure"],
        *,
        num: int = 1,
        queue_depth: int = 0,
        corrupt_offset: int = 0,
        corrupt_value: int = 0,
        nvme_sct: int = 0,
        nvme_sc: int = 0,
    ) -> None:
        """The next ``num`` I/Os of that type, instead of what was said before; only while ``queue_depth`` others are under way on their reactor."""

    def clear(self) -> None:
        """Nothing more. What is kept (pending) stays so."""

    def resume(self) -> int:
        """Keeps nothing more, and lets go on what was kept. Reply: None."""

@final
class VirtioLink:
    """By this a virtio bdev is told that its target went, and that there is another; its I/O waits in between. ``broken`` is answered (reply: str) when the target
    breaks a rule of the rings: no I/O goes to it any more. Asked anew before each ``rejoin``. ``leave``: the connection is over; answered when no reactor uses the
    rings. ``wipe`` makes them as new, for the next target (else ``EOPNOTSUPP``). ``rejoin``: it has them, with the features that were agreed on first; what waits goes to it,
    in order. ``configure`` gives the bdev its size (reply: blocks). Both: ``EINVAL`` for a configuration that what is under way cannot live with."""

    def broken(self) -> int: ...
    def leave(self) -> int: ...
    def wipe(self) -> None: ...
    def rejoin(self, config: bytes) -> int: ...
    def configure(self, config: bytes) -> int: ...

@final
class VirtioMemory:
    """Shared memory (memfd) for rings and data of a virtio-user initiator, laid out by the engine."""

    def __new__(cls, *, num_queues: int, queue_size: int, max_io_bytes: int = 131072) -> Self: ...
    fd: int
    size_bytes: int
    user_address: int
    """Where it is mapped here: what the memory table calls userspace address; guest addresses equal offsets."""

    def queue_addresses(self, queue: int) -> tuple[int, int, int]:
        """(desc, avail, used) as user addresses."""
