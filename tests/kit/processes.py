"""The processes below one that a test started: the only ones that a test may end."""

from __future__ import annotations

from pathlib import Path


def below(pid: int, *, title: str = "") -> list[int]:
    """The ids of all that descend from a process, itself left out; with ``title`` those whose command line holds it."""
    parents: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except (OSError, IndexError):
                continue  # it ended meanwhile
            parents.setdefault(parent, []).append(int(folder.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return [one for one in found if title in titles[one]]
