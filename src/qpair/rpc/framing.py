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

DOCUMENT_BYTES_MAX = 1 << 20
"""The longest configuration call is some hundred bytes, and a batch has at most 1024. Reading a hostile document of this size costs the control loop
a fraction of a second; no I/O waits for it."""

DEPTH_MAX = 64

# A backslash takes the next byte with it; at the end of a piece it stands alone.
_TOKEN = re.compile(rb'\\.?|["\[\]{}]', re.DOTALL)
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
        position = 0
        while self.error is None and position < len(data):
            start = position
            if self._depth == 0:
                start = _SPACE.match(data, position).end()  # type: ignore[union-attr]
                if start == len(data) or not self._open(data[start]):
                    break
                position = start + 1
            position = self._scan(data, position)
            self._check_size(position - start)
            if self.error is None:
                self._pending += data[start:position]
                if self._depth == 0:
                    documents.append(bytes(self._pending))
                    self._pending = bytearray()
        if self.error is not None:
            self._pending = bytearray()
        return documents, self.error

    def _scan(self, data: bytes, position: int) -> int:
        """To the end of the document or of ``data``, whichever comes first."""
        if self._escaped and position < len(data):
            self._escaped = False
            position += 1
        depth, in_string, end = self._depth, self._in_string, len(data)
        for token in _TOKEN.finditer(data, position):
            byte = data[token.start()]
            if byte == 0x22:
                in_string = not in_string
            elif byte == 0x5C:
                self._escaped = token.end() - token.start() == 1
            elif in_string:
                continue
            elif byte == 0x5B or byte == 0x7B:
                depth += 1
                if depth > self._depth_max:
                    self.error = FramingError(-32700, f"Parse error: nested deeper than {self._depth_max}")
                    end = token.end()
                    break
            else:
                depth -= 1
                if depth == 0:
                    end = token.end()
                    break
        self._depth, self._in_string = depth, in_string
        return end

    def _open(self, byte: int) -> bool:
        if byte in b"{[":
            self._depth = 1
            return True
        if byte in b'"-0123456789tfn':
            self.error = FramingError(-32600, f"Invalid request: it must be an object or a batch array, found {chr(byte)!r}")
        else:
            self.error = FramingError(-32700, f"Parse error: no JSON object or array begins with byte 0x{byte:02x}")
        return False

    def _check_size(self, pending: int) -> None:
        over = len(self._pending) + pending - self._document_bytes_max
        # A search may jump past the limit to a later fault; the limit came first.
        if over > 1 or (over == 1 and self.error is None):
            self.error = FramingError(-32600, f"Invalid request: longer than {self._document_bytes_max} bytes")
