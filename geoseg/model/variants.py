"""The U-Net family by name: from a bundle's description to a network."""

from __future__ import annotations

from typing import Any

from geoseg.errors import ConfigError
from geoseg.model.attention_unet import AttentionUNet
from geoseg.model.description import OutsideVariant, UNetVariant
from geoseg.model.network import Network
from geoseg.model.outside import build_outside
from geoseg.model.resunet import ResUNet
from geoseg.model.unet import UNet
from geoseg.model.unet3d import UNet3D
from geoseg.model.unet_plus_plus import UNetPlusPlus
from geoseg.model.vnet import VNet

VARIANTS: dict[str, type[UNet | AttentionUNet | ResUNet | UNetPlusPlus]] = {
    "unet": UNet,
    "attention-unet": AttentionUNet,
    "resunet": ResUNet,
    "unet++": UNetPlusPlus,
}
STACK_VARIANTS: dict[str, type[UNet3D | VNet]] = {"unet3d": UNet3D, "vnet": VNet}


def build(variant: UNetVariant | OutsideVariant, num_bands: int, num_classes: int, *, dates: int = 1) -> Network:
    """A network with random weights, padding ``same``, for images of ``num_bands`` or stacks of ``dates`` such images.

    A stack's network has a channel more for each date, which tells where it is valid. Raises ConfigError.
    """
    if isinstance(variant, OutsideVariant):
        return build_outside(variant, num_bands, num_classes)
    shape: dict[str, Any] = {"depth": variant.depth, "width": variant.width, "norm": variant.norm}
    if variant.name in STACK_VARIANTS:
        return STACK_VARIANTS[variant.name](num_bands + 1, num_classes, dates=dates, **shape)
    if dates != 1:
        raise ConfigError(
            f"a {variant.name} takes one date, got {dates}; stacks are for {' and '.join(STACK_VARIANTS)}"
        )
    return VARIANTS[variant.name](num_bands, num_classes, **shape)
