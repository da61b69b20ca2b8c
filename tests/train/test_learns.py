"""Each network of the family, made small, learns four chips of real imagery by heart.

Legend of axes: b batch, k input channels, c classes, t dates, h rows, w columns.
"""

from __future__ import annotations

import pytest
import rasterio
import torch
from kit.data import data_folder
from rasterio.windows import Window
from torch import Tensor

from geoseg.model.blocks import Padding
from geoseg.model.description import UNetVariant
from geoseg.model.network import Network
from geoseg.model.normalize import Normalization
from geoseg.model.unet_plus_plus import UNetPlusPlus
from geoseg.model.variants import STACK_VARIANTS, VARIANTS, build
from geoseg.train.codes import UNLABELLED
from geoseg.train.loss import (
    CrossEntropy,
    DeepSupervision,
    Dice,
    LossConfig,
    LossTerm,
    build_loss,
    labels_of_valid,
)

# Scene, row and column of a chip's centre: a fifth or more of each chip is building and a fifth road, and at least 13 % of
# the third is unlabelled.
CENTRES = (("dubai_1", 1680, 1840), ("dubai_3", 1280, 1024), ("dubai_6", 528, 272), ("dubai_7", 224, 1712))
NUM_CLASSES = 3
LIGHTS = ((1.0, 0.0), (0.7, 20.0), (1.2, -15.0), (0.9, 40.0))
ENOUGH = 0.95
MOST_STEPS, STEPS_PER_SCORE = 300, 10


def read_chips(side: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (b, 3, side, side) and labels uint8 (b, side, side)."""
    folder = data_folder() / "dubai"
    pixels, labels = [], []
    for scene, row, col in CENTRES:
        window = Window(col - side // 2, row - side // 2, side, side)
        with rasterio.open(folder / f"{scene}.tif") as image, rasterio.open(folder / f"{scene}_classes.tif") as classes:
            pixels.append(torch.from_numpy(image.read([1, 2, 3], window=window)))
            labels.append(torch.from_numpy(classes.read(1, window=window)))
    return torch.stack(pixels), torch.stack(labels)


def normalized_chips(side: int, *, dates: int) -> tuple[Tensor, Tensor]:
    """A network's input and its labels, ``UNLABELLED`` where no date is valid.

    A stack shows the same ground in other lights. The middle of the first chip is valid at no date, the last chip of a
    stack not at the second.
    """
    pixels_bkhw, labels_bhw = read_chips(side)
    lights = [(pixels_bkhw * gain + shift).clamp(0, 255) for gain, shift in LIGHTS[:dates]]
    valid_bthw = torch.ones(len(CENTRES), dates, side, side, dtype=torch.bool)
    valid_bthw[0, :, side // 2 - 8 : side // 2 + 8, side // 2 - 8 : side // 2 + 8] = False
    valid_bthw[-1, 1:2] = False
    normalization = Normalization(mean=(110.0,) * 3, std=(50.0,) * 3)
    image_bkhw = normalization(torch.cat(lights, 1), valid_bthw if dates > 1 else valid_bthw[:, 0])
    return image_bkhw, labels_of_valid(labels_bhw, valid_bthw.any(1))


def cropped(labels_bhw: Tensor, pixels: int) -> Tensor:
    """The labels without ``pixels`` on each side."""
    rows, cols = labels_bhw.shape[1:]
    return labels_bhw[:, pixels : rows - pixels, pixels : cols - pixels]


def lowest_iou(network: Network, image_bkhw: Tensor, labels_bhw: Tensor) -> float:
    """The lower of building's and road's, over the labelled pixels of all chips, by the network in evaluation mode."""
    with torch.inference_mode():
        mask_bhw = network.eval()(image_bkhw).argmax(1).masked_fill(labels_bhw == UNLABELLED, UNLABELLED)
    pairs = [(mask_bhw == code, labels_bhw == code) for code in range(1, NUM_CLASSES)]
    return min(float((found & truth).sum() / (found | truth).sum()) for found, truth in pairs)


def take_step(network: Network, optimizer: torch.optim.Optimizer, image_bkhw: Tensor, labels_bhw: Tensor) -> None:
    """One step on all chips at once; a U-Net++ learns at each of its depths."""
    loss = build_loss(LossConfig(terms=(LossTerm(loss=CrossEntropy()), LossTerm(loss=Dice()))))
    network.train()
    if isinstance(network, UNetPlusPlus):
        value = DeepSupervision(loss)(network.all_logits(image_bkhw), labels_bhw)
    else:
        value = loss(network(image_bkhw), labels_bhw)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def cut_off(network: Network) -> list[str]:
    """The convolutions with a channel taken and a channel given between which the last step brought no gradient."""
    kernels = ((name, weights) for name, weights in network.named_parameters() if weights.ndim > 1)
    return [name for name, weights in kernels if weights.grad is None or not weights.grad.flatten(2).any(2).all()]


@pytest.mark.sample("unet-valid", "attention-unet-same", "vnet-same")
@pytest.mark.parametrize(
    ("name", "padding"), [*((name, "same") for name in (*VARIANTS, *STACK_VARIANTS)), ("unet", "valid")]
)
def test_four_real_chips_are_learnt_by_heart(name: str, padding: Padding) -> None:
    torch.manual_seed(0)
    stack = name in STACK_VARIANTS
    dates, side, width = (len(LIGHTS), 32, 4) if stack else (1, 48, 8)
    network = build(UNetVariant(name=name, depth=2, width=width, norm="batch"), 3, NUM_CLASSES, dates=dates)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    with network.padded(padding):
        beyond, lost = (network.margin, network.reach.shrinkage) if padding == "valid" else (0, 0)
        image_bkhw, labels_bhw = normalized_chips(side + 2 * beyond, dates=dates)
        labels_bhw = cropped(labels_bhw, lost)
        take_step(network, optimizer, image_bkhw, labels_bhw)
        assert cut_off(network) == []
        iou, step = 0.0, 1
        while iou <= ENOUGH and step < MOST_STEPS:
            take_step(network, optimizer, image_bkhw, labels_bhw)
            step += 1
            if step % STEPS_PER_SCORE == 0:
                iou = lowest_iou(network, image_bkhw, labels_bhw)
    assert iou > ENOUGH, f"after {step} steps"
