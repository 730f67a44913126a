"""JSON-RPC methods of keys and of the accel framework: kept, checked, listed and saved as SPDK does; no module here uses a key yet.

A file key is a path; the file is looked at when it is added (absolute, ours, closed to everybody else) and not read. A crypto key is two texts of hexadecimal
digits: they stand in a saved configuration, as with SPDK, and in no log line or error.

accel: the processor does everything, so each operation belongs to the module "software" unless accel_assign_opc said otherwise. No I/O passes an accel framework or
a pool of iobuf: their statistics are there for clients that ask, and empty.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Literal

from qpair.errors import AlreadyExists, InvalidArgument, InvalidParameters, NoSuchFile, NotPermitted, from_errno
from qpair.rpc.registry import Params, method

if TYPE_CHECKING:
    from qpair.app.stack import Stack

OPERATIONS = (
    "copy",
    "fill",
    "dualcast",
    "compare",
    "crc32c",
    "copy_crc32c",
    "compress",
    "decompress",
    "encrypt",
    "decrypt",
    "xor",
    "dif_verify",
    "dif_verify_copy",
    "dif_generate",
    "dif_generate_copy",
    "dix_generate",
    "dix_verify",
)
HEX_KEY_MAX = 128
_FILE, _CRYPTO = "keyring_file_add_key", "accel_crypto_key_create"


class FileAddKey(Params):
    """``path``: absolute."""

    name: str
    path: str


@method(_FILE, params=FileAddKey)
async def keyring_file_add_key(stack: Stack, params: FileAddKey) -> bool:
    """Make a file a key."""
    if ":" in params.name[1:]:
        raise InvalidArgument(f"key {params.name!r:.80}: there is no keyring but the global one, whose keys have no ':' in their names")
    if any(key["name"] == params.name for key in stack.inert.said("keyring", _FILE)):
        raise AlreadyExists(f"a key is already named {params.name!r:.80}")
    _check_key_file(params.path)
    stack.inert.remember("keyring", _FILE, (params.name,), {"name": params.name, "path": params.path})
    return True


def _check_key_file(path: str) -> None:
    if not path.startswith("/"):
        raise NotPermitted(f"key file {path!r:.256}: the path must be absolute")
    try:
        found = os.stat(path)
    except ValueError:
        raise NoSuchFile(f"key file {path!r:.256}: no such file") from None
    except OSError as error:
        raise from_errno(error.errno or 5, f"key file {path!r:.256}: {error.strerror}") from error
    if found.st_mode & 0o77:
        raise NotPermitted(f"key file {path!r:.256}: its mode is {found.st_mode & 0o777:o}, nobody but its owner may have access")
    if found.st_uid != os.getuid():
        raise NotPermitted(f"key file {path!r:.256}: it belongs to uid {found.st_uid}, this process is {os.getuid()}")


class FileRemoveKey(Params):
    """The name it was added with."""

    name: str


@method("keyring_file_remove_key", params=FileRemoveKey)
async def keyring_file_remove_key(stack: Stack, params: FileRemoveKey) -> bool:
    """Forget a key; its file stays."""
    try:
        stack.inert.forget("keyring", _FILE, (params.name,))
    except KeyError:
        raise NoSuchFile(f"no key is named {params.name!r:.80}") from None
    return True


@method("keyring_get_keys")
async def keyring_get_keys(stack: Stack, params: None) -> list[dict[str, Any]]:
    """All keys; never what is in them."""
    return [
        {"name": key["name"], "module": "keyring_file", "removed": False, "probed": False, "refcnt": 1, "path": key["path"]}
        for key in stack.inert.said("keyring", _FILE)
    ]


class CryptoKeyCreate(Params):
    """``key`` and ``key2`` in hexadecimal digits; AES_XTS needs both, equally long."""

    cipher: Literal["AES_CBC", "AES_XTS"]
    key: str
    name: str
    key2: str | None = None
    tweak_mode: Literal["SIMPLE_LBA", "JOIN_NEG_LBA_WITH_LBA", "INCR_512_FULL_LBA", "INCR_512_UPPER_LBA"] | None = None


@method(_CRYPTO, params=CryptoKeyCreate)
async def accel_crypto_key_create(stack: Stack, params: CryptoKeyCreate) -> bool:
    """Keep a key."""
    for name, digits in (("key", params.key), ("key2", params.key2)):
        if digits is not None and (len(digits) > HEX_KEY_MAX or not re.fullmatch(r"(?:[0-9a-fA-F]{2})+", digits)):
            raise InvalidParameters(f"parameter '{name}': 2 to {HEX_KEY_MAX} hexadecimal digits, two a byte; got {len(digits)} characters")
    lengths = [len(digits) * 4 for digits in (params.key, params.key2) if digits is not None]
    if params.cipher == "AES_XTS" and (len(lengths) != 2 or lengths[0] != lengths[1] or lengths[0] not in (128, 256)):
        raise InvalidParameters(f"cipher AES_XTS takes 'key' and 'key2' of 128 or 256 bits each; got {' and '.join(map(str, lengths))}")
    if params.cipher == "AES_XTS" and params.key.lower() == (params.key2 or "").lower():
        raise InvalidParameters("cipher AES_XTS: 'key' and 'key2' must differ")
    if params.cipher == "AES_CBC" and (len(lengths) != 1 or lengths[0] not in (128, 256)):
        raise InvalidParameters(f"cipher AES_CBC takes 'key' of 128 or 256 bits alone; got {' and '.join(map(str, lengths))}")
    if any(key["name"] == params.name for key in stack.inert.said("accel", _CRYPTO)):
        raise InvalidParameters(f"failed to create DEK, rc -17: a key is already named {params.name!r:.80}")
    kept = {"name": params.name, "cipher": params.cipher, "key": params.key, "key2": params.key2}
    kept["tweak_mode"] = params.tweak_mode or "SIMPLE_LBA"
    stack.inert.remember("accel", _CRYPTO, (params.name,), {name: value for name, value in kept.items() if value is not None})
    return True


class CryptoKeyDestroy(Params):
    """The name it was created with."""

    key_name: str


@method("accel_crypto_key_destroy", params=CryptoKeyDestroy)
async def accel_crypto_key_destroy(stack: Stack, params: CryptoKeyDestroy) -> bool:
    """Forget a key."""
    try:
        stack.inert.forget("accel", _CRYPTO, (params.key_name,))
    except KeyError:
        raise InvalidParameters(f"No key object found: {params.key_name!r:.80}") from None
    return True


class CryptoKeysGet(Params):
    """Without ``key_name``: all."""

    key_name: str | None = None


@method("accel_crypto_keys_get", params=CryptoKeysGet)
async def accel_crypto_keys_get(stack: Stack, params: CryptoKeysGet) -> list[dict[str, Any]]:
    """Keys as they were created, their digits too, as SPDK gives them: whoever reaches the socket owns the process."""
    found = [key for key in stack.inert.said("accel", _CRYPTO) if params.key_name in (None, key["name"])]
    if params.key_name is not None and not found:
        raise InvalidParameters(f"key was not found: {params.key_name!r:.80}")
    return found


@method("accel_get_opc_assignments")
async def accel_get_opc_assignments(stack: Stack, params: None) -> dict[str, str]:
    """Which module does which operation."""
    assigned = {call["opname"]: call["module"] for call in stack.inert.said("accel", "accel_assign_opc")}
    return {name: assigned.get(name, "software") for name in OPERATIONS}


@method("accel_get_module_info")
async def accel_get_module_info(stack: Stack, params: None) -> list[dict[str, Any]]:
    """The modules there are: one, the processor."""
    return [{"module": "software", "supported ops": list(OPERATIONS)}]


@method("accel_get_stats")
async def accel_get_stats(stack: Stack, params: None) -> dict[str, Any]:
    """How much went through the accel framework: nothing, for here the bdevs compute by themselves."""
    sequences = dict.fromkeys(("sequence_executed", "sequence_failed", "sequence_outstanding", "task_outstanding"), 0)
    retries = dict.fromkeys(("retry_task", "retry_sequence", "retry_iobuf", "retry_bufdesc"), 0)
    return {**sequences, "operations": [], **retries}


@method("iobuf_get_stats")
async def iobuf_get_stats(stack: Stack, params: None) -> list[Any]:
    """The modules that draw on the pools of iobuf: none, see `qpair.bdev.rpc_options`."""
    return []


@method("sock_get_default_impl", startup=True)
async def sock_get_default_impl(stack: Stack, params: None) -> dict[str, str]:
    """What sock_set_default_impl said."""
    return {"impl_name": stack.inert.last("sock", "sock_set_default_impl").get("impl_name", "posix")}
