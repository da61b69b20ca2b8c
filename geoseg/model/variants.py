"""The U-Net family by name: from a bundle's description to a network."""

from __future__ import annotations

from geoseg.model.attention_unet import AttentionUNet
from geoseg.model.description import UNetVariant
from geoseg.model.network import Network
from geoseg.model.resunet import ResUNet
from geoseg.model.unet import UNet
from geoseg.model.unet_plus_plus import UNetPlusPlus

VARIANTS: dict[str, type[UNet | AttentionUNet | ResUNet | UNetPlusPlus]] = {
    "unet": UNet,
    "attention-unet": AttentionUNet,
    "resunet": ResUNet,
    "unet++": UNetPlusPlus,
}


def build(variant: UNetVariant, in_channels: int, num_classes: int) -> Network:
    """A network with random weights, padding ``same``. Raises ConfigError."""
    made = VARIANTS[variant.name]
    return made(in_channels, num_classes, depth=variant.depth, width=variant.width, norm=variant.norm)
