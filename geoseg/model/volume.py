"""Building blocks for stacks of dates: volumes (band, date, row, col) in, volumes out.

Dates are few and always there in full, so along them the padding is ``same`` with either padding of the ground, and a level
halves them only where their number is even. Legend of axes: b batch, k input channels, c channels, t dates, h rows, w
columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoseg.model.blocks import Norm, Padding, added, check_even, cropped, like_weights, never_small


class Conv3d(nn.Conv3d):
    """A convolution over dates and ground, as steady as ``blocks.Conv2d``; the kernel is as wide along each axis.

    One of 1 x 1 x 1 is computed as that of an image, since torch rounds several volumes otherwise than one.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.pad("same")

    def pad(self, padding: Padding) -> None:
        """See ``blocks.Conv2d.pad``."""
        beyond = self.kernel_size[0] // 2
        ground = beyond if padding == "same" else 0
        self.padding = (beyond, ground, ground)

    def forward(self, features_bcthw: Tensor) -> Tensor:
        """See ``nn.Conv3d``; computed in the dtype of the weights."""
        features_bcthw = like_weights(features_bcthw, self.weight)
        if self.kernel_size[0] == 1:
            num, _, dates, rows, cols = features_bcthw.shape
            out_bchw = never_small(self._of_pixels, features_bcthw.flatten(2, 3))
            return out_bchw.reshape(num, self.out_channels, dates, rows, cols)
        return never_small(super().forward, features_bcthw)

    def _of_pixels(self, features_bchw: Tensor) -> Tensor:
        return F.conv2d(features_bchw, self.weight[:, :, 0], self.bias, dilation=2)


class Head3d(Conv3d):
    """The 1 x 1 x 1 convolution to the logits; as ``blocks.Head`` it stays in float32."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)


class DownConv3d(nn.Conv3d):
    """A convolution that halves the ground, and the dates when ``factor`` is 2. Raises UnevenError for a side that is odd."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__(in_channels, out_channels, (factor, 2, 2), stride=(factor, 2, 2))

    def forward(self, features_bcthw: Tensor) -> Tensor:
        """See ``nn.Conv3d``."""
        check_even(features_bcthw)
        return never_small(super().forward, features_bcthw)


class UpConv3d(nn.ConvTranspose3d):
    """The up-convolution by 2 on the ground, and by ``factor`` along the dates."""

    def __init__(self, in_channels: int, out_channels: int, factor: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, (factor, 2, 2), stride=(factor, 2, 2), bias=bias)

    def forward(self, features_bcthw: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See ``nn.ConvTranspose3d``."""
        assert output_size is None
        return never_small(super().forward, features_bcthw)


class Pool3d(nn.MaxPool3d):
    """Max pooling by 2 on the ground, and by ``factor`` along the dates. Raises UnevenError for a side that is odd."""

    def __init__(self, factor: int) -> None:
        super().__init__((factor, 2, 2))

    def forward(self, features_bcthw: Tensor) -> Tensor:
        """See ``nn.MaxPool3d``."""
        check_even(features_bcthw)
        pooled_bcthw: Tensor = super().forward(features_bcthw)
        return pooled_bcthw


class DoubleConv3d(nn.Sequential):
    """Two 3 x 3 x 3 convolutions, each with an optional batch norm and a ReLU, to ``between`` and ``out_channels``."""

    def __init__(self, in_channels: int, between: int, out_channels: int, *, norm: Norm) -> None:
        layers: list[nn.Module] = []
        for before, after in ((in_channels, between), (between, out_channels)):
            layers += [Conv3d(before, after, 3), *norm_of(after, norm), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class ResidualStage(nn.Module):
    """``num_convs`` convolutions of 5 x 5 x 5 with a PReLU each, what came in added before the last PReLU.

    Milletari et al. 2016, section 2 and figure 2. Where what comes in has another number of channels (the image), a
    1 x 1 x 1 convolution gives it the stage's; a single one is added to each.
    """

    def __init__(self, in_channels: int, out_channels: int, num_convs: int, *, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_convs):
            conv = Conv3d(out_channels if index else in_channels, out_channels, 5)
            layers += [nn.PReLU(out_channels)] if index else []
            layers += [conv, *norm_of(out_channels, norm)]
        self.convs = nn.Sequential(*layers)
        same = in_channels in (1, out_channels)
        self.shortcut = nn.Identity() if same else Conv3d(in_channels, out_channels, 1)
        self.activation = nn.PReLU(out_channels)

    def forward(self, features_bcthw: Tensor) -> Tensor:
        """Features (b, ``out_channels``, t, h, w)."""
        out: Tensor = self.activation(added(self.convs(features_bcthw), self.shortcut(features_bcthw)))
        return out


def norm_of(channels: int, norm: Norm) -> list[nn.Module]:
    """A batch norm, or nothing."""
    return [nn.BatchNorm3d(channels)] if norm == "batch" else []


def date_factors(num_dates: int, depth: int) -> list[int]:
    """By how much each of ``depth`` levels, from the image down, divides the number of dates: 2 while it is even, then 1."""
    factors = []
    for _ in range(depth):
        factors.append(1 if num_dates % 2 else 2)
        num_dates //= factors[-1]
    return factors


def volume(image_bkhw: Tensor, num_dates: int) -> Tensor:
    """Channels, date after date, as a volume (b, channels of a date, t, h, w), channels last in memory."""
    num, channels, rows, cols = image_bkhw.shape
    return (
        image_bkhw.reshape(num, num_dates, channels // num_dates, rows, cols)
        .transpose(1, 2)
        .contiguous(memory_format=torch.channels_last_3d)
    )


def mean_over_dates(logits_bcthw: Tensor, image_bkthw: Tensor) -> Tensor:
    """The mean (b, c, h, w) of the logits of those dates that are valid there: the last channel of the image tells them.

    Where none is, the result is 0 and means nothing. Summed date after date, so that each pixel rounds alike.
    """
    logits_bcthw, image_bkthw = cropped((logits_bcthw, image_bkthw))
    valid_b1thw = image_bkthw[:, -1:]
    weighted_bcthw = logits_bcthw * valid_b1thw
    total_bchw, num_b1hw = weighted_bcthw[:, :, 0], valid_b1thw[:, :, 0]
    for date in range(1, weighted_bcthw.shape[2]):
        total_bchw = total_bchw + weighted_bcthw[:, :, date]
        num_b1hw = num_b1hw + valid_b1thw[:, :, date]
    return total_bchw / torch.clamp(num_b1hw, min=1.0)
