"""A real browser for pages: Debian's chromium, driven through playwright-core; see ``infra/browser.sh``."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "browser.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A page to open in a window of some size, what to do there, expressions to ask it then, and where to put a picture of it.

    ``steps`` are told in ``look.mjs``.
    """

    url: str
    width: int
    height: int = 900
    dark: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)
    ask: dict[str, str] = field(default_factory=dict)
    picture: str | None = None


def look_at(looks: Sequence[Look]) -> list[dict[str, Any]]:
    """For each look: ``trouble`` (a sentence each), ``requests`` (URLs), ``ranges`` (URL, Content-Range), ``answers``.

    Skips the test without a browser.
    """
    found = subprocess.run([str(SCRIPT), "where"], capture_output=True, text=True, check=False)
    if found.returncode == 3:
        pytest.skip("there is no browser on this machine; get it with: infra/browser.sh install")
    assert found.returncode == 0, found.stderr
    chromium, driver = found.stdout.splitlines()
    with tempfile.TemporaryDirectory(prefix="geoseg-browser-", ignore_cleanup_errors=True) as profile:
        told = json.dumps([asdict(look) for look in looks])
        command = ["node", str(Path(__file__).with_name("look.mjs"))]
        command += [driver, chromium, profile, told]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert isinstance(answers, list)
    return answers
