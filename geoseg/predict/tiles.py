"""A network from outside at work: tile by tile, each by itself, then put side by side or blended.

Legend of axes: b batch (always one here), k input channels, c classes, h rows, w columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geoseg.model.tiling import Tiling

Run = Callable[[Tensor], Tensor]


def run_tiles(run: Run, image_bkhw: Tensor, tiling: Tiling) -> tuple[Tensor, npt.NDArray[np.bool_] | None]:
    """Logits (class, row, col) of a core on multiples of ``step``, from an image with ``margin`` around it.

    ``run`` gives the logits of one tile. Blended: also at which pixels of the core the classes of tiles above each other and
    side by side differ (axis, row, col).

    Every tile has the same shape, comes alone and is computed in one thread, and each pixel is summed up from the tiles in
    which it lies in the order of the lattice: so no bit depends on the core.
    """
    with _one_thread():
        return (
            _blended(run, image_bkhw, tiling) if tiling.is_blended else (_side_by_side(run, image_bkhw, tiling), None)
        )


def hann(size: int) -> Tensor:
    """Weights (float32) that are never 0, and add up to 1 where two windows overlap by half: sin^2 between the pixels."""
    angles = [math.pi * (place + 0.5) / size for place in range(size)]
    return torch.tensor([math.sin(angle) ** 2 for angle in angles], dtype=torch.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    # What a library rounds may depend on how it shares its work out.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tiles(image_bkhw: Tensor, tiling: Tiling) -> Iterator[tuple[int, int, Tensor]]:
    starts = (range(0, size - tiling.tile + 1, tiling.step) for size in image_bkhw.shape[-2:])
    for top, left in itertools.product(*starts):
        tile_bkhw = image_bkhw[..., top : top + tiling.tile, left : left + tiling.tile]
        yield top, left, tile_bkhw.clone(memory_format=torch.channels_last)


def _side_by_side(run: Run, image_bkhw: Tensor, tiling: Tiling) -> Tensor:
    margin, step = tiling.margin, tiling.step
    core_chw: Tensor | None = None
    for top, left, tile_bkhw in _tiles(image_bkhw, tiling):
        logits_chw = run(tile_bkhw)[0, :, margin : margin + step, margin : margin + step]
        if core_chw is None:
            core_chw = logits_chw.new_empty(len(logits_chw), *(size - 2 * margin for size in image_bkhw.shape[-2:]))
        core_chw[:, top : top + step, left : left + step] = logits_chw
    assert core_chw is not None
    return core_chw


def _blended(run: Run, image_bkhw: Tensor, tiling: Tiling) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    weights = hann(tiling.tile).to(image_bkhw.device)
    weights_hw = weights[:, None] * weights[None, :]
    total_chw: Tensor | None = None
    classes: dict[tuple[int, int], Tensor] = {}
    for top, left, tile_bkhw in _tiles(image_bkhw, tiling):
        logits_chw = run(tile_bkhw)[0]
        if total_chw is None:
            total_chw = logits_chw.new_zeros(len(logits_chw), *image_bkhw.shape[-2:])
        total_chw[:, top : top + tiling.tile, left : left + tiling.tile] += logits_chw * weights_hw
        classes[top, left] = logits_chw.argmax(0).to(torch.uint8).cpu()
    assert total_chw is not None
    rows, cols = (slice(tiling.step, size - tiling.step) for size in total_chw.shape[-2:])
    return total_chw[:, rows, cols], _differ(classes, tiling, image_bkhw.shape[-2:])[:, rows, cols]


def _differ(classes: dict[tuple[int, int], Tensor], tiling: Tiling, shape: torch.Size) -> npt.NDArray[np.bool_]:
    """Where two tiles that overlap by half tell different classes, in the middle half of both along their border."""
    step, half = tiling.step, tiling.step // 2
    middle = slice(half, half + step)
    differ_ahw = np.zeros((2, *shape), np.bool_)
    for (top, left), first in classes.items():
        below, beside = classes.get((top + step, left)), classes.get((top, left + step))
        if below is not None:
            differ = first[step:, middle] != below[:step, middle]
            differ_ahw[0, top + step : top + 2 * step, left + half : left + half + step] = differ.numpy()
        if beside is not None:
            differ = first[middle, step:] != beside[middle, :step]
            differ_ahw[1, top + half : top + half + step, left + step : left + 2 * step] = differ.numpy()
    return differ_ahw
