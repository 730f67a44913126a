"""JSON-RPC methods of logging. Flags are qpair's components (`qpair.app.logs.FLAGS`), not SPDK's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qpair.app.logs import FLAGS, enable_timestamps, get_level, set_level
from qpair.errors import InvalidParameters
from qpair.rpc.registry import Params, method
from qpair.rpc.types import LogLevel

if TYPE_CHECKING:
    from qpair.app.stack import Stack


class LogSetLevel(Params):
    """``level``: ERROR, WARNING, NOTICE, INFO or DEBUG."""

    level: LogLevel


@method("log_set_level", params=LogSetLevel, startup=True)
async def log_set_level(stack: Stack, params: LogSetLevel) -> bool:
    """Drop what is less severe."""
    set_level(params.level)
    return True


@method("log_get_level", startup=True)
async def log_get_level(stack: Stack, params: None) -> str:
    """The present level."""
    return get_level()


@method("log_set_print_level", params=LogSetLevel, startup=True)
async def log_set_print_level(stack: Stack, params: LogSetLevel) -> bool:
    """Print nothing less severe on standard error."""
    set_level(params.level, printed=True)
    return True


@method("log_get_print_level", startup=True)
async def log_get_print_level(stack: Stack, params: None) -> str:
    """The present level of what is printed."""
    return get_level(printed=True)


@method("log_get_flags", startup=True)
async def log_get_flags(stack: Stack, params: None) -> dict[str, bool]:
    """The components whose debug messages can be switched on, and whether they are."""
    return {flag: logging.getLogger(f"qpair.{flag}").level == logging.DEBUG for flag in FLAGS}


class LogFlag(Params):
    """``flag``: one of log_get_flags, or "all"."""

    flag: str


@method("log_set_flag", params=LogFlag, startup=True)
async def log_set_flag(stack: Stack, params: LogFlag) -> bool:
    """Debug messages of one component on."""
    _set_flag(params.flag, logging.DEBUG)
    return True


@method("log_clear_flag", params=LogFlag, startup=True)
async def log_clear_flag(stack: Stack, params: LogFlag) -> bool:
    """Debug messages of one component off."""
    _set_flag(params.flag, logging.NOTSET)
    return True


class LogEnableTimestamps(Params):
    """``enabled``: whether printed lines begin with the time."""

    enabled: bool


@method("log_enable_timestamps", params=LogEnableTimestamps)
async def log_enable_timestamps(stack: Stack, params: LogEnableTimestamps) -> bool:
    """Print lines with the time, or without."""
    enable_timestamps(params.enabled)
    return True


def _set_flag(flag: str, level: int) -> None:
    if flag != "all" and flag not in FLAGS:
        raise InvalidParameters(f"invalid log flag: parameter 'flag': {flag!r:.64} is none of {', '.join(FLAGS)}, all")
    for name in FLAGS if flag == "all" else (flag,):
        logging.getLogger(f"qpair.{name}").setLevel(level)
