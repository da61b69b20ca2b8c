"""What all networks of the family have in common: an image with its margin in, the logits of the core out.

Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from geoseg.errors import ConfigError
from geoseg.model.blocks import NORMS, Head, Padding, UnevenError, fold_norms
from geoseg.model.reach import Reach, derive_reach
from geoseg.model.volume import Head3d


class Network(nn.Module):
    """A fully convolutional network whose logits at a pixel depend on a fixed number of pixels around it.

    The padding is no part of the weights: with ``same`` the network trains on any chip whose sides are multiples of
    ``stride``; with ``valid`` the same weights crop and copy as in the U-Net's paper and compute no border that is
    thrown away.
    """

    _padding: Padding = "same"

    @abstractmethod
    def logits(self, image_bkhw: Tensor) -> Tensor:
        """The layers: logits (b, class, row, col) of an image whose sides suit them."""

    @cached_property
    def reach(self) -> Reach:
        """Stride, margin and shrinkage, derived from the layers."""
        return derive_reach(self)

    @property
    def stride(self) -> int:
        """Pixels per step of the deepest level: windows must begin and end on multiples of it."""
        return self.reach.stride

    @property
    def margin(self) -> int:
        """Pixels of context on every side of a core aligned to ``stride``."""
        return self.reach.margin

    @property
    def halo(self) -> int:
        """``margin`` rounded up to ``stride``."""
        return -(-self.margin // self.stride) * self.stride

    @property
    def padding(self) -> Padding:
        """``same`` or ``valid``."""
        return self._padding

    @padding.setter
    def padding(self, padding: Padding) -> None:
        for module in self.modules():
            pad = getattr(module, "pad", None)
            if pad is not None:
                pad(padding)
            elif isinstance(module, Network):
                module._padding = padding  # noqa: SLF001 (it is this class's own)

    @contextmanager
    def padded(self, padding: Padding) -> Iterator[None]:
        """Within the block the network runs with ``padding``; the weights stay as they are."""
        before, self.padding = self._padding, padding
        try:
            yield
        finally:
            self.padding = before

    def folded(self, dtype: torch.dtype = torch.float32) -> Network:
        """A copy for prediction: norms folded into the convolutions before them (fewer passes over memory), channels last.

        It computes in ``dtype``, but for the heads and for norms that follow no convolution; logits are float32 in any case.
        Raises ConfigError for a network from outside in less than float32: what may be rounded there is not ours to say.
        """
        network = copy.deepcopy(self).eval()
        fold_norms(network)
        if dtype != torch.float32:
            network.lower(dtype)
        return network.laid_channels_last()

    def lower(self, dtype: torch.dtype) -> None:
        """Make the network compute in ``dtype``, as ``folded`` says."""
        if any(getattr(module, "from_outside", False) for module in self.modules()):
            raise ConfigError(f"a network from outside computes in float32 alone, not in {str(dtype).split('.')[-1]}")
        for module in self.modules():
            if not isinstance(module, (Head, Head3d, *NORMS)):
                for weights in module.parameters(recurse=False):
                    weights.data = weights.data.to(dtype)

    def laid_channels_last(self) -> Self:
        """The network itself, its weights laid with channels last in memory: the way in which convolutions are fast."""
        for weights in self.parameters():
            layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weights.ndim, torch.preserve_format)
            weights.data = weights.data.to(memory_format=layout)
        return self

    def forward(self, image_bkhw: Tensor) -> Tensor:
        """Logits (b, class, row, col) in the dtype of the input.

        Raises ValueError when a side of the input would leave an odd number of pixels before a pooling.
        """
        try:
            return self.logits(image_bkhw)
        except UnevenError as error:
            raise ValueError(
                f"an input of {tuple(image_bkhw.shape[-2:])} leaves {error} before a pooling with "
                f"padding={self._padding!r}; each side there must be even"
            ) from error

    def core_logits(self, image_bkhw: Tensor) -> Tensor:
        """Logits of the core: the input without ``margin`` pixels on each side.

        The core's sides must be multiples of ``stride``, and the core must lie on a multiple of ``stride`` of the grid
        in hand for windows to agree with each other. The result is the same with either padding.
        """
        if self._padding == "valid":
            spare = self.margin - self.reach.shrinkage
            logits_bchw = self(image_bkhw)
        else:
            spare = self.halo
            rim = self.halo - self.margin
            logits_bchw = self(F.pad(image_bkhw, (rim, rim, rim, rim)))
        core_bchw: Tensor = logits_bchw[
            ..., spare : logits_bchw.shape[-2] - spare, spare : logits_bchw.shape[-1] - spare
        ]
        return core_bchw
