"""U-Net++: between the contracting and the expanding path lie nested nodes, so that each depth has logits of its own.

Z. Zhou, M. M. R. Siddiquee, N. Tajbakhsh, J. Liang, "UNet++: A Nested U-Net Architecture for Medical Image Segmentation",
DLMIA 2018, arXiv:1807.10165. Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from geoseg.errors import ConfigError
from geoseg.model.blocks import DoubleConv, Head, Norm, Padding, Pool, UpConv2d, added, concat, contracting_path
from geoseg.model.network import Network
from geoseg.model.unet import level_widths


class UNetPlusPlus(Network):
    """Node (i, j) of level i joins all nodes of its level before it with the raised node (i + 1, j - 1).

    Each node (0, j) has a head: trained together (deep supervision), averaged at prediction, or ``pruned`` to a smaller
    network (figure 1c and section 3.2 of the paper).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        depth: int = 4,
        width: int = 32,
        norm: Norm = "none",
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        widths = level_widths(in_channels, num_classes, depth, width)
        self.down = contracting_path(in_channels, widths, norm=norm)
        self.pool = Pool()
        self.up = nn.ModuleList(
            nn.ModuleList(UpConv2d(widths[level + 1], widths[level]) for level in range(depth - step))
            for step in range(depth)
        )
        self.nodes = nn.ModuleList(
            nn.ModuleList(
                DoubleConv((step + 2) * widths[level], widths[level], norm=norm) for level in range(depth - step)
            )
            for step in range(depth)
        )
        self.heads = nn.ModuleList(Head(width, num_classes) for _ in range(depth))
        self.padding = padding

    def all_logits(self, image_bkhw: Tensor) -> list[Tensor]:
        """The logits of each depth, the shallowest first; with valid padding each of its own size."""
        levels: list[list[Tensor]] = []
        features_bchw = image_bkhw
        for level, block in enumerate(self.down):
            features_bchw = block(self.pool(features_bchw) if level else features_bchw)
            levels.append([features_bchw])
        for step, (ups, nodes) in enumerate(zip(self.up, self.nodes, strict=True)):
            for level, (up, node) in enumerate(zip(_each(ups), _each(nodes), strict=True)):
                levels[level].append(node(concat(*levels[level], up(levels[level + 1][step]))))
        return [head(node_bchw) for head, node_bchw in zip(self.heads, levels[0][-len(self.heads) :], strict=True)]

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``: the mean of all depths'."""
        first_bchw, *others = self.all_logits(image_bkhw)
        for logits_bchw in others:
            first_bchw = added(first_bchw, logits_bchw)
        return first_bchw * (1 / len(self.heads))

    def pruned(self, depth: int) -> UNetPlusPlus:
        """A copy that computes the logits of ``depth`` alone, and no node that these do not need."""
        if not 1 <= depth <= len(self.heads):
            raise ConfigError(
                f"a U-Net++ of depth {len(self.heads)} can be pruned to 1 to {len(self.heads)}, not {depth}"
            )
        network = copy.deepcopy(self)
        network.__dict__.pop("reach", None)
        network.down = network.down[: depth + 1]
        for name in ("up", "nodes"):
            steps = getattr(network, name)[:depth]
            setattr(network, name, nn.ModuleList(step[: depth - index] for index, step in enumerate(steps)))
        network.heads = network.heads[depth - 1 : depth]
        return network


def _each(layers: nn.Module) -> nn.ModuleList:
    assert isinstance(layers, nn.ModuleList)
    return layers
