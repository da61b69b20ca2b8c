"""A stand-in for segmentation_models.pytorch: ``create_model`` with two encoders of a few layers, to import in its place.

``convs`` sees a fixed number of pixels (at stride 4: see ``tests/model/test_outside.py``); ``gated`` multiplies its features with
gates that see the whole input, as a squeeze-and-excitation block does (Hu et al. 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(channels, channels, 1)

    def forward(self, features_bchw: Tensor) -> Tensor:
        return features_bchw * torch.sigmoid(self.weigh(features_bchw.mean((2, 3), keepdim=True)))


class _Encoder(nn.Module):
    output_stride = 4

    def __init__(self, in_channels: int, width: int, *, is_gated: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.SiLU())
        self.gate = _Gate(width) if is_gated else nn.Identity()

    def forward(self, image_bkhw: Tensor) -> Tensor:
        features_bchw: Tensor = self.gate(self.second(self.first(image_bkhw)))
        return features_bchw


class _Model(nn.Module):
    def __init__(self, encoder: _Encoder, width: int, classes: int, *, dropout: float, idle: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.drop = nn.Dropout2d(dropout)
        if idle:
            self.idle = nn.Conv2d(width, width, 1)
        self.up = nn.UpsamplingNearest2d(scale_factor=4)
        self.head = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, image_bkhw: Tensor) -> Tensor:
        logits_bchw: Tensor = self.head(self.up(self.drop(self.encoder(image_bkhw))))
        return logits_bchw


def create_model(
    arch: str,
    encoder_name: str,
    *,
    encoder_weights: str | None,
    in_channels: int,
    classes: int,
    width: int = 8,
    dropout: float = 0.0,
    idle: bool = False,
) -> nn.Module:
    """Return a network as the real one would; its KeyError names what is not known.

    ``dropout``: share of the features that are dropped in training. ``idle``: has a layer that it does not use.
    """
    assert encoder_weights is None, "weights come with the bundle, never from the network"
    if arch != "Unet" or encoder_name not in ("convs", "gated"):
        raise KeyError(f"{arch} {encoder_name} is not there")
    return _Model(
        _Encoder(in_channels, width, is_gated=encoder_name == "gated"), width, classes, dropout=dropout, idle=idle
    )
