"""Networks from outside for the tests: a stand-in that is always there, and the real ones where the extra is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from geoseg.model.description import BundleDescription, OutsideVariant
from geoseg.model.outside import build_outside, measured
from geoseg.predict.bundles import save_bundle
from kit.oracle import CLASSES
from kit.vision_operators import declare_vision_operators

STAND_IN = Path(__file__).parent / "stand_in"
_NAMES = ("segmentation_models_pytorch", "timm", "torchvision")


@contextmanager
def stand_in() -> Iterator[None]:
    """Within the block the stand-in is imported in place of the real library."""
    with _imported_from([str(STAND_IN), *sys.path]):
        yield


@contextmanager
def real_encoders() -> Iterator[None]:
    """Within the block the real library is imported, also within that of a stand-in; skips where it is not installed."""
    with _imported_from([folder for folder in sys.path if folder != str(STAND_IN)]):
        missing = [name for name in _NAMES if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{missing[0]} is not installed; get it with: pip install 'geoseg[encoders]'")
        declare_vision_operators()
        yield


@contextmanager
def _imported_from(path: list[str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", path)
        _forget()
        yield
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == _NAMES[0]]:
        del sys.modules[name]


def outside_bundle(folder: Path, encoder: str, *, seed: int = 0, **options: Any) -> Path:
    """Save an untrained network of an encoder, measured, whose logits vary with the image; the folder is its URI."""
    from geoseg.model.bundle import Bundle

    variant = OutsideVariant(name="smp", encoder=encoder, options=options)
    torch.manual_seed(seed)
    network = build_outside(variant, 3, len(CLASSES)).train()
    image = torch.randn(2, 3, 16, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    with torch.no_grad():
        for _ in range(20):  # the norms see something
            network(image)
        logits = network.eval()(image).transpose(0, 1).flatten(1)
        head = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
        head.weight.div_(logits.std(1).reshape(-1, 1, 1, 1))
        head.bias.copy_((head.bias - logits.mean(1)) / logits.std(1))
    description = BundleDescription(
        name=f"outside-{encoder}",
        variant=measured(variant, 3),
        bands=("red", "green", "blue"),
        mean=(110.0,) * 3,
        std=(50.0,) * 3,
        resolution_m=None,
        classes=CLASSES,
        origin="not trained, for tests",
    )
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_bundle(Bundle(description=description, weights=save(state)), str(folder))
    return folder
