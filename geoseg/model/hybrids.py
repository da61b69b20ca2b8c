"""Networks made of one network run several times: at several resolutions, flipped and turned. Each is a ``Network`` itself.

They have no weights of their own, and are as exact as what they run: stride and margin follow from the layers.
Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geoseg.errors import ConfigError
from geoseg.model.blocks import Downsample, Resampling, Trim, UpsampleBilinear, UpsampleNearest, added
from geoseg.model.network import Network
from geoseg.model.reach import derive_reach

_ROWS_TO_COLS = (-2, -1)


class FlipsAndTurns(Network):
    """The mean of a network's logits over the four turns of the image and of its mirror image, each turned back."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    @property
    def stride(self) -> int:
        """The network's: rows and columns are halved as often, and a turned window begins on a multiple too."""
        return self.network.stride

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``."""
        total_bchw: Tensor | None = None
        for flipped, quarters in itertools.product((False, True), range(4)):
            turned_bkhw = torch.flip(image_bkhw, (-1,)) if flipped else image_bkhw
            turned_bkhw = torch.rot90(turned_bkhw, quarters, _ROWS_TO_COLS)
            logits_bchw = torch.rot90(self.network(turned_bkhw), -quarters, _ROWS_TO_COLS)
            logits_bchw = torch.flip(logits_bchw, (-1,)) if flipped else logits_bchw
            total_bchw = logits_bchw if total_bchw is None else added(total_bchw, logits_bchw)
        assert total_bchw is not None
        return total_bchw * 0.125


class Pyramid(Network):
    """The mean of a network's logits on the image down-sampled by each of ``scales``, which are raised back to its size.

    An image is halved again and again (see ``Downsample``) and its logits are raised in one step; ``scales`` (2,) alone
    is down-sampling and up-sampling back. Raises ConfigError for scales that are not rising powers of two.
    """

    def __init__(self, network: Network, scales: Sequence[int], *, resampling: Resampling = "bilinear") -> None:
        super().__init__()
        if not scales or [*scales] != sorted({scale for scale in scales if scale > 0 and scale.bit_count() == 1}):
            raise ConfigError(f"a pyramid wants rising powers of two, for example 1,2,4, got {list(scales)}")
        self.network = network
        self.scales = tuple(scales)
        self.downsample = Downsample(resampling)
        self.ups = nn.ModuleList(_up(scale, resampling) for scale in scales)
        # What the network needs at each scale, and what that leaves over of the image that the widest of them needs.
        margins = [derive_reach(network, beyond=derive_reach(up, method="forward").margin).margin for up in self.ups]
        widest = max(margin * scale for scale, margin in zip(scales, margins, strict=True))
        widest = -(-widest // scales[-1]) * scales[-1]
        self.trims = nn.ModuleList(
            Trim(widest // scale - margin) for scale, margin in zip(scales, margins, strict=True)
        )

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``."""
        total_bchw: Tensor | None = None
        reached = 1
        for scale, trim, up in zip(self.scales, self.trims, self.ups, strict=True):
            while reached < scale:
                image_bkhw = self.downsample(image_bkhw)
                reached *= 2
            logits_bchw = up(self.network(trim(image_bkhw)))
            total_bchw = logits_bchw if total_bchw is None else added(total_bchw, logits_bchw)
        assert total_bchw is not None
        return total_bchw * (1 / len(self.scales))


def _up(scale: int, resampling: Resampling) -> nn.Sequential:
    if scale == 1:
        return nn.Sequential(nn.Identity())
    if resampling == "bilinear":
        return nn.Sequential(UpsampleBilinear(scale))
    return nn.Sequential(*(UpsampleNearest() for _ in range(scale.bit_length() - 1)))
