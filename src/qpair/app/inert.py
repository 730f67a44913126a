"""Methods that an SPDK configuration carries and that mean nothing here: accepted, remembered, reported once as without effect.

How it works: `INERT` lists them by subsystem with the parameters and the states of SPDK's public schema. A call replaces what the same method (and the
same key parameter, for those that are set per object) said before; `InertSubsystem.config` gives it back, so that a saved configuration still holds it.

Unknown parameters of these methods are accepted too: a configuration saved by an older SPDK names some that are gone, and none has an effect.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from qpair.app.subsystems import ConfigEntry, Subsystem
from qpair.rpc.registry import REGISTRY, Method, Params
from qpair.rpc.types import I32, U8, U16, U32, U64

if TYPE_CHECKING:
    from qpair.app.stack import Stack

__all__ = ["INERT", "InertSubsystem", "declare"]

logger = logging.getLogger("qpair.app")

_TYPES: dict[str, Any] = {
    "u8": U8,
    "u16": U16,
    "u32": U32,
    "u64": U64,
    "i32": I32,
    "b": bool,
    "s": str,
    "o": dict[str, Any],
    "l": list[str],
}

# subsystem, method, states (s: startup, r: runtime), parameters (name:type, ! required, * part of the key)
INERT: tuple[tuple[str, str, str, str], ...] = (
    (
        "sock",
        "sock_impl_set_options",
        "s",
        (
            "impl_name:s!* recv_buf_size:u32 send_buf_size:u32 enable_recv_pipe:b enable_quickack:b enable_placement_id:u32 "
            "enable_zerocopy_send_server:b enable_zerocopy_send_client:b zerocopy_threshold:u32 tls_version:u32 enable_ktls:b"
        ),
    ),
    ("sock", "sock_set_default_impl", "s", "impl_name:s!"),
    ("iobuf", "iobuf_set_options", "s", "small_pool_count:u64 large_pool_count:u64 small_bufsize:u32 large_bufsize:u32 enable_numa:b"),
    ("accel", "accel_set_options", "s", "small_cache_size:u32 large_cache_size:u32 task_count:u32 sequence_count:u32 buf_count:u32"),
    ("accel", "accel_assign_opc", "s", "opname:s!* module:s!"),
    ("accel", "accel_set_driver", "s", "name:s"),
    ("accel", "ae4dma_scan_accel_module", "s", ""),
    ("accel", "compressdev_scan_accel_module", "s", "pmd:u32!"),
    ("accel", "cuda_scan_accel_module", "s", ""),
    ("accel", "dpdk_cryptodev_scan_accel_module", "s", ""),
    ("accel", "dpdk_cryptodev_set_driver", "s", "driver_name:s!"),
    ("accel", "dsa_scan_accel_module", "s", "config_kernel_mode:b"),
    ("accel", "iaa_scan_accel_module", "s", ""),
    ("accel", "ioat_scan_accel_module", "s", ""),
    (
        "accel",
        "mlx5_scan_accel_module",
        "s",
        "qp_size:u16 num_requests:u32 allowed_devs:s crypto_split_blocks:u16 enable_driver:b",
    ),
    ("keyring", "keyring_linux_set_options", "s", "enable:b"),
    ("vmd", "vmd_enable", "s", ""),
    ("scheduler", "framework_set_scheduler", "sr", "name:s! period:u64 load_limit:u8 core_limit:u8 core_busy:u8 mappings:s"),
    ("scheduler", "scheduler_set_options", "s", "scheduling_core:u32 isolated_core_mask:s"),
    ("bdev", "bdev_iscsi_set_options", "sr", "timeout_sec:u64"),
    (
        "bdev",
        "bdev_nvme_set_options",
        "sr",
        (
            "action_on_timeout:s timeout_us:u64 timeout_admin_us:u64 keep_alive_timeout_ms:u32 arbitration_burst:u32 low_priority_weight:u32 "
            "medium_priority_weight:u32 high_priority_weight:u32 nvme_adminq_poll_period_us:u64 nvme_ioq_poll_period_us:u64 "
            "io_queue_requests:u32 delay_cmd_submit:b transport_retry_count:u32 bdev_retry_count:i32 transport_ack_timeout:u8 "
            "ctrlr_loss_timeout_sec:i32 reconnect_delay_sec:u32 fast_io_fail_timeout_sec:u32 disable_auto_failback:b generate_uuids:b "
            "transport_tos:u8 nvme_error_stat:b rdma_srq_size:u32 io_path_stat:b allow_accel_sequence:b rdma_max_cq_size:u32 "
            "rdma_cm_event_timeout_ms:u16 dhchap_digests:l dhchap_dhgroups:l rdma_umr_per_io:b tcp_connect_timeout_ms:u32 enable_flush:b "
            "multipath_opts:o"
        ),
    ),
    ("bdev", "bdev_nvme_set_hotplug", "r", "enable:b! period_us:u64"),
    ("bdev", "bdev_virtio_blk_set_hotplug", "r", "enable:b! period_us:u64"),
    ("fsdev", "fsdev_set_opts", "r", "fsdev_io_pool_size:u32! fsdev_io_cache_size:u32!"),
    (
        "nvmf",
        "nvmf_set_config",
        "s",
        "admin_cmd_passthru:o poll_groups_mask:s discovery_filter:s discovery_filters:l dhchap_digests:l dhchap_dhgroups:l dup_host_policy:s",
    ),
    ("nvmf", "nvmf_set_max_subsystems", "s", "max_subsystems:u32!"),
    ("nvmf", "nvmf_set_crdt", "s", "crdt1:u16 crdt2:u16 crdt3:u16"),
    (
        "iscsi",
        "iscsi_set_options",
        "s",
        (
            "auth_file:s node_base:s nop_timeout:i32 nop_in_interval:i32 disable_chap:b require_chap:b mutual_chap:b chap_group:i32 "
            "max_sessions:u32 max_queue_depth:u32 max_connections_per_session:u32 default_time2wait:u32 default_time2retain:u32 "
            "first_burst_length:u32 immediate_data:b error_recovery_level:u32 allow_duplicated_isid:b max_large_datain_per_connection:u32 "
            "max_r2t_per_connection:u32 pdu_pool_size:u32 immediate_data_pool_size:u32 data_out_pool_size:u32"
        ),
    ),
)


class InertStore:
    """What the inert methods of one stack have been told, by subsystem."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, tuple[Any, ...]], ConfigEntry] = {}
        self._reported: set[str] = set()

    def remember(self, subsystem: str, method: str, key: tuple[Any, ...], params: dict[str, Any], *, effect: str | None = None) -> None:
        """Keep one call; say once a method that it has no effect. ``effect``: what to say that of, if not all of the method."""
        entry: dict[str, Any] = {"method": method}
        if params:
            entry["params"] = params
        self._entries[(subsystem, method, key)] = entry
        self.report(effect or method, "is remembered for save_config and has no effect here")

    def report(self, what: str, text: str) -> None:
        """Say once that something has no effect."""
        if what not in self._reported:
            self._reported.add(what)
            logger.info("%s %s", what, text)

    def forget(self, subsystem: str, method: str, key: tuple[Any, ...]) -> None:
        """As if that call had not been made; `KeyError` when it was not."""
        del self._entries[(subsystem, method, key)]

    def said(self, subsystem: str, method: str) -> list[dict[str, Any]]:
        """The parameters of every remembered call of ``method``."""
        return [dict(entry.get("params", {})) for (owner, name, _), entry in self._entries.items() if (owner, name) == (subsystem, method)]

    def last(self, subsystem: str, method: str) -> dict[str, Any]:
        """The parameters of the one remembered call of a method without key; nothing when it was not called."""
        return next(iter(self.said(subsystem, method)), {})

    def config(self, subsystem: str) -> list[ConfigEntry]:
        """The remembered calls of ``subsystem``."""
        return [entry for (owner, _, _), entry in self._entries.items() if owner == subsystem]


class InertSubsystem(Subsystem):
    """A subsystem that only remembers. One class a name, see `inert_subsystem`."""

    def config(self, stack: Stack) -> list[ConfigEntry]:
        return stack.inert.config(self.name)


def inert_subsystem(name: str, *depends_on: str) -> InertSubsystem:
    """A remembering subsystem of that name."""
    made: InertSubsystem = type(f"Inert_{name}", (InertSubsystem,), {"name": name, "depends_on": depends_on})()
    return made


def declare() -> None:
    """Put the methods of `INERT` into the registry (once, on import of `qpair.app.rpc`)."""
    for subsystem, name, states, declaration in INERT:
        fields: list[Any] = []
        key: list[str] = []
        for item in declaration.split():
            parameter, _, kind = item.partition(":")
            bare = kind.rstrip("!*")
            if "*" in kind:
                key.append(parameter)
            fields.append((parameter, _TYPES[bare]) if "!" in kind else (parameter, _TYPES[bare] | None, None))
        params: Any = msgspec.defstruct(f"Params_{name}", fields, bases=(Params,), kw_only=True, forbid_unknown_fields=False)
        REGISTRY.add(
            Method(
                name=name,
                handler=_handler(subsystem, name, tuple(key)),
                params=params if fields else None,
                startup="s" in states,
                runtime="r" in states,
                aliases=(),
                summary="Accepted and remembered; has no effect here.",
            )
        )


def _handler(subsystem: str, name: str, key: tuple[str, ...]) -> Any:
    async def handler(stack: Stack, params: Params | None) -> bool:
        given = {} if params is None else {k: v for k, v in msgspec.structs.asdict(params).items() if v is not None}
        stack.inert.remember(subsystem, name, tuple(given.get(k) for k in key), given)
        return True

    return handler
