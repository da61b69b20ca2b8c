"""The U-Net of 2015 with a choice of depth, width, norm and padding: images in, logits out.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv:1505.04597. Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from geoseg.errors import ConfigError
from geoseg.model.blocks import Head, Norm, Padding, Pool, UpBlock, contracting_path
from geoseg.model.network import Network


class UNet(Network):
    """Contracting path, bottleneck, expanding path and a 1 x 1 convolution to the classes.

    ``depth`` counts the poolings and ``width`` the channels of the first level, doubled at each pooling; the paper's
    network is ``UNet(1, 2, depth=4, width=64, norm="none", padding="valid")``.
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
        widths = level_widths(in_channels, num_classes, depth, width)
        self.down = contracting_path(in_channels, widths, norm=norm)
        self.pool = Pool()
        self.up = nn.ModuleList(UpBlock(2 * after, after, norm=norm) for after in reversed(widths[:-1]))
        self.head = Head(width, num_classes)
        self.padding = padding

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``."""
        skips: list[Tensor] = []
        features_bchw = image_bkhw
        for block in self.down[:-1]:
            features_bchw = block(features_bchw)
            skips.append(features_bchw)
            features_bchw = self.pool(features_bchw)
        features_bchw = self.down[-1](features_bchw)
        for index, block in enumerate(self.up):
            features_bchw = block(features_bchw, self.skip(index, skips.pop(), features_bchw))
        logits: Tensor = self.head(features_bchw)
        return logits

    def skip(self, index: int, skip_bchw: Tensor, deep_bchw: Tensor) -> Tensor:
        """What of a skip joins the up-block ``index``, counted from the deepest: here all of it."""
        del index, deep_bchw
        return skip_bchw


def level_widths(in_channels: int, num_classes: int, depth: int, width: int) -> list[int]:
    """Channels of each level from the image down, ``width`` doubled ``depth`` times. Raises ConfigError."""
    if min(in_channels, depth, width) < 1 or num_classes < 2:
        raise ConfigError(
            "a U-Net needs at least one input channel, one pooling, one channel of width and two classes, "
            f"got in_channels={in_channels} depth={depth} width={width} num_classes={num_classes}"
        )
    return [width * int(2**level) for level in range(depth + 1)]
