"""Secrets taken out of text that people, logs and records get to see."""

from __future__ import annotations

import re
from typing import Any

# Parts of names whose values are secrets, and whole names.
TELLING_WORDS = (
    r"signature|credentials?|token|secret|password|passwd|passphrase|"
    r"(?:api|access|account|private|sas|subscription)[_-]?key"
)
TELLING_NAMES = "sig|sas|pwd"
_USER = re.compile(r"""://[^/\s"<>]+@""")
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_SCHEMES = r"(?:aws[\w-]*|bearer|basic|sharedkey\w*|token|digest|negotiate|oauth|api-?key)"
_OTHER_SCHEME = re.compile(
    rf"""(?i)(authorization["']?\s*[:=]\s*["']?)(?!{_SCHEMES}\s|\*)[\w-]+[^\S\r\n]+(?![\w-]+:)[^\s"',;]+"""
)
_HEADER = re.compile(
    rf"""(?i)((?:authorization[^\w*]{{1,4}}|(?<![\w-])[\w-]*-(?:{TELLING_WORDS})["']?\s*:\s*["']?)"""
    rf"""(?:{_SCHEMES}\s+)?)[^\s"',;]+"""
)
_AFTER_SCHEME = re.compile(
    r"""(\b(?:Bearer|Basic)\s+)[^\s"',;]+|(\b(?i:bearer|basic)\s+)[\w.~+/=-]{16,}"""  # no token is as long as a word
)
# Looking ahead for the word, once, keeps these linear in the length of a name.
_MEMBER = re.compile(rf"""(?i)(["'](?=[\w-]*?(?:{TELLING_WORDS}))[\w-]+["']\s*:\s*["'])[^"']+""")
_PAIR = re.compile(
    rf"""(?i)((?<![\w/.-])(?=[\w-]*?(?:{TELLING_WORDS})|(?:{TELLING_NAMES})=)[\w-]+=|[?&;]key=)[^&\s"',;<>]+"""
)


def redact(text: str) -> str:
    """The text without user names and passwords of URLs, keys, tokens and signatures, which become ``***``.

    Made for values, not for JSON as a whole. ``name=value`` counts where a query or an option stands, not in a path.
    """
    text = _HEADER.sub(r"\1***", _OTHER_SCHEME.sub(r"\1***", _USER.sub("://***@", text)))
    text = _MEMBER.sub(r"\1***", _AFTER_SCHEME.sub(r"\1\2***", text))
    return _KEY_ID.sub("***", _PAIR.sub(r"\1***", text))


def redacted(told: Any) -> Any:
    """The same structure with its texts, keys too, redacted one by one, so that it stays the JSON that it was."""
    if isinstance(told, dict):
        return {redacted(key): redacted(value) for key, value in told.items()}
    if isinstance(told, (list, tuple)):
        return [redacted(value) for value in told]
    return redact(told) if isinstance(told, str) else told
