"""Building blocks of the U-Net family.

Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Padding = Literal["same", "valid"]
Norm = Literal["none", "batch"]
Resampling = Literal["bilinear", "nearest"]

KERNEL = 3
_SMALL_VALUES = 20_480
_CONVS, NORMS = (nn.Conv2d, nn.Conv3d), (nn.BatchNorm2d, nn.BatchNorm3d)


class Conv2d(nn.Conv2d):
    """A convolution that rounds alike for any size of input and any number of threads.

    On a CPU torch leaves most convolutions to oneDNN, but computes one image of up to 20,480 values, and a 1 x 1 kernel
    when there is one thread, in another order of sums: the last bits of a pixel would depend on the window it lies in.
    Two images always go to oneDNN, and so does a dilated kernel (``use_mkldnn`` in ATen/native/Convolution.cpp of torch
    2.13); 1 x 1 has nothing to dilate.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=2 if kernel_size == 1 else 1, **options)
        self.pad("same")

    def pad(self, padding: Padding) -> None:
        """Keep the size of what comes in, or compute no pixel that sees beyond it."""
        self.padding = tuple(size // 2 if padding == "same" and size % 2 else 0 for size in self.kernel_size)

    def forward(self, features_bchw: Tensor) -> Tensor:
        """See ``nn.Conv2d``; computed in the dtype of the weights."""
        return never_small(super().forward, like_weights(features_bchw, self.weight))


class Head(Conv2d):
    """The 1 x 1 convolution to the logits; it stays in float32 where the rest of a network is in less."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)


class UpConv2d(nn.ConvTranspose2d):
    """The up-convolution by 2, as steady as ``Conv2d``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)

    def forward(self, features_bchw: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See ``nn.ConvTranspose2d``."""
        assert output_size is None
        return never_small(super().forward, features_bchw)


def never_small(forward: Callable[[Tensor], Tensor], features_bchw: Tensor) -> Tensor:
    """What ``forward`` makes of the features, in the order of sums that it has for large ones."""
    num_values = features_bchw.shape[:4].numel()  # as torch counts: of a volume, those of one column
    if len(features_bchw) == 1 and num_values <= _SMALL_VALUES and features_bchw.device.type == "cpu":
        return forward(features_bchw.expand(2, *features_bchw.shape[1:]))[:1]
    return forward(features_bchw)


def like_weights(features: Tensor, weights: Tensor) -> Tensor:
    """Features in the dtype of a layer's weights, unless autocast chooses one."""
    if features.dtype == weights.dtype or torch.is_autocast_enabled(features.device.type):
        return features
    return features.to(weights.dtype)


class UnevenError(ValueError):
    """Features cannot be halved, since a side has an odd number of pixels."""


def check_even(features_bchw: Tensor) -> None:
    """Raise UnevenError for a side that is odd."""
    if features_bchw.shape[-1] % 2 or features_bchw.shape[-2] % 2:
        raise UnevenError(f"{tuple(features_bchw.shape[-2:])}")


class Pool(nn.MaxPool2d):
    """Max pooling by 2. Raises UnevenError for a side that is odd."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, features_bchw: Tensor) -> Tensor:
        """See ``nn.MaxPool2d``."""
        check_even(features_bchw)
        pooled_bchw: Tensor = super().forward(features_bchw)
        return pooled_bchw


class UpsampleNearest(nn.Module):
    """Each row and column twice."""

    def forward(self, features_bchw: Tensor) -> Tensor:
        """Features (b, c, 2 h, 2 w)."""
        raised_bchw: Tensor = F.interpolate(features_bchw, scale_factor=2.0, mode="nearest")
        return raised_bchw


class UpsampleBilinear(nn.Module):
    """``factor`` times the rows and columns (a power of two), weighted between the centres of pixels.

    As ``F.interpolate`` without ``align_corners`` has it, but each product and sum is rounded by itself, so that the last
    bit of a pixel is the same in any window. With valid padding the half pixels outside the outermost centres are left
    out; with same padding they repeat the border.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self._repeated = 1

    def pad(self, padding: Padding) -> None:
        """See ``Conv2d.pad``."""
        self._repeated = 1 if padding == "same" else 0

    def forward(self, features_bchw: Tensor) -> Tensor:
        """Features (b, c, ``factor`` h, ``factor`` w), fewer by ``factor`` with valid padding."""
        rim = self._repeated * self.factor // 2
        if rim:
            features_bchw = F.pad(features_bchw, (1, 1, 1, 1), mode="replicate")
        features_bchw = self._between(self._between(features_bchw, -2), -1)
        rows, cols = features_bchw.shape[-2:]
        return features_bchw[..., rim : rows - rim, rim : cols - rim]

    def _between(self, features_bchw: Tensor, axis: int) -> Tensor:
        """``factor`` steps along an axis from each pixel's centre to the next one's."""
        steps = features_bchw.shape[axis] - 1
        before, after = features_bchw.narrow(axis, 0, steps), features_bchw.narrow(axis, 1, steps)
        weights = [(2 * step + 1) / (2 * self.factor) for step in range(self.factor)]
        between = torch.stack([before * (1 - weight) + after * weight for weight in weights], axis)
        return between.flatten(axis - 1, axis)


class Sigmoid(nn.Module):
    """1 / (1 + exp(-x)), which rounds alike for any number of values; ``torch.sigmoid`` rounds the last few otherwise."""

    def forward(self, features_bchw: Tensor) -> Tensor:
        """Values from 0 to 1, computed in float32 at least and given in the dtype of the features."""
        exact = torch.promote_types(features_bchw.dtype, torch.float32)
        return (1 / (torch.exp(-features_bchw.to(exact)) + 1)).to(features_bchw.dtype)


class Subsample(nn.Module):
    """Every second row and column: those that a 3 x 3 convolution of stride 2 beside it is centred on."""

    def __init__(self) -> None:
        super().__init__()
        self._first = 0

    def pad(self, padding: Padding) -> None:
        """See ``Conv2d.pad``."""
        self._first = 1 if padding == "valid" else 0

    def forward(self, features_bchw: Tensor) -> Tensor:
        """Features (b, c, h / 2, w / 2), one fewer with valid padding. Raises UnevenError for a side that is odd."""
        check_even(features_bchw)
        rows, cols = (size - self._first for size in features_bchw.shape[-2:])
        return features_bchw[..., self._first : rows : 2, self._first : cols : 2]


class Downsample(nn.Module):
    """Half the rows and columns: the mean of 2 x 2 pixels (``bilinear``) or the first of them (``nearest``).

    As ``F.interpolate`` by 1/2 has it, but in sums of two, so that the last bit of a pixel is the same in any window.
    """

    def __init__(self, resampling: Resampling) -> None:
        super().__init__()
        self.resampling = resampling

    def forward(self, image_bkhw: Tensor) -> Tensor:
        """Image (b, k, h / 2, w / 2). Raises UnevenError for a side that is odd."""
        check_even(image_bkhw)
        if self.resampling == "nearest":
            return image_bkhw[..., ::2, ::2]
        rows = image_bkhw[..., ::2, :] + image_bkhw[..., 1::2, :]
        return (rows[..., ::2] + rows[..., 1::2]) * 0.25


class Trim(nn.Module):
    """With valid padding, takes ``pixels`` off each side that the layers behind it have no use for."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.pad("same")

    def pad(self, padding: Padding) -> None:
        """See ``Conv2d.pad``."""
        self._cut = self.pixels if padding == "valid" else 0

    def forward(self, image_bkhw: Tensor) -> Tensor:
        """The image (b, k, h - 2 ``pixels``, w - 2 ``pixels``)."""
        rows, cols = (size - self._cut for size in image_bkhw.shape[-2:])
        return image_bkhw[..., self._cut : rows, self._cut : cols]


class DoubleConv(nn.Sequential):
    """Two 3 x 3 convolutions, each with an optional batch norm and a ReLU (Ronneberger et al. 2015, section 2).

    With valid padding the output is 4 pixels smaller than the input in either direction.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(Conv2d(channels, out_channels, KERNEL, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


def contracting_path(in_channels: int, widths: Sequence[int], *, norm: Norm) -> nn.ModuleList:
    """A double convolution for each level, from the image down."""
    return nn.ModuleList(
        DoubleConv(before, after, norm=norm) for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
    )


class ResidualUnit(nn.Module):
    """Pre-activated residual unit: (norm, ReLU, 3 x 3) twice, and the input by 1 x 1 added (Zhang et al. 2018, fig. 2).

    ``stride`` 2 halves the features in the first convolution; ``first`` leaves out the norm and ReLU before it, since
    what comes in is the image.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: Norm, stride: int = 1, first: bool = False
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *([] if first else _activation(in_channels, norm)),
            Conv2d(in_channels, out_channels, KERNEL, stride=stride, bias=norm == "none"),
            *_activation(out_channels, norm),
            Conv2d(out_channels, out_channels, KERNEL),
        )
        self.shortcut = nn.Sequential(
            Subsample() if stride == 2 else nn.Identity(),
            Conv2d(in_channels, out_channels, 1, bias=norm == "none"),
            *([nn.BatchNorm2d(out_channels)] if norm == "batch" else []),
        )

    def forward(self, features_bchw: Tensor) -> Tensor:
        """Features (b, ``out_channels``, h / ``stride``, w / ``stride``)."""
        return added(self.convs(features_bchw), self.shortcut(features_bchw))


def _activation(channels: int, norm: Norm) -> list[nn.Module]:
    # Not in place: the shortcut takes the same features.
    return [*([nn.BatchNorm2d(channels)] if norm == "batch" else []), nn.ReLU()]


class UpBlock(nn.Module):
    """Up-convolution by 2, the skip copied (and cropped if need be) beside it, then a double convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.up = UpConv2d(in_channels, out_channels)
        self.convs = DoubleConv(2 * out_channels, out_channels, norm=norm)

    def forward(self, deep_bchw: Tensor, skip_bchw: Tensor) -> Tensor:
        """Features at twice the resolution of ``deep_bchw``, joined with ``skip_bchw``."""
        out: Tensor = self.convs(concat(skip_bchw, self.up(deep_bchw)))
        return out


class AttentionGate(nn.Module):
    """An additive attention gate (Oktay et al. 2018, figure 2 and equations 1 and 2).

    The skip at half its resolution and the deeper features are summed; one weight for each of these pixels, raised to the
    skip's resolution, scales the skip.
    """

    def __init__(self, skip_channels: int, deep_channels: int, *, norm: Norm) -> None:
        super().__init__()
        between = max(1, skip_channels // 2)
        self.of_skip = Conv2d(skip_channels, between, 2, stride=2, bias=False)
        self.of_deep = Conv2d(deep_channels, between, 1)
        self.weigh = nn.Sequential(nn.ReLU(inplace=True), Conv2d(between, 1, 1), Sigmoid(), UpsampleBilinear())
        self.out = nn.Sequential(
            Conv2d(skip_channels, skip_channels, 1), *([nn.BatchNorm2d(skip_channels)] if norm == "batch" else [])
        )

    def forward(self, skip_bchw: Tensor, deep_bchw: Tensor) -> Tensor:
        """The skip (b, ``skip_channels``, h, w) with what the deeper features did not ask for held back."""
        weights_b1hw = self.weigh(added(self.of_skip(skip_bchw), self.of_deep(deep_bchw)))
        gated: Tensor = self.out(scaled(skip_bchw, weights_b1hw))
        return gated


def concat(*features_bchw: Tensor) -> Tensor:
    """Features beside each other, each cropped to the centre that all have (the paper's "copy and crop")."""
    return torch.cat(cropped(features_bchw), dim=1)


def added(first_bchw: Tensor, second_bchw: Tensor) -> Tensor:
    """The sum on the centre that both have, in the dtype of the first."""
    first_bchw, second_bchw = cropped((first_bchw, second_bchw))
    return first_bchw + second_bchw.to(first_bchw.dtype)


def scaled(features_bchw: Tensor, weights_b1hw: Tensor) -> Tensor:
    """The product on the centre that both have."""
    features_bchw, weights_b1hw = cropped((features_bchw, weights_b1hw))
    return features_bchw * weights_b1hw


def cropped(features_bchw: Sequence[Tensor]) -> list[Tensor]:
    """Each cropped to the rows and columns in the centre that all have."""
    rows, cols = (min(one.shape[axis] for one in features_bchw) for axis in (-2, -1))
    cropped = []
    for one in features_bchw:
        top, left = (one.shape[-2] - rows) // 2, (one.shape[-1] - cols) // 2
        cropped.append(one[..., top : top + rows, left : left + cols])
    return cropped


def fold_norms(network: nn.Module) -> None:
    """Fold each batch norm that follows a convolution into it, in place; for evaluation only.

    Networks from outside are left alone: what follows what is not in their lists of layers, but in their code.
    """
    if getattr(network, "from_outside", False):
        return
    for child in list(network.children()):
        fold_norms(child)
    if not isinstance(network, nn.Sequential):
        return
    layers: list[nn.Module] = []
    for layer in network:
        if isinstance(layer, NORMS) and layers and isinstance(layers[-1], _CONVS):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    if len(layers) < len(network):
        del network[:]
        network.extend(layers)
