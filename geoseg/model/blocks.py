"""Building blocks of the U-Net family.

Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Padding = Literal["same", "valid"]
Norm = Literal["none", "batch"]

KERNEL = 3
_SMALL_VALUES = 20_480


class Conv2d(nn.Conv2d):
    """A convolution that rounds alike for any size of input and any number of threads.

    On a CPU torch leaves most convolutions to oneDNN, but computes one image of up to 20,480 values, and a 1 x 1 kernel
    when there is one thread, in another order of sums: the last bits of a pixel would depend on the window it lies in.
    Two images always go to oneDNN, and so does a dilated kernel (``use_mkldnn`` in ATen/native/Convolution.cpp of torch
    2.13); 1 x 1 has nothing to dilate.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=2 if kernel_size == 1 else 1, **options)

    def forward(self, features_bchw: Tensor) -> Tensor:
        """See ``nn.Conv2d``."""
        return _never_small(super().forward, features_bchw)


class UpConv2d(nn.ConvTranspose2d):
    """The up-convolution by 2, as steady as ``Conv2d``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)

    def forward(self, features_bchw: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See ``nn.ConvTranspose2d``."""
        assert output_size is None
        return _never_small(super().forward, features_bchw)


def _never_small(forward: Callable[[Tensor], Tensor], features_bchw: Tensor) -> Tensor:
    if len(features_bchw) == 1 and features_bchw.numel() <= _SMALL_VALUES and features_bchw.device.type == "cpu":
        return forward(features_bchw.expand(2, -1, -1, -1))[:1]
    return forward(features_bchw)


class DoubleConv(nn.Sequential):
    """Two 3 x 3 convolutions, each with an optional batch norm and a ReLU (Ronneberger et al. 2015, section 2).

    With ``padding="valid"`` the output is 4 pixels smaller than the input in either direction.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm, padding: Padding) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(
                Conv2d(
                    channels,
                    out_channels,
                    KERNEL,
                    padding=KERNEL // 2 if padding == "same" else 0,
                    bias=norm == "none",
                )
            )
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)

    @property
    def reach(self) -> int:
        """Pixels of context on each side that an output pixel sees, from the kernels of the layers."""
        return sum(conv.kernel_size[0] // 2 for conv in self if isinstance(conv, nn.Conv2d))


def center_crop(features_bchw: Tensor, like_bchw: Tensor) -> Tensor:
    """The centre of ``features_bchw``, as many rows and columns as ``like_bchw`` has (the paper's "copy and crop")."""
    rows = features_bchw.shape[-2] - like_bchw.shape[-2]
    cols = features_bchw.shape[-1] - like_bchw.shape[-1]
    if rows == 0 and cols == 0:
        return features_bchw
    return features_bchw[..., rows // 2 : rows // 2 + like_bchw.shape[-2], cols // 2 : cols // 2 + like_bchw.shape[-1]]


class UpBlock(nn.Module):
    """Up-convolution by 2, the skip copied (and cropped if need be) beside it, then a double convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm, padding: Padding) -> None:
        super().__init__()
        self.up = UpConv2d(in_channels, out_channels)
        self.convs = DoubleConv(2 * out_channels, out_channels, norm=norm, padding=padding)

    def forward(self, deep_bchw: Tensor, skip_bchw: Tensor) -> Tensor:
        """Features at twice the resolution of ``deep_bchw``, joined with ``skip_bchw``."""
        raised_bchw = self.up(deep_bchw)
        out: Tensor = self.convs(torch.cat([center_crop(skip_bchw, raised_bchw), raised_bchw], dim=1))
        return out


def folded(convs: DoubleConv) -> DoubleConv:
    """The same function with each batch norm folded into the convolution before it; for evaluation only."""
    layers: list[nn.Module] = []
    for layer in convs:
        if isinstance(layer, nn.BatchNorm2d):
            conv = layers.pop()
            assert isinstance(conv, nn.Conv2d)
            layers.append(fuse_conv_bn_eval(conv, layer))
        else:
            layers.append(layer)
    plain = DoubleConv.__new__(DoubleConv)
    nn.Sequential.__init__(plain, *layers)
    return plain
