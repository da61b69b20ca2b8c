"""From raw bands and their valid pixels to network input; the one copy, for training and for prediction.

Legend of axes: b batch, k bands, h rows, w columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from geoseg.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalization:
    """Per band: ``(value - mean) / std`` in the units of the raw values; invalid pixels become 0, the mean.

    It is a function of one pixel alone (no statistics of the window), so it cannot cause a seam.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(
                f"normalisation needs a mean and a std per band, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(std > 0 for std in self.std):
            raise ConfigError(f"normalisation needs a std above zero in each band, got {self.std}")

    def __call__(self, image_bkhw: Tensor, valid_bhw: Tensor) -> Tensor:
        """Network input, float32, (b, k, h, w), channels last in memory.

        ``image_bkhw`` has any real dtype, ``valid_bhw`` is bool with True for data. NaN is not data even where
        ``valid_bhw`` says so. Of a stack ``image_bkhw`` has the bands of one date after the other and validity is
        (b, t, h, w); behind the bands of each date comes a channel with 1 where it is valid.
        """
        import torch

        if valid_bhw.ndim == 4:
            num, dates, rows, cols = valid_bhw.shape
            of_dates = self(image_bkhw.reshape(num * dates, -1, rows, cols), valid_bhw.flatten(0, 1))
            with_valid = torch.cat([of_dates, valid_bhw.reshape(-1, 1, rows, cols).to(of_dates.dtype)], dim=1)
            return with_valid.reshape(num, -1, rows, cols)
        image = image_bkhw.to(torch.float32, memory_format=torch.channels_last, copy=True)
        mean = torch.tensor(self.mean, dtype=torch.float32, device=image.device)[:, None, None]
        scale = torch.tensor([1 / std for std in self.std], dtype=torch.float32, device=image.device)[:, None, None]
        image.sub_(mean).mul_(scale).masked_fill_(
            ~valid_bhw[:, None], 0.0
        )  # in place: fresh memory costs as much again
        return torch.nan_to_num_(image, nan=0.0) if image_bkhw.is_floating_point() else image

    def rescaled(self, raw: tuple[float, float], trained: tuple[float, float]) -> Normalization:
        """The normalisation for imagery in which ``raw`` (low, high) stands for ``trained`` (low, high).

        ``(raw value - low) * k + trained low`` is what the network knows, so mean and std move by the inverse.
        """
        factor = (trained[1] - trained[0]) / (raw[1] - raw[0])
        return Normalization(
            mean=tuple((mean - trained[0]) / factor + raw[0] for mean in self.mean),
            std=tuple(std / factor for std in self.std),
        )
