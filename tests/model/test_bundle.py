"""A bundle comes back as it went, and one that is damaged, foreign or hostile is refused before it is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from kit.oracle import seeded_bundle
from safetensors.torch import load, save

from geoseg.errors import BundleError, ConfigError
from geoseg.model.bundle import Bundle
from geoseg.model.normalize import Normalization
from geoseg.predict.bundles import load_bundle, save_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return seeded_bundle(tmp_path / "bundle")


def test_a_bundle_comes_back_as_it_went(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(str(folder))
    save_bundle(bundle, str(tmp_path / "copy"))
    again = load_bundle(str(tmp_path / "copy"))
    assert again == bundle
    assert again.digest == bundle.digest
    image = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(again.network()(image), bundle.network()(image))


def test_any_change_changes_the_digest(folder: Path) -> None:
    bundle = load_bundle(str(folder))
    weights = load(bundle.weights)
    weights["head.bias"][0] += 1e-6
    other = Bundle(description=bundle.description, weights=save(weights))
    renamed = Bundle(description=bundle.description.model_copy(update={"resolution_m": 0.3}), weights=bundle.weights)
    assert len({bundle.digest, other.digest, renamed.digest}) == 3


class Boom:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return (Path.touch, (self.trace,))


def test_a_pickle_in_place_of_the_weights_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Boom(tmp_path / "trace")))
    with pytest.raises(BundleError, match="not safetensors"):
        load_bundle(str(folder))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"variant": {"name": "unet", "depth": 3, "width": 4}}, "do not belong together"),
        ({"std": [1.0, 0.0, 1.0]}, "std above zero"),
        ({"mean": [1.0]}, "equally many"),
        ({"format": "geoseg-bundle/9"}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"variant": {"name": "unet", "width": 0}}, "description: variant.width: .*1, got 0"),
        ({"variant": {"name": "smp"}}, "'variant.encoder' is missing"),
        ({"classes": [{"name": "one", "color": [0, 0, 0]}]}, "2 to 254 classes"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, object], sentence: str, folder: Path) -> None:
    told = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**told, **change}))
    with pytest.raises((BundleError, ConfigError), match=sentence):
        load_bundle(str(folder)).description.normalization  # noqa: B018


def test_weights_that_are_not_numbers_are_refused(folder: Path) -> None:
    weights = load((folder / "model.safetensors").read_bytes())
    weights["head.weight"][0, 0] = float("nan")
    (folder / "model.safetensors").write_bytes(save(weights))
    with pytest.raises(BundleError, match="NaN"):
        load_bundle(str(folder))


def test_a_missing_bundle_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="roads-buildings"):
        load_bundle(str(tmp_path / "nothing"))


def test_normalisation_is_a_function_of_one_pixel() -> None:
    normalize = Normalization(mean=(10.0, 20.0), std=(2.0, 4.0))
    image = torch.tensor([[[[12.0, float("nan")]], [[28.0, 20.0]]]])
    valid = torch.tensor([[[True, True]]])
    assert normalize(image, valid).tolist() == [[[[1.0, 0.0]], [[2.0, 0.0]]]]
    assert normalize(image, ~valid).abs().sum() == 0


def test_rescaled_normalisation_takes_raw_values_to_the_trained_range() -> None:
    normalize = Normalization(mean=(110.0,), std=(50.0,))
    raw = normalize.rescaled((0.0, 2047.0), (0.0, 255.0))
    values = torch.tensor([0.0, 500.0, 2047.0]).reshape(1, 1, 1, 3)
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    torch.testing.assert_close(raw(values, valid), normalize(values * 255 / 2047, valid), rtol=1e-5, atol=1e-5)
