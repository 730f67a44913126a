"""Cuts a byte stream into JSON-RPC documents, whatever the sender's white space and however the bytes arrive.

JSON-RPC 2.0 over a stream has no framing: requests are concatenated JSON objects (or arrays: batches), with or without white space between.

How it works: only the bytes that can open, close or hide structure matter, so a compiled expression jumps from one to the next; each byte is
looked at once, however small the pieces. Whether a document is valid JSON is decided when it is whole, by its reader.

Errors: `FramingError` ends the stream, for a broken document leaves no place to start again: bytes that no JSON object or array begins with
(-32700), a document that is neither (-32600), more than ``document_bytes_max`` (-32600), deeper nesting than 64 (-32700).
"""

from __future__ import annotations

import re

__all__ = ["DEPTH_MAX", "DOCUMENT_BYTES_MAX", "Framer", "FramingError"]

DOCUMENT_BYTES_MAX = 4 << 20
"""The longest configuration call is some hundred bytes; a saved configuration is sent call by call."""

DEPTH_MAX = 64

_STRUCTURE = re.compile(rb'["\[\]{}]')
_STRING = re.compile(rb'["\\]')
_SPACE = re.compile(rb"[ \t\r\n]*")


class FramingError(ValueError):
    """The stream cannot go on. ``code`` is the JSON-RPC error to answer before closing."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Framer:
    """Pure: ``feed(bytes)`` returns the documents completed by these bytes. After a `FramingError` it takes nothing more."""

    def __init__(self, *, document_bytes_max: int = DOCUMENT_BYTES_MAX, depth_max: int = DEPTH_MAX) -> None:
        self._document_bytes_max = document_bytes_max
        self._depth_max = depth_max
        self._pending = bytearray()
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.error: FramingError | None = None

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of a document that is not yet whole."""
        return len(self._pending)

    def feed(self, data: bytes) -> tuple[list[bytes], FramingError | None]:
        """The documents that ``data`` completes, and the error that ended the stream after them, if any."""
        documents: list[bytes] = []
        position, start = 0, 0
        while self.error is None and position < len(data):
            if self._depth == 0:
                position = start = _SPACE.match(data, position).end()  # type: ignore[union-attr]
                if position == len(data):
                    break
                if not self._open(data[position]):
                    break
                position += 1
            elif self._in_string:
                position = self._string(data, position)
            else:
                position = self._structure(data, position)
            self._check_size(position - start)
            if self._depth == 0 and self.error is None:
                self._pending += data[start:position]
                documents.append(bytes(self._pending))
                self._pending = bytearray()
                start = position
        if self.error is not None:
            self._pending = bytearray()
        elif self._depth:
            self._pending += data[start:]
        return documents, self.error

    def _open(self, byte: int) -> bool:
        if byte in b"{[":
            self._depth = 1
            return True
        if byte in b'"-0123456789tfn':
            self.error = FramingError(-32600, f"Invalid request: it must be an object or a batch array, found {chr(byte)!r}")
        else:
            self.error = FramingError(-32700, f"Parse error: no JSON object or array begins with byte 0x{byte:02x}")
        return False

    def _string(self, data: bytes, position: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        match = _STRING.search(data, position)
        if match is None:
            return len(data)
        if match[0] == b"\\":
            self._escaped = True
        else:
            self._in_string = False
        return match.end()

    def _structure(self, data: bytes, position: int) -> int:
        match = _STRUCTURE.search(data, position)
        if match is None:
            return len(data)
        byte = match[0]
        if byte == b'"':
            self._in_string = True
        elif byte in b"[{":
            self._depth += 1
            if self._depth > self._depth_max:
                self.error = FramingError(-32700, f"Parse error: nested deeper than {self._depth_max}")
        else:
            self._depth -= 1
        return match.end()

    def _check_size(self, pending: int) -> None:
        over = len(self._pending) + pending - self._document_bytes_max
        # A search may jump past the limit to a later fault; the limit came first.
        if over > 1 or (over == 1 and self.error is None):
            self.error = FramingError(-32600, f"Invalid request: longer than {self._document_bytes_max} bytes")
