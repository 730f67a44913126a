"""The parameter types of SPDK's public schema, for `Params` fields: ``num_blocks: U64``, ``uuid: Uuid | None = None``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

__all__ = ["I32", "U8", "U16", "U32", "U64", "U64_MAX", "KillSignal", "LogLevel", "ResetStatMode", "Uuid"]

U64_MAX = 2**64 - 1

U8 = Annotated[int, Meta(ge=0, le=2**8 - 1, extra={"schema": "uint8"})]
U16 = Annotated[int, Meta(ge=0, le=2**16 - 1, extra={"schema": "uint16"})]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1, extra={"schema": "uint32"})]
# msgspec's own bounds end at 2**63 - 1; `Method.decode` refuses what is past 2**64 - 1.
U64 = Annotated[int, Meta(ge=0, extra={"schema": "uint64"})]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, extra={"schema": "int32"})]
Uuid = Annotated[
    str,
    Meta(pattern="^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$", extra={"schema": "uuid"}),
]

KillSignal = Literal["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL", "SIGUSR1"]
LogLevel = Literal["ERROR", "WARNING", "NOTICE", "INFO", "DEBUG"]
ResetStatMode = Literal["all", "maxmin", "error", "none"]
