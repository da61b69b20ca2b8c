"""The 3D U-Net on a stack of dates: one image of all of them in, one map of logits out.

Ö. Çiçek, A. Abdulkadir, S. S. Lienkamp, T. Brox, O. Ronneberger, "3D U-Net: Learning Dense Volumetric Segmentation from
Sparse Annotation", MICCAI 2016, arXiv:1606.06650. Legend of axes: b batch, k input channels, c channels, t dates, h rows,
w columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from geoseg.model.blocks import Norm, Padding, concat
from geoseg.model.network import Network
from geoseg.model.unet import level_widths
from geoseg.model.volume import DoubleConv3d, Head3d, Pool3d, UpConv3d, date_factors, mean_over_dates, volume


class UNet3D(Network):
    """``in_channels`` of each of ``dates`` dates, the last of them 1 where the date is valid; logits are means over dates.

    ``width`` channels come of the first convolution and twice as many of the second, doubled at each of ``depth``
    poolings; the paper's network is ``UNet3D(3, 3)`` with its dates as the third axis in space. Dates are halved by a
    pooling while their number is even.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dates: int = 8,
        depth: int = 3,
        width: int = 32,
        norm: Norm = "batch",
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        widths = level_widths(in_channels, num_classes, depth, 2 * width)
        factors = date_factors(dates, depth)
        self.dates = dates
        self.down = nn.ModuleList(
            DoubleConv3d(before, after // 2, after, norm=norm)
            for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.pools = nn.ModuleList(Pool3d(factor) for factor in factors)
        self.up = nn.ModuleList(
            UpConv3d(widths[level + 1], widths[level + 1], factors[level], bias=False)
            for level in reversed(range(depth))
        )
        self.joined = nn.ModuleList(
            DoubleConv3d(widths[level] + widths[level + 1], widths[level], widths[level], norm=norm)
            for level in reversed(range(depth))
        )
        self.head = Head3d(widths[0], num_classes)
        self.padding = padding

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``; the image holds the channels of one date after the other."""
        image_bkthw = volume(image_bkhw, self.dates)
        skips: list[Tensor] = []
        features_bcthw = image_bkthw
        for block, pool in zip(self.down[:-1], self.pools, strict=True):
            features_bcthw = block(features_bcthw)
            skips.append(features_bcthw)
            features_bcthw = pool(features_bcthw)
        features_bcthw = self.down[-1](features_bcthw)
        for up, block in zip(self.up, self.joined, strict=True):
            features_bcthw = block(concat(skips.pop(), up(features_bcthw)))
        return mean_over_dates(self.head(features_bcthw), image_bkthw)
