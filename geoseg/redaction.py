"""Secrets taken out of text that people, logs and records get to see."""

from __future__ import annotations

import re
from typing import Any

_WORDS = "signature|credential|token|secret|password|accesskey|access_key|accountkey"
_USER = re.compile(r'://[^/@\s"<>]+@')
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_HEADER = re.compile(
    r"""(?i)((?:authorization\W{1,4}|(?<![\w-])[\w-]*-(?:token|secret|password|signature|credential|api-key)["']?\s*:\s*["']?)"""
    r"""(?:(?:aws[\w-]*|bearer|basic|sharedkey)\s+)?)[^\s"',;]+"""
)
_MEMBER = re.compile(rf"""(?i)(["'][\w-]*(?:{_WORDS})[\w-]*["']\s*:\s*["'])[^"']+""")
_PAIR = re.compile(rf"""(?i)(?<![\w/.-])((?:[\w-]*(?:{_WORDS})[\w-]*|sig)=)[^&\s"',;<>]+""")


def redact(text: str) -> str:
    """The text without user names and passwords of URLs, keys, tokens and signatures, which become ``***``.

    Made for values, not for JSON as a whole. ``name=value`` counts where a query or an option stands, not in a path.
    """
    text = _MEMBER.sub(r"\1***", _HEADER.sub(r"\1***", _USER.sub("://***@", text)))
    return _KEY_ID.sub("***", _PAIR.sub(r"\1***", text))


def redacted(told: Any) -> Any:
    """The same structure with its texts redacted one by one, so that it stays the JSON that it was."""
    if isinstance(told, dict):
        return {key: redacted(value) for key, value in told.items()}
    if isinstance(told, (list, tuple)):
        return [redacted(value) for value in told]
    return redact(told) if isinstance(told, str) else told
