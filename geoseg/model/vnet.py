"""The V-Net on a stack of dates: residual stages of 5 x 5 x 5 convolutions, halved by convolutions in place of poolings.

F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
Segmentation", 3DV 2016, arXiv:1606.04797. Legend of axes: b batch, k input channels, c channels, t dates, h rows, w columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from geoseg.model.blocks import Norm, Padding, concat
from geoseg.model.network import Network
from geoseg.model.unet import level_widths
from geoseg.model.volume import (
    DownConv3d,
    Head3d,
    ResidualStage,
    UpConv3d,
    date_factors,
    mean_over_dates,
    norm_of,
    volume,
)

_MOST_CONVS = 3


class VNet(Network):
    """Input and dates as for ``UNet3D``; the paper's network is ``VNet(1, 2)``: 16 channels, doubled at 4 halvings."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dates: int = 16,
        depth: int = 4,
        width: int = 16,
        norm: Norm = "none",
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        widths = level_widths(in_channels, num_classes, depth, width)
        factors = date_factors(dates, depth)
        upwards = list(reversed(range(depth)))
        self.dates = dates
        self.down = nn.ModuleList(
            ResidualStage(in_channels if level == 0 else after, after, min(level + 1, _MOST_CONVS), norm=norm)
            for level, after in enumerate(widths)
        )
        self.halved = nn.ModuleList(
            nn.Sequential(
                DownConv3d(widths[level], widths[level + 1], factors[level]),
                *norm_of(widths[level + 1], norm),
                nn.PReLU(widths[level + 1]),
            )
            for level in range(depth)
        )
        # Each level's features are raised to the channels of the skip, and so the stage above has twice as many.
        raised_from = [widths[-1], *(2 * widths[level] for level in upwards[:-1])]
        self.raised = nn.ModuleList(
            nn.Sequential(UpConv3d(before, widths[level], factors[level]), nn.PReLU(widths[level]))
            for before, level in zip(raised_from, upwards, strict=True)
        )
        self.up = nn.ModuleList(
            ResidualStage(2 * widths[level], 2 * widths[level], min(level + 1, _MOST_CONVS), norm=norm)
            for level in upwards
        )
        self.head = Head3d(2 * width, num_classes)
        self.padding = padding

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``; the image holds the channels of one date after the other."""
        image_bkthw = volume(image_bkhw, self.dates)
        features_bcthw = self.down[0](image_bkthw)
        skips: list[Tensor] = []
        for halve, stage in zip(self.halved, self.down[1:], strict=True):
            skips.append(features_bcthw)
            features_bcthw = stage(halve(features_bcthw))
        for raise_, stage in zip(self.raised, self.up, strict=True):
            features_bcthw = stage(concat(skips.pop(), raise_(features_bcthw)))
        return mean_over_dates(self.head(features_bcthw), image_bkthw)
