"""How bright and how rich in contrast imagery is: what a bundle was trained on, and how far from it the pixels of a scene lie.

Legend of axes: k bands, n pixels, s steps; m measures, which are the values and the differences to the right neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

NUM_STEPS = 32
NUM_MEASURES = 2
_WHOLE = 10_000
_PER_DOUBLING = 4  # steps of differences
_MOST_KNOWN = 0.9
_LEAST_SPREAD = 0.25 / NUM_STEPS  # nothing that lies closer together is told apart


def _as_numbers(told: Any) -> Any:
    return told.split() if isinstance(told, str) else told


Shares = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(min_length=NUM_STEPS, max_length=NUM_STEPS),
    BeforeValidator(_as_numbers),
    PlainSerializer(lambda shares: " ".join(map(str, shares)), return_type=str),
]


class SceneLight(BaseModel):
    """Histograms of one scene that a bundle was trained on.

    ``values`` and ``contrasts``: of each band the share of pixels, in parts of 10,000, in each of 32 steps, as ``count_light``
    has them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    values: tuple[Shares, ...]
    contrasts: tuple[Shares, ...]

    @classmethod
    def of(cls, source: str, counts_mks: npt.NDArray[np.int64]) -> SceneLight:
        """The histograms of counts; each needs a pixel at least."""
        shares_mks = np.rint(counts_mks * (_WHOLE / counts_mks.sum(2, keepdims=True))).astype(int)
        values, contrasts = ([tuple(shares_s) for shares_s in shares_ks] for shares_ks in shares_mks.tolist())
        return cls(source=source, values=tuple(values), contrasts=tuple(contrasts))


def count_light(
    values_kn: npt.NDArray[Any],
    right_kn: npt.NDArray[Any],
    value_range: tuple[float, float],
    scale: tuple[float, float] | None = None,
) -> npt.NDArray[np.int64]:
    """Pixels (m, k, s) by their value and by its difference to that of their right neighbour; only finite numbers count.

    Values: in 32 equal steps of ``value_range``; those outside it are counted at its ends. Differences: d, in parts of
    1/255 of the range, in step 4 log2(1 + d). ``scale``: the raw values that stand for the ends of the range, where they are
    not those.
    """
    low, high = scale or value_range
    counts_mks = np.zeros((NUM_MEASURES, len(values_kn), NUM_STEPS), np.int64)
    for band, (values_n, right_n) in enumerate(zip(values_kn, right_kn, strict=True)):
        finite_n = np.isfinite(values_n) & np.isfinite(right_n)
        here_n, beside_n = (one[finite_n].astype(np.float64) for one in (values_n, right_n))
        by_value_n = (here_n - low) * (NUM_STEPS / (high - low))
        by_contrast_n = _PER_DOUBLING * np.log2(1 + np.abs(here_n - beside_n) * (255 / (high - low)))
        for measure, steps_n in enumerate((by_value_n, by_contrast_n)):
            places_n = np.clip(steps_n, 0, NUM_STEPS - 1).astype(np.intp)
            counts_mks[measure, band] = np.bincount(places_n, minlength=NUM_STEPS)
    return counts_mks


def novelty(counts_mks: npt.NDArray[np.int64], known: Sequence[SceneLight]) -> float | None:
    """How new a scene's light is to a bundle that was trained on ``known``; None when it has no pixel, or nothing is known.

    The larger one of two: for its values and for its contrasts, the distance to the nearest known scene over the distance
    that nine of ten known scenes stay within to their own nearest. So 1 is about as far as scenes of the training lie from each
    other. The distance of two scenes is the earth mover's distance of their histograms (Rubner et al. 2000; in one dimension
    the area between the cumulated shares), the mean over bands.
    """
    if not known or not counts_mks.sum(2).all():
        return None
    found = [
        _nearest_over_spread(counts_ks, np.array(known_nks, np.float64))
        for counts_ks, known_nks in zip(
            counts_mks, ([one.values for one in known], [one.contrasts for one in known]), strict=True
        )
    ]
    return float(f"{max(found):.6g}")


def _nearest_over_spread(counts_ks: npt.NDArray[np.int64], known_nks: npt.NDArray[np.float64]) -> float:
    """The same of one measure, where n counts known scenes."""
    known_nks = np.cumsum(known_nks / known_nks.sum(2, keepdims=True), 2)
    scene_ks = np.cumsum(counts_ks / counts_ks.sum(1, keepdims=True), 1)
    nearest = float(np.abs(known_nks - scene_ks).mean((1, 2)).min())
    spread = 0.0
    if len(known_nks) > 1:
        apart = np.abs(known_nks[:, None] - known_nks[None]).mean((2, 3))
        np.fill_diagonal(apart, np.inf)
        spread = float(np.quantile(apart.min(1), _MOST_KNOWN))
    return nearest / max(spread, _LEAST_SPREAD)
