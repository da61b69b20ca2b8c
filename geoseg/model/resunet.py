"""The ResU-Net: residual units in place of double convolutions, halved by strides instead of poolings.

Z. Zhang, Q. Liu, Y. Wang, "Road Extraction by Deep Residual U-Net", IEEE GRSL 2018, arXiv:1711.10684.
Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from geoseg.model.blocks import Head, Norm, Padding, ResidualUnit, UpsampleNearest, concat
from geoseg.model.network import Network
from geoseg.model.unet import level_widths


class ResUNet(Network):
    """Residual units down and up, nearest up-sampling between them; ``depth`` counts the halvings (3 in the paper)."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        depth: int = 3,
        width: int = 64,
        norm: Norm = "batch",
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        widths = level_widths(in_channels, num_classes, depth, width)
        self.down = nn.ModuleList(
            ResidualUnit(before, after, norm=norm, stride=2 if level else 1, first=not level)
            for level, (before, after) in enumerate(zip([in_channels, *widths[:-1]], widths, strict=True))
        )
        self.raised = UpsampleNearest()
        self.up = nn.ModuleList(ResidualUnit(3 * after, after, norm=norm) for after in reversed(widths[:-1]))
        self.head = Head(width, num_classes)
        self.padding = padding

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``."""
        skips: list[Tensor] = []
        features_bchw = image_bkhw
        for unit in self.down:
            features_bchw = unit(features_bchw)
            skips.append(features_bchw)
        skips.pop()
        for unit in self.up:
            features_bchw = unit(concat(skips.pop(), self.raised(features_bchw)))
        logits: Tensor = self.head(features_bchw)
        return logits
