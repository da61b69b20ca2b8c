"""From a Range header and an object's size to the bytes to send (RFC 9110, section 14)."""

from __future__ import annotations

import re

_ONE_RANGE = re.compile(r"bytes=\s*(\d{0,40})-(\d{0,40})\s*", re.IGNORECASE)


class UnsatisfiableRangeError(ValueError):
    """The range is well formed, and the object has not one byte of it."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None when the whole object is to be sent.

    What is no single well-formed range (several, other units, an end before its start) is ignored, as the RFC allows.
    Raises UnsatisfiableRangeError when no byte of the object is in it.
    """
    found = _ONE_RANGE.fullmatch(header or "")
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= end:
        raise UnsatisfiableRangeError(f"the object has {size} bytes")
    return start, end
