"""The network at work: images with their margin in, logits of the core out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geoseg.config import PredictConfig
from geoseg.errors import ConfigError
from geoseg.model.bundle import Bundle
from geoseg.model.description import OutsideVariant, UNetVariant
from geoseg.model.hybrids import FlipsAndTurns, Pyramid
from geoseg.model.network import Network
from geoseg.model.precision import DTYPES, Precision, check_precision, natural_precision
from geoseg.model.tiling import Tiling, tiling
from geoseg.model.unet_plus_plus import UNetPlusPlus
from geoseg.predict.aoi import find_area
from geoseg.predict.memory import window_bytes
from geoseg.predict.plan import NetworkSpec
from geoseg.predict.tiles import run_tiles
from geoseg.predict.tuning import remembered
from geoseg.raster.raster import Raster
from geoseg.raster.window import BLOCK


class Predictor:
    """A bundle's network, ready to run: batch norm folded, channels last, valid convolutions; one from outside in tiles.

    It computes in ``precision``, whatever the settings say; where neither says one, in bfloat16 if the device has arithmetic for it
    and the network is one of ours. float32 goes without TF32, so that a GPU rounds as a CPU would. Raises ConfigError when
    the device or the network cannot compute so.
    """

    def __init__(
        self, bundle: Bundle, config: PredictConfig, *, device: str = "cpu", precision: Precision | None = None
    ) -> None:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self.device = torch.device(device)
        self.description = description = bundle.description
        self.normalization = description.normalization
        if config.scale is not None:
            self.normalization = self.normalization.rescaled(config.scale, description.value_range)
        asked = precision or config.precision
        if asked is not None:
            check_precision(asked, self.device)
        is_ours = not isinstance(description.variant, OutsideVariant)
        self.precision: Precision = asked or (natural_precision(self.device) if is_ours else "float32")
        self.network = network_to_run(bundle, config).folded(DTYPES[self.precision]).to(self.device)
        self.tiling = tiling_to_run(bundle, self.network, config)
        if self.tiling is None:
            self.network.padding = "valid"

    @torch.inference_mode()
    def core_logits(self, around: list[Raster]) -> Tensor:
        """Logits (b, class, row, col) of the cores of equally large rasters, each a core with ``margin`` around it."""
        return self.network.core_logits(self._input(around))

    @torch.inference_mode()
    def chip_logits(self, chips: list[Raster]) -> Tensor:
        """Logits (b, class, row, col) of equally large rasters with nothing around them, by a network from outside."""
        return self.network(self._input(chips))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def cores(self, around: list[Raster]) -> list[tuple[Tensor, npt.NDArray[np.bool_] | None]]:
        """For each core its logits (class, row, col), and of a blended network where tiles disagree (axis, row, col)."""
        if self.tiling is None:
            return [(logits_chw, None) for logits_chw in self.core_logits(around)]
        return [run_tiles(self.network, self._input([raster]), self.tiling) for raster in around]

    def _input(self, around: list[Raster]) -> Tensor:
        images = torch.stack([_tensor(raster.pixels) for raster in around]).to(self.device, non_blocking=True)
        valid = torch.stack([torch.from_numpy(raster.valid) for raster in around]).to(self.device, non_blocking=True)
        return self.normalization(images, valid)


def network_spec(bundle: Bundle, config: PredictConfig) -> NetworkSpec:
    """What planning a scene needs of a bundle and its settings. Raises ConfigError when they do not go together."""
    network, description = network_to_run(bundle, config), bundle.description
    if config.bands is not None and len(config.bands) != len(description.bands):
        raise ConfigError(
            f"--bands must name {len(description.bands)} bands, as the bundle takes, got {len(config.bands)}"
        )
    if config.precision == "bfloat16" and isinstance(description.variant, OutsideVariant):
        raise ConfigError(
            f"--precision bfloat16: {description.name} is a {description.variant.title}, which runs in float32 alone"
        )
    if config.warp_stacks and description.dates == 1:
        raise ConfigError(f"--warp-stacks has no effect with {description.name}, which takes single scenes")
    tiles = tiling_to_run(bundle, network, config)
    tuned = remembered(bundle.digest, torch.device(default_device()))
    if config.coarse is not None and tiles is not None:
        raise ConfigError(
            f"--coarse: {description.name} is a {description.variant.title}, a network from outside, which is run on tiles of "
            "one size, so that parts of a window save nothing; leave it out"
        )
    return NetworkSpec(
        bundle_digest=bundle.digest,
        description=description,
        stride=tiles.step if tiles else network.stride,
        margin=tiles.margin if tiles else network.margin,
        config=config,
        area=find_area(config.aoi) if config.aoi else None,
        tiling=tiles,
        window_bytes=window_bytes(),
        fastest_window=tuned.window if tuned else 0,
    )


def network_to_run(bundle: Bundle, config: PredictConfig) -> Network:
    """The bundle's network, or what the settings make of it: pruned, at several resolutions, flipped and turned.

    Raises ConfigError when it cannot be pruned so, or its windows would have to begin on multiples of more than a block.
    """
    network, variant = bundle.network(), bundle.description.variant
    if config.prune is not None:
        if not isinstance(network, UNetPlusPlus):
            raise ConfigError(
                f"--prune {config.prune}: {bundle.description.name} is a {variant.title}; a unet++ alone has "
                "a head at each depth"
            )
        network = network.pruned(config.prune)
    if config.pyramid is not None:
        assert config.resampling is not None
        if not isinstance(variant, UNetVariant):
            raise ConfigError(
                f"--pyramid: {bundle.description.name} is a {variant.title}, whose layers are not ours, so no margin follows "
                "for a pyramid of it; leave it out"
            )
        network = Pyramid(network, config.pyramid, resampling=config.resampling)
        if network.stride > BLOCK:
            raise ConfigError(
                f"--pyramid {','.join(map(str, config.pyramid))}: on a network of depth {variant.depth} its "
                f"windows would have to begin on multiples of {network.stride} pixels, {BLOCK} is the most; leave out the "
                "largest factor"
            )
    return FlipsAndTurns(network) if config.flips_and_turns else network


def tiling_to_run(bundle: Bundle, network: Network, config: PredictConfig) -> Tiling | None:
    """How a network from outside is tiled, None for one of ours. Raises ConfigError for settings without effect."""
    description = bundle.description
    variant = description.variant
    tiles = tiling(network.stride, variant.margin, config.tile) if isinstance(variant, OutsideVariant) else None
    if config.tile is not None and tiles is None:
        raise ConfigError(
            f"--tile has no effect with {description.name}, a {variant.title}, which is run window by window"
        )
    if config.max_seam_score is not None and not (tiles and tiles.is_blended):
        raise ConfigError(
            f"--max-seam-score has no effect with {description.name}, a {variant.title} with an exact margin: it has no seams"
        )
    return tiles


def _tensor(pixels: npt.NDArray[Any]) -> Tensor:
    if pixels.dtype.byteorder not in "=|<":
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    if pixels.dtype.name in ("uint16", "uint32", "uint64"):
        pixels = pixels.astype("int32" if pixels.dtype.name == "uint16" else "float64")
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def default_device() -> str:
    """``cuda`` when there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
