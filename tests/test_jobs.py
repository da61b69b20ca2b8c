"""The scripts in jobs/ run a config file on the cluster they are started in, with the command line's sentences and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", ["predict", "train", "evaluate", "nightly"])
def test_a_script_takes_a_config_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('out = "/nowhere"\nscenez = []\n')
    command = [sys.executable, str(ROOT / "jobs" / f"{kind}.py"), "job.toml"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("geoseg: job.toml: "), done.stderr
