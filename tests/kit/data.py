"""Where the real imagery lies that some tests read; it is no part of the project."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE = Path(__file__).parents[2] / "jobs" / "configs" / "default-coarse.toml"


def data_folder() -> Path:
    """The folder with real imagery beside the project, or GEOSEG_TEST_DATA; skips the test when there is none."""
    folder = Path(os.environ.get("GEOSEG_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"there is no real imagery at {folder}; set GEOSEG_TEST_DATA to a folder that has it")
    return folder


def recipe() -> dict[str, Any]:
    """Return the training with which the shipped bundle begins, as TOML has it, with its imagery where it lies here."""
    told = tomllib.loads(RECIPE.read_text())
    for source in told["source"]:
        source["scenes"] = [uri.replace("../shared/data", str(data_folder())) for uri in source["scenes"]]
    return told
