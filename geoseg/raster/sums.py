"""The sums that a catalogue tells of its files (``file:checksum``), compared with the files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from geoseg.errors import SceneError
from geoseg.raster import store
from geoseg.raster.scene import SceneRef

MISSING = "none"
# The code and the length of a multihash (https://github.com/multiformats/multicodec), in hex, and Python's name.
_KINDS = {"d50110": "md5", "1114": "sha1", "1220": "sha256", "2030": "sha384", "1340": "sha512"}
_RANGE_BYTES, _RANGES_AT_ONCE = 8 << 20, 4


class ChecksumError(SceneError):
    """A file is not the one of which a catalogue tells."""


def check_sums(ref: SceneRef, versions: Mapping[str, tuple[str, int]]) -> None:
    """Read each file of a scene that comes with a sum ("" for none); ``versions`` has the ETag and size that were planned, by URI.

    Raises ChecksumError when a sum is another, is missing, or is of a kind that is not known, and what ``read_ranges`` raises.
    """
    for uri, told in zip(ref.uris, ref.sums, strict=True) if ref.sums else ():
        if not told:
            continue
        told_of = f"{ref.id}: {store.redact(uri)}"
        if told == MISSING:
            raise ChecksumError(
                f"{told_of}: its source wants checksums, and its item has no file:checksum for it; add it, or leave checksums out"
            )
        code = next((code for code in _KINDS if told.lower().startswith(code)), None)
        if code is None or len(told) != len(code) + 2 * int(code[-2:], 16):
            raise ChecksumError(
                f"{told_of}: its item has the file:checksum {told[:80]!r}; wanted a multihash in hex of "
                f"{', '.join(_KINDS.values())}"
            )
        found, wanted = _digest(_KINDS[code], uri, *versions[uri]), told.lower().removeprefix(code)
        if found != wanted:
            raise ChecksumError(
                f"{told_of}: its {_KINDS[code]} is {found[:16]}..., its item says {wanted[:16]}...: one of them was damaged, or "
                "replaced without the other; fetch both anew"
            )


def _digest(kind: str, uri: str, etag: str, size: int) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    at_once = _RANGES_AT_ONCE * _RANGE_BYTES
    for first in range(0, size, at_once):
        last = min(size, first + at_once)
        ranges = [(start, min(last, start + _RANGE_BYTES)) for start in range(first, last, _RANGE_BYTES)]
        for data in store.read_ranges(uri, ranges, etag=etag):
            digest.update(data)
    return digest.hexdigest()
