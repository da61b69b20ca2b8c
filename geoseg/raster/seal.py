"""A JSON document that carries the SHA-256 of its own bytes, so that a bit that rots in it is found."""

from __future__ import annotations

import hashlib
import json
from typing import Any

SEAL = "geoseg:item_sha256"
_OPEN = "0" * 64


def sealed(document: dict[str, Any]) -> bytes:
    """The document as JSON; among its ``properties`` is the SHA-256 of these bytes, taken with zeros in its own place."""
    document = {**document, "properties": {**document["properties"], SEAL: _OPEN}}
    body = (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    return body.replace(_OPEN.encode(), hashlib.sha256(body).hexdigest().encode(), 1)


def is_whole(body: bytes, seal: str) -> bool:
    """Whether bytes that carry ``seal`` are those that were sealed."""
    opened = body.replace(seal.encode(), _OPEN.encode(), 1)
    return opened != body and hashlib.sha256(opened).hexdigest() == seal
