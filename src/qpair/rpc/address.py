"""Where the RPC server listens: what ``-r`` may say."""

from __future__ import annotations

import os

from qpair.errors import InvalidArgument

__all__ = ["DEFAULT_ADDRESS", "DEFAULT_PORT", "parse_address"]

DEFAULT_ADDRESS = "/var/tmp/spdk.sock"
DEFAULT_PORT = 5260


def parse_address(address: str) -> str | tuple[str, int]:
    """``-r``: a path is a Unix socket; ``host:port``, ``[v6]:port`` or a bare IPv4 address is TCP."""
    if "/" in address or (":" not in address and not address.replace(".", "").isdigit()):
        if not 0 < len(os.fsencode(address)) < 108:
            raise InvalidArgument(f"RPC socket path {address!r:.120} is {len(address)} bytes long; a Unix socket's is 1 to 107")
        return address
    host, separator, port = address.rpartition(":")
    if not separator or (host.startswith("[") != host.endswith("]")):
        host, port = address, str(DEFAULT_PORT)
    if not port.isdigit() or not 0 <= int(port) <= 65535 or not host:
        raise InvalidArgument(f"RPC address {address!r:.120}: write a path, host:port or [v6]:port with a port up to 65535")
    return host.strip("[]"), int(port)
