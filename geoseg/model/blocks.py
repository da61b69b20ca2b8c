"""Building blocks of the U-Net family.

Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Padding = Literal["same", "valid"]
Norm = Literal["none", "batch"]

KERNEL = 3


class DoubleConv(nn.Sequential):
    """Two 3 x 3 convolutions, each with an optional batch norm and a ReLU (Ronneberger et al. 2015, section 2).

    With ``padding="valid"`` the output is 4 pixels smaller than the input in either direction.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm, padding: Padding) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(
                nn.Conv2d(
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
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
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
