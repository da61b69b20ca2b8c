"""Tiles: the squares that a network from outside is run on, always of one size and on one lattice. Knows no torch.

Nothing is known of what such a network computes beside its stride and perhaps a margin, so nothing is assumed of how it rounds:
a tile lies where it lies on the work grid and is run by itself, whatever window asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from geoseg.errors import ConfigError

MAX_MARGIN = 544
_BLENDED_TILE = 512
_SMALL_CORE, _LARGE_CORE = 512, 1024


@dataclass(frozen=True, slots=True)
class Tiling:
    """Squares of ``tile`` pixels that begin at every multiple of ``step``, less ``margin``, along both axes.

    Exact: the ``step`` pixels in the middle of a tile count, the ``margin`` around them is context. Blended: tiles overlap by
    half, so that each pixel lies in four of them, those at the border of a scene too.
    """

    tile: int
    step: int
    margin: int
    is_blended: bool


def tiling(stride: int, margin: int | None, tile: int | None = None) -> Tiling:
    """How a network is tiled; ``margin`` None blends. ``tile`` is the wish, in pixels of the work grid.

    By default a core is about twice as wide as the margin or more, so that an exact network costs hardly more than a
    blended one, which computes each pixel four times. Raises ConfigError for a tile that does not suit the network.
    """
    if margin is None:
        side = tile or _BLENDED_TILE
        if side % (2 * stride):
            raise ConfigError(
                f"--tile {side}: tiles overlap by half, and each must begin on a multiple of the network's stride; take a "
                f"multiple of {2 * stride}"
            )
        return Tiling(side, side // 2, side // 2, is_blended=True)
    halo = -(-margin // stride) * stride
    side = tile or (_SMALL_CORE if 2 * margin <= _SMALL_CORE else _LARGE_CORE) + 2 * halo
    core = side - 2 * halo
    if core < stride or core % stride:
        raise ConfigError(
            f"--tile {side}: this network sees {margin} pixels to each side; take {2 * halo} and a multiple of {stride} more"
        )
    return Tiling(side, core, halo, is_blended=False)
