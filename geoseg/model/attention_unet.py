"""The Attention U-Net: a gate on each skip lets through what the level below asks for.

O. Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018, arXiv:1804.03999. The paper's
network is three-dimensional; this is its form for images. The first skip has no gate, as in the paper (section 2.3).
Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from geoseg.model.blocks import AttentionGate, Norm, Padding
from geoseg.model.unet import UNet, level_widths


class AttentionUNet(UNet):
    """A U-Net whose skips pass additive attention gates; ``depth``, ``width`` and ``norm`` as in ``UNet``."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        depth: int = 4,
        width: int = 64,
        norm: Norm = "batch",
        padding: Padding = "same",
    ) -> None:
        super().__init__(in_channels, num_classes, depth=depth, width=width, norm=norm)
        widths = level_widths(in_channels, num_classes, depth, width)
        self.gates = nn.ModuleList(
            AttentionGate(widths[level], widths[level + 1], norm=norm) for level in reversed(range(1, depth))
        )
        self.padding = padding

    def skip(self, index: int, skip_bchw: Tensor, deep_bchw: Tensor) -> Tensor:
        """See ``UNet.skip``: what its gate lets through."""
        if index == len(self.gates):
            return skip_bchw
        gated: Tensor = self.gates[index](skip_bchw, deep_bchw)
        return gated
