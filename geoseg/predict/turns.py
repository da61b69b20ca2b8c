"""Scenes and their sizes in, the order in which a run works on them out: no scene waits for one that is far larger."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median_low

from geoseg.raster.scene import SceneRef
from geoseg.raster.versions import Versions
from geoseg.raster.window import Window

_TURN_BYTES = 64 << 20  # blocks under the edge of a turn may be read twice; of so many bytes they are a few percent
_LARGE = 8  # times the median
_MOST_TURNS = 64  # of one scene; each reads its header
_LARGE_AT_ONCE = 4  # so that large scenes are published one by one, too
_SMALL_TO_LARGE = 3


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of a scene's windows that are worked through together: part ``index`` of ``count``."""

    ref: SceneRef
    index: int = 0
    count: int = 1

    def num_windows(self, num: int) -> int:
        """How many of a scene's ``num`` windows this turn takes."""
        return num * (self.index + 1) // self.count - num * self.index // self.count

    def share(self, windows: Iterable[Window], num: int) -> Iterator[Window]:
        """Those of a scene's ``num`` windows that this turn takes; each is in one of its turns."""
        return islice(windows, num * self.index // self.count, num * (self.index + 1) // self.count)


def take_turns(refs: Sequence[SceneRef], versions: Versions, *, turn_bytes: int = _TURN_BYTES) -> list[Turn]:
    """All scenes, in turns of at least ``turn_bytes``: small scenes before larger ones, by powers of two of their bytes.

    Scenes that are much larger than most come in several turns, a few scenes at once, one turn for every three times its
    bytes of the others: they go on as well, however many small scenes there are. Where sizes are not known the order stays.
    """
    sizes = [sum(versions.size(uri) for uri in ref.uris) for ref in refs]
    turn_bytes = max(turn_bytes, _LARGE * median_low(sizes)) if sizes else turn_bytes
    in_order = sorted(zip(refs, sizes, strict=True), key=lambda each: each[1].bit_length())
    large = _alternating([_cut(ref, size, turn_bytes) for ref, size in in_order if size > turn_bytes])
    turns, since = list[Turn](), 0
    for ref, size in in_order:
        if size <= turn_bytes:
            turns.append(Turn(ref))
            since += size
            if since >= _SMALL_TO_LARGE * turn_bytes:
                turns += islice(large, 1)
                since = 0
    return [*turns, *large]


def _cut(ref: SceneRef, size: int, turn_bytes: int) -> list[Turn]:
    count = 1 if ref.sums else min(_MOST_TURNS, -(-size // turn_bytes))  # each turn would read the whole file
    return [Turn(ref, index, count) for index in range(count)]


def _alternating(scenes: Iterable[list[Turn]]) -> Iterator[Turn]:
    """The turns of scenes one after the other in each of a few scenes; where one ends the next begins."""
    waiting = iter(scenes)
    at_work = deque(islice(waiting, _LARGE_AT_ONCE))
    while at_work:
        turns = at_work.popleft()
        yield turns[0]
        at_work.extend([turns[1:]] if turns[1:] else islice(waiting, 1))
