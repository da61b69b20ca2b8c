"""From a random generator to one flip, turn, scale and light for a chip, and from chips to chips that look so.

Legend of axes: b batch, k bands (of a stack those of one date after the other), t dates, h rows, w columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, FiniteFloat, field_validator
from torch import Tensor

from geoseg.config import Section

_ROWS_TO_COLS = (-2, -1)
_Share = Annotated[FiniteFloat, Field(ge=0, lt=1)]


class AugmentConfig(Section):
    """How much chips may differ from what was imaged; the defaults turn and flip them alone.

    ``flips_and_turns``: each of the eight ways to lay a chip, equally often. ``scale``: how many times larger the ground
    looks, from and to, evenly in its logarithm. ``brightness``: largest shift of all bands, as a share of the range of raw
    values. ``contrast``: largest relative change of the distance to the mean of the normalisation. ``color``: largest
    relative gain or loss of single bands. ``blur``: largest standard deviation of a Gaussian blur, in pixels of the chip;
    ``noise``: of normal noise, as a share of the range of raw values. Half of the chips stay sharp, half without noise.
    """

    flips_and_turns: bool = True
    scale: tuple[FiniteFloat, FiniteFloat] = (1.0, 1.0)
    brightness: _Share = 0.0
    contrast: _Share = 0.0
    color: _Share = 0.0
    blur: Annotated[FiniteFloat, Field(ge=0, le=4)] = 0.0
    noise: _Share = 0.0

    @field_validator("scale")
    @classmethod
    def _scale_rises(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0.25 <= scale[0] <= scale[1] <= 4:
            raise ValueError(
                f"scale must be two factors of 0.25 to 4, the smaller first, for example 0.8 and 1.25, got {scale[0]} and "
                f"{scale[1]}"
            )
        return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What one chip is made to look like.

    It is mirrored left to right if ``mirrored``, then turned by ``quarter_turns`` against the clock. Ground looks ``scale``
    times as large: whoever reads the chip reads pixels of 1 / ``scale`` the size. ``gains``, one per band, multiply raw values
    from the low end of their range, then ``contrast`` multiplies the distance to the band's mean, then ``brightness``, a
    share of the range, is added. Before all that it is blurred with ``blur`` (standard deviation in pixels), and after it
    gets noise of the standard deviation ``noise`` (a share of the range) from the seed ``noise_seed``.
    """

    mirrored: bool = False
    quarter_turns: int = 0
    scale: float = 1.0
    gains: tuple[float, ...]
    contrast: float = 1.0
    brightness: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0

    def light(
        self, mean: Sequence[float], value_range: tuple[float, float]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The factors and then the summands by which raw values of each band change; 1 and 0 for no change."""
        low, high = value_range
        factors = tuple(gain * self.contrast for gain in self.gains)
        summands = tuple(
            low * (1 - gain) * self.contrast + middle * (1 - self.contrast) + self.brightness * (high - low)
            for gain, middle in zip(self.gains, mean, strict=True)
        )
        return factors, summands


def draw_augmentation(config: AugmentConfig, rng: np.random.Generator, num_bands: int) -> Augmentation:
    """An augmentation for ``num_bands`` bands, of a stack those of one date.

    It takes ``7 + num_bands`` numbers from the generator whatever the config, so what is drawn afterwards stays the same.
    """
    turn, scale, contrast, brightness, *gains = rng.random(4 + num_bands).tolist()
    blur, noise, noise_seed = rng.random(3).tolist()
    way = int(8 * turn) if config.flips_and_turns else 0
    smallest, largest = config.scale
    return Augmentation(
        mirrored=way >= 4,
        quarter_turns=way % 4,
        scale=smallest * (largest / smallest) ** scale,
        gains=tuple(1 + config.color * (2 * gain - 1) for gain in gains),
        contrast=1 + config.contrast * (2 * contrast - 1),
        brightness=config.brightness * (2 * brightness - 1),
        blur=config.blur * max(0.0, 2 * blur - 1),
        noise=config.noise * max(0.0, 2 * noise - 1),
        noise_seed=int(noise_seed * (1 << 53)) if config.noise else 0,
    )


def turned(values: Tensor, augmentation: Augmentation) -> Tensor:
    """The values (..., h, w) mirrored and turned; of any dtype that torch can flip."""
    if augmentation.mirrored:
        values = values.flip(-1)
    return torch.rot90(values, augmentation.quarter_turns, _ROWS_TO_COLS)


@dataclass(frozen=True, slots=True)
class Chips:
    """A batch of square chips, all on one device.

    Raw pixels (b, k, h, w) of any real dtype; labels uint8 (b, h, w); validity, True = data, (b, h, w) or of a stack
    (b, t, h, w); weights of pixels, float (b, h, w), None for equal ones.
    """

    pixels_bkhw: Tensor
    labels_bhw: Tensor
    valid: Tensor
    weights_bhw: Tensor | None = None

    def to(self, device: torch.device) -> Chips:
        """The same chips on a device."""
        weights_bhw = self.weights_bhw
        return Chips(
            self.pixels_bkhw.to(device, non_blocking=True),
            self.labels_bhw.to(device, non_blocking=True),
            self.valid.to(device, non_blocking=True),
            None if weights_bhw is None else weights_bhw.to(device, non_blocking=True),
        )


def augmented(
    chips: Chips, augmentations: Sequence[Augmentation], *, mean: Sequence[float], value_range: tuple[float, float]
) -> Chips:
    """The chips, each by its own augmentation, with float32 pixels.

    ``mean`` and ``value_range`` are those of the bundle, in raw values. A turn moves pixels and all that belongs to them
    and changes no value. Light is a function of one pixel alone and a blur is the mean of valid pixels alone, so what is
    invalid has no say in either; both are the same for all dates of a stack, whose differences are what such a network learns
    from. Where any chip's light changes, values stay within ``value_range``, as a sensor's would.
    """
    pixels_bkhw = chips.pixels_bkhw.to(torch.float32)
    if pixels_bkhw.shape[-1] != pixels_bkhw.shape[-2]:
        raise ValueError(f"only square chips can be turned, got {tuple(pixels_bkhw.shape[-2:])} pixels")
    if len(augmentations) != len(pixels_bkhw):
        raise ValueError(f"each chip needs its augmentation, got {len(augmentations)} for {len(pixels_bkhw)} chips")
    pixels_bkhw, valid = (_each_turned(one, augmentations) for one in (pixels_bkhw, chips.valid))
    sharp = [
        _blurred(one, valid_hw, augmentation.blur)
        for one, valid_hw, augmentation in zip(pixels_bkhw, valid, augmentations, strict=True)
    ]
    lit_bkhw = _lit(torch.stack(sharp), augmentations, mean, value_range)
    return Chips(
        _noisy(lit_bkhw, augmentations, value_range),
        _each_turned(chips.labels_bhw, augmentations),
        valid,
        None if chips.weights_bhw is None else _each_turned(chips.weights_bhw, augmentations),
    )


def _each_turned(values: Tensor, augmentations: Sequence[Augmentation]) -> Tensor:
    return torch.stack([turned(one, augmentation) for one, augmentation in zip(values, augmentations, strict=True)])


def _blurred(pixels_khw: Tensor, valid: Tensor, sigma: float) -> Tensor:
    """The pixels of a chip blurred, of a stack those of each date; each becomes the weighted mean of the valid ones around it."""
    if not sigma:
        return pixels_khw
    valid_thw = valid.reshape(-1, 1, *valid.shape[-2:]).to(torch.float32)
    pixels_tkhw = pixels_khw.reshape(len(valid_thw), -1, *valid.shape[-2:])
    reach = math.ceil(3 * sigma)
    weights_n = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=valid.device) / sigma) ** 2)
    values = torch.cat([torch.where(valid_thw > 0, pixels_tkhw, 0), valid_thw], 1).flatten(0, 1)[:, None]
    for shape in ((-1, 1), (1, -1)):
        values = torch.nn.functional.conv2d(values, weights_n.reshape(1, 1, *shape), padding="same")
    values = values[:, 0].reshape(len(valid_thw), -1, *valid.shape[-2:])
    sums_tkhw, weight_thw = values[:, :-1], values[:, -1:]
    blurred_tkhw = torch.where(valid_thw > 0, sums_tkhw / weight_thw.clamp_min(1e-6), pixels_tkhw)
    return blurred_tkhw.reshape(pixels_khw.shape)


def _noisy(pixels_bkhw: Tensor, augmentations: Sequence[Augmentation], value_range: tuple[float, float]) -> Tensor:
    """The chips with noise; drawn on the CPU, so that it is the same on any device."""
    if not any(one.noise for one in augmentations):
        return pixels_bkhw
    low, high = value_range
    each = []
    for one in augmentations:
        generator = torch.Generator().manual_seed(one.noise_seed)
        each.append(torch.randn(pixels_bkhw.shape[1:], generator=generator) * (one.noise * (high - low)))
    return (pixels_bkhw + torch.stack(each).to(pixels_bkhw.device)).clamp_(*value_range)


def _lit(
    pixels_bkhw: Tensor,
    augmentations: Sequence[Augmentation],
    mean: Sequence[float],
    value_range: tuple[float, float],
) -> Tensor:
    factors_bk, summands_bk = np.array([one.light(mean, value_range) for one in augmentations]).swapaxes(0, 1)
    if (factors_bk == 1).all() and (summands_bk == 0).all():
        return pixels_bkhw
    dates, rest = divmod(pixels_bkhw.shape[1], factors_bk.shape[1])
    if rest:
        raise ValueError(
            f"the chips' bands must be those of one date or more, got {pixels_bkhw.shape[1]} of {factors_bk.shape[1]}"
        )
    factors, summands = (
        torch.from_numpy(np.tile(of_date, dates)).to(pixels_bkhw.device, torch.float32)[..., None, None]
        for of_date in (factors_bk, summands_bk)
    )
    return torch.addcmul(summands, pixels_bkhw, factors).clamp_(*value_range)
