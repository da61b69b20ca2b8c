"""The reliability page's table is made from what tests noted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit.figures import BEGIN, END, FILE, Figure, note, table

TESTS = Path(__file__).parent


def one(promise: str, value: str, *, test: str = "chaos/test_kills.py::test_it") -> Figure:
    return Figure(promise=promise, what="listings", value=value, goal="0", test=test)


def test_figures_stand_by_promise_and_the_last_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note(one("R1", "told to nobody"))
    monkeypatch.setenv(FILE, str(tmp_path / "figures"))
    for figure in (one("S1", "5"), one("R10", "4"), one("R2", "3"), one("R2", "2"), one("R2", "1", test="b")):
        note(figure)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    script = str(TESTS / "kit" / "figures.py")
    subprocess.run([sys.executable, script, str(tmp_path / "figures"), str(page)], check=True)
    before, *rows, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert [row.split(" | ")[0] + row.split(" | ")[2] for row in rows[3:-1]] == ["| R21", "| R22", "| R104", "| S15"]


def test_the_page_of_the_project_has_a_place_for_the_table() -> None:
    text = (TESTS / "chaos" / "README.md").read_text()
    assert text.index(BEGIN) < text.index(END)


def test_a_promise_has_a_number() -> None:
    assert "| R1 |" in table([one("R1", "0")])
    with pytest.raises(ValueError, match="R1 to R18 and S1 to S14"):
        one("R", "0")
