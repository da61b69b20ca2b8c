"""Where the real imagery lies that some tests read; it is no part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    """The folder with real imagery beside the project, or GEOSEG_TEST_DATA; skips the test when there is none."""
    folder = Path(os.environ.get("GEOSEG_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"there is no real imagery at {folder}; set GEOSEG_TEST_DATA to a folder that has it")
    return folder
