"""What the tests of promises measured: a line of JSON each in a file, from which the table of the reliability page is made.

``make chaos`` runs those tests and writes the table anew; ``python tests/kit/figures.py FILE PAGE`` writes the table of
PAGE from the lines of FILE.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "GEOSEG_FIGURES"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
_PROMISE = re.compile(r"([RS])(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What ``test`` counted or measured for a promise (R1 to S14), and what was wanted, "" for a figure that has no goal."""

    promise: str
    what: str
    value: str
    goal: str
    test: str

    def __post_init__(self) -> None:
        if not _PROMISE.fullmatch(self.promise):
            raise ValueError(f"promises are R1 to R18 and S1 to S14, got {self.promise!r}")


def note(figure: Figure) -> None:
    """Append a figure to the file that the variable GEOSEG_FIGURES names, if it names one. Several processes may."""
    file = os.environ.get(FILE)
    if file:
        with Path(file).open("a") as lines:
            lines.write(json.dumps(asdict(figure)) + "\n")


def table(figures: Iterable[Figure]) -> str:
    """The figures as a Markdown table, by promise; of one that was noted twice the last counts."""
    last = {(one.promise, one.what, one.test): one for one in figures}
    rows = ["| promise | measured | figure | goal | test |", "|---|---|---:|---|---|"]
    rows += [
        f"| {one.promise} | {one.what} | {one.value} | {one.goal} | `{one.test}` |"
        for one in sorted(last.values(), key=lambda one: (_rank(one.promise), one.test, one.what))
    ]
    return "\n".join(rows)


def _rank(promise: str) -> tuple[str, int]:
    kind, number = _PROMISE.fullmatch(promise).groups()  # type: ignore[union-attr]
    return kind, int(number)


def main(file: str, page: str) -> None:
    """Put the table of ``file`` between the marks of ``page``."""
    made = table(Figure(**json.loads(line)) for line in Path(file).read_text().splitlines())
    before, rest = Path(page).read_text().split(BEGIN)
    _old, after = rest.split(END)
    Path(page).write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
