"""The oracle of exactness: a scene read whole by rasterio and run whole, once, through the network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch

from geoseg.config import PredictConfig
from geoseg.model.bundle import Bundle
from geoseg.model.description import BundleDescription, ClassName, UNetVariant
from geoseg.model.network import Network
from geoseg.model.precision import DTYPES, natural_precision
from geoseg.model.variants import build
from geoseg.predict.bundles import save_bundle
from geoseg.predict.predictor import network_to_run
from kit.cogs import AFFINE, UTM

CLASSES = (
    ClassName(name="background", color=(0, 0, 0)),
    ClassName(name="building", color=(230, 85, 60)),
    ClassName(name="road", color=(250, 200, 60)),
)


def seeded_bundle(
    folder: Path,
    *,
    seed: int = 0,
    name: Any = "unet",
    depth: int = 2,
    width: int = 4,
    bands: tuple[str, ...] = ("red", "green", "blue"),
    dates: int = 1,
    **described: Any,
) -> Path:
    """Save an untrained network whose logits vary with the image; the folder is its URI.

    Further keywords go into its description (``dtype``, ``resolution_m``).
    """
    torch.manual_seed(seed)
    variant = UNetVariant(name=name, depth=depth, width=width, norm="batch")
    network = build(variant, len(bands), len(CLASSES), dates=dates)
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.05, 0.4)
    _balance(network.eval(), len(bands), dates)
    description = BundleDescription(
        name=f"seed-{seed}",
        variant=variant,
        dates=dates,
        bands=bands,
        mean=(110.0,) * len(bands),
        std=(50.0,) * len(bands),
        classes=CLASSES,
        origin="not trained, for tests",
        **{"resolution_m": None, **described},
    )
    save_bundle(Bundle.from_network(network, description), str(folder))
    return folder


def _balance(network: Network, num_bands: int, dates: int) -> None:
    """Shift and stretch the logits so that each class wins somewhere."""
    image = torch.randn(1, num_bands * dates, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3)
    if dates > 1:
        image = torch.cat([image.unflatten(1, (dates, -1)), torch.ones(1, dates, 1, 128, 128)], dim=2).flatten(1, 2)
    heads = getattr(network, "heads", None) or [network.head]  # logits are the mean of the heads'
    with torch.no_grad():
        logits = network(image).transpose(0, 1).flatten(1)
        for head in heads:
            head.weight.div_(logits.std(1).reshape(-1, *[1] * (head.weight.ndim - 1)))
            head.bias.copy_((head.bias - logits.mean(1)) / logits.std(1))


def write_scene(path: Path, pixels: npt.NDArray[Any], **profile: Any) -> Path:
    """Write pixels (band, row, col) as a tiled GeoTIFF; keywords overrule the profile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "driver": "GTiff",
        "count": pixels.shape[0],
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "dtype": pixels.dtype.name,
        "crs": UTM,
        "transform": AFFINE,
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "photometric": "rgb" if pixels.shape[0] == 3 else "minisblack",
    }
    with rasterio.open(path, "w", **{**settings, **profile}) as dataset:
        dataset.write(pixels)
    return path


def mirrored_whole(image: npt.NDArray[Any], halo: int, stride: int) -> npt.NDArray[Any]:
    """(band, row, col) with ``halo`` mirrored on every side and more at the far sides, up to a multiple of ``stride``."""
    rows, cols = image.shape[-2:]
    pad = [(0, 0)] * (image.ndim - 2) + [(halo, halo + -rows % stride), (halo, halo + -cols % stride)]
    if min(rows, cols) == 1:  # numpy mirrors a single pixel as it should only with "edge"
        for axis, size in ((-2, rows), (-1, cols)):
            one = [(0, 0)] * image.ndim
            one[axis] = pad[axis]
            image = np.pad(image, one, mode="edge" if size == 1 else "reflect")
        return image
    return np.pad(image, pad, mode="reflect")


def whole_logits(
    bundle: Bundle, image: npt.NDArray[Any], valid: npt.NDArray[np.bool_], **settings: Any
) -> torch.Tensor:
    """Logits (class, row, col) of an image run once, padded="same", with a mirrored border; ``valid`` (row, col).

    Of a stack ``image`` holds date after date, and ``valid`` is (date, row, col).
    """
    config = PredictConfig(**settings)
    is_ours = isinstance(bundle.description.variant, UNetVariant)
    precision = config.precision or (natural_precision(torch.device("cpu")) if is_ours else "float32")
    network = network_to_run(bundle, config).folded(DTYPES[precision])
    halo, stride = network.halo, network.stride
    pixels = torch.from_numpy(mirrored_whole(image, halo, stride).copy())[None]
    counts = torch.from_numpy(mirrored_whole(valid, halo, stride).copy())[None]
    with torch.inference_mode():
        logits = network(bundle.description.normalization(pixels, counts))[0]
    return logits[:, halo : halo + image.shape[1], halo : halo + image.shape[2]]


def whole_mask(bundle: Bundle, path: Path, **settings: Any) -> npt.NDArray[np.uint8]:
    """The mask that a scene should get: rasterio reads it whole, the network sees it whole."""
    with rasterio.open(path, driver="GTiff") as dataset:
        image = dataset.read()[: len(bundle.description.bands)]
        valid = dataset.dataset_mask() != 0
    codes = whole_logits(bundle, image, valid, **settings).max(0).indices.to(torch.uint8).numpy()
    return np.where(valid, codes, np.uint8(255))


def published_mask(path: str) -> npt.NDArray[np.uint8]:
    """The pixels of a published mask."""
    with rasterio.open(path) as dataset:
        mask: npt.NDArray[np.uint8] = dataset.read(1)
    return mask


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every published object in a folder, by name."""
    files = [file for file in out.rglob("*") if file.is_file() and "_geoseg" not in file.parts]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}
