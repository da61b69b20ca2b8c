"""The U-Net of 2015 with a choice of depth, width, norm and padding: images in, logits out.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv:1505.04597. Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from geoseg.errors import ConfigError
from geoseg.model.blocks import Conv2d, DoubleConv, Norm, Padding, UpBlock, folded


class UNet(nn.Module):
    """Contracting path, bottleneck, expanding path and a 1 x 1 convolution to the classes.

    ``depth`` counts the poolings and ``width`` the channels of the first level, doubled at each pooling; the paper's
    network is ``UNet(1, 2, depth=4, width=64, norm="none", padding="valid")``. The padding is no part of the weights:
    with ``padding="same"`` the network trains on any chip whose sides are multiples of ``stride``; with
    ``padding="valid"`` the same weights crop and copy as in the paper and compute no border that is thrown away.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        depth: int = 4,
        width: int = 64,
        norm: Norm = "none",
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        if min(in_channels, depth, width) < 1 or num_classes < 2:
            raise ConfigError(
                "a U-Net needs at least one input channel, one pooling, one channel of width and two classes, "
                f"got in_channels={in_channels} depth={depth} width={width} num_classes={num_classes}"
            )
        widths = [width * int(2**level) for level in range(depth + 1)]
        self.down = nn.ModuleList(
            DoubleConv(before, after, norm=norm, padding=padding)
            for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            UpBlock(2 * after, after, norm=norm, padding=padding) for after in reversed(widths[:-1])
        )
        self.head = Conv2d(width, num_classes, 1)
        self._padding: Padding = padding

    @property
    def depth(self) -> int:
        """The number of poolings."""
        return len(self.up)

    @property
    def stride(self) -> int:
        """Pixels per step of the deepest level: windows must begin and end on multiples of it."""
        return int(2**self.depth)

    @property
    def margin(self) -> int:
        """Pixels of context on every side that reach an output pixel of a core aligned to ``stride``.

        Followed back through the layers for the edge of such a core: a convolution block widens the interval by its
        reach, an up-convolution halves it (rounded outwards), a pooling doubles it.
        """
        reach = 0
        for block in reversed(self.up):
            reach = -(-(reach + cast("UpBlock", block).convs.reach) // 2)
        for level, block in enumerate(reversed(self.down)):
            reach = (2 * reach if level else reach) + cast("DoubleConv", block).reach
        return reach

    @property
    def halo(self) -> int:
        """``margin`` rounded up to ``stride``: the context to read around a core."""
        return -(-self.margin // self.stride) * self.stride

    @property
    def shrinkage(self) -> int:
        """Pixels that valid convolutions take off each side between input and output (92 for the paper's 572 -> 388)."""
        deep = sum(cast("DoubleConv", block).reach * int(2**level) for level, block in enumerate(self.down))
        return deep + sum(
            cast("UpBlock", block).convs.reach * int(2 ** (self.depth - 1 - index))
            for index, block in enumerate(self.up)
        )

    @property
    def padding(self) -> Padding:
        """``same`` or ``valid``."""
        return self._padding

    @padding.setter
    def padding(self, padding: Padding) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.padding = tuple(size // 2 if padding == "same" else 0 for size in module.kernel_size)
        self._padding = padding

    @contextmanager
    def padded(self, padding: Padding) -> Iterator[None]:
        """Within the block the network runs with ``padding``; the weights stay as they are."""
        before, self.padding = self._padding, padding
        try:
            yield
        finally:
            self.padding = before

    def folded(self) -> UNet:
        """A copy for prediction with every batch norm folded into its convolution: fewer passes over memory."""
        network = copy.deepcopy(self).eval()
        for index, block in enumerate(network.down):
            network.down[index] = folded(cast("DoubleConv", block))
        for block in network.up:
            cast("UpBlock", block).convs = folded(cast("UpBlock", block).convs)
        return network

    def forward(self, image_bkhw: Tensor) -> Tensor:
        """Logits (b, class, row, col) in the dtype of the input.

        Raises ValueError when a side of the input would leave an odd number of pixels before a pooling.
        """
        skips: list[Tensor] = []
        features_bchw = image_bkhw
        for block in self.down[:-1]:
            features_bchw = block(features_bchw)
            if features_bchw.shape[-1] % 2 or features_bchw.shape[-2] % 2:
                raise ValueError(
                    f"an input of {tuple(image_bkhw.shape[-2:])} leaves {tuple(features_bchw.shape[-2:])} before a "
                    f"pooling with padding={self._padding!r}; each side there must be even"
                )
            skips.append(features_bchw)
            features_bchw = self.pool(features_bchw)
        features_bchw = self.down[-1](features_bchw)
        for block in self.up:
            features_bchw = block(features_bchw, skips.pop())
        logits: Tensor = self.head(features_bchw)
        return logits

    def core_logits(self, image_bkhw: Tensor) -> Tensor:
        """Logits of the core: the input without ``margin`` pixels on each side.

        The core's sides must be multiples of ``stride``, and the core must lie on a multiple of ``stride`` of the grid
        in hand for windows to agree with each other. The result is the same with either padding.
        """
        if self._padding == "valid":
            spare = self.margin - self.shrinkage
            logits_bchw = self(image_bkhw)
        else:
            spare = self.halo
            rim = self.halo - self.margin
            logits_bchw = self(F.pad(image_bkhw, (rim, rim, rim, rim)))
        core_bchw: Tensor = logits_bchw[
            ..., spare : logits_bchw.shape[-2] - spare, spare : logits_bchw.shape[-1] - spare
        ]
        return core_bchw
