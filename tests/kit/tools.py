"""Programs that check files of ``infra/``: where each is, or a skip that says how to get it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str, how_to_get: str) -> str:
    """The path of a program beside this Python or on PATH; without it the test skips with ``how_to_get``."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on this machine; get it with: {how_to_get}")
    return found
