"""What the values of a label array mean: a class, one of several, or nothing known. Knows neither torch nor rasterio.

A source that labels buildings alone says of a pixel beside them that it is no building: background or road. Such a pixel
has a code of its own for the set of classes that it may belong to, so that "not labelled" never becomes "background".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoseg.errors import ConfigError

UNLABELLED = 255


@dataclass(frozen=True, slots=True)
class LabelCodes:
    """The codes (uint8) of labels with classes 0 (background) to ``num_classes - 1``.

    A code below ``num_classes`` is that class, 255 says nothing, and 254, 253 and so on are the ``sets`` in their order: the
    pixel belongs to one of the classes of the set.
    """

    num_classes: int
    sets: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes + len(self.sets) > UNLABELLED:
            raise ConfigError(f"{self.num_classes} classes and {len(self.sets)} sets of them are more than 255 codes")

    @classmethod
    def for_sources(cls, num_classes: int, labelled: Iterable[Iterable[int]]) -> LabelCodes:
        """The codes for sources each of which labels some of the classes (its codes above 0)."""
        sets = {_beside(num_classes, known) for known in labelled}
        return cls(num_classes, tuple(sorted(one for one in sets if len(one) > 1)))

    def background_of(self, labelled: Iterable[int]) -> int:
        """The code of a pixel of which a source that labels the classes ``labelled`` says that it is none of them."""
        beside = _beside(self.num_classes, labelled)
        return 0 if len(beside) == 1 else UNLABELLED - 1 - self.sets.index(beside)

    @property
    def possible(self) -> npt.NDArray[np.bool_]:
        """Whether a pixel of a code may be of a class, (256, class); True for codes that do not occur."""
        table = np.ones((256, self.num_classes), np.bool_)
        table[: self.num_classes] = np.eye(self.num_classes, dtype=np.bool_)
        for index, classes in enumerate(self.sets):
            table[UNLABELLED - 1 - index] = np.isin(np.arange(self.num_classes), classes)
        return table


def _beside(num_classes: int, labelled: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(range(num_classes)) - (set(labelled) - {0})))
