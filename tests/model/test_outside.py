"""Networks from outside: what they see is measured as it is, and what cannot be is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from kit.encoders import outside_bundle, real_encoders, stand_in
from torch import nn

from geoseg.cli import main
from geoseg.errors import ConfigError
from geoseg.model.bundle import Bundle
from geoseg.model.costs import count_costs
from geoseg.model.description import BundleDescription, OutsideVariant
from geoseg.model.hybrids import FlipsAndTurns
from geoseg.model.outside import Outside, build_outside, measure_margin, measured
from geoseg.model.tiling import tiling
from geoseg.predict.bundles import load_bundle


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Let the stand-in be imported unless a test asks for the real one."""
    with stand_in():
        yield


class Residual(nn.Module):
    """Doubles its values, as residual networks do from block to block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(3), nn.ReLU6())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.inner(image)


class Gated(nn.Module):
    """A pixel is scaled by the mean of all, or by that of its row or column."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * image.mean(self.axes, keepdim=True)


def conv(size: int | tuple[int, int], *, dilation: int = 1) -> nn.Conv2d:
    rows, cols = (size, size) if isinstance(size, int) else size
    return nn.Conv2d(2, 2, size, padding=(dilation * (rows // 2), dilation * (cols // 2)), dilation=dilation)


@pytest.mark.parametrize(
    ("layers", "margin"),
    [
        ([conv(1)], 0),
        ([conv(5)], 2),
        ([conv(3, dilation=4)], 4),
        ([conv((1, 7))], 3),
        ([conv((7, 1))], 3),
        ([conv(3), nn.ReLU(), conv(3), nn.BatchNorm2d(2), nn.Hardswish(), conv(3)], 3),
        ([Residual() for _ in range(40)], 40),
        ([nn.MaxPool2d(5, stride=1, padding=2)], 2),
        ([conv(3, dilation=50) for _ in range(10)], 500),
        ([conv(3, dilation=50) for _ in range(11)], None),
        ([Gated(2, 3)], None),
        ([conv(3), Gated(2)], None),
        ([conv(3), Gated(3)], None),
        ([nn.InstanceNorm2d(2)], None),
        ([nn.GroupNorm(1, 2)], None),
    ],
    ids=[
        "1 x 1",
        "5 x 5",
        "dilated",
        "1 x 7",
        "7 x 1",
        "three",
        "values that double",
        "maximum",
        "wide",
        "too wide",
        "scaled by all",
        "by columns",
        "by rows",
        "instance norm",
        "group norm",
    ],
)
def test_the_margin_of_a_few_layers_counted_by_hand(layers: list[nn.Module], margin: int | None) -> None:
    assert measure_margin(nn.Sequential(*layers), 2, stride=1) == margin


def test_a_margin_is_that_of_cores_on_multiples_of_the_stride() -> None:
    """A 3 x 3 convolution, a maximum of 2 x 2, raised back, a 3 x 3 convolution: 1 + 2, and of the stand-in 7."""
    module = nn.Sequential(conv(3), nn.MaxPool2d(2), nn.UpsamplingNearest2d(scale_factor=2), conv(3))
    assert measure_margin(module, 2, stride=2) == 3
    assert measured(OutsideVariant(name="smp", encoder="convs"), 3).margin == 7
    assert measured(OutsideVariant(name="smp", encoder="gated"), 3).margin is None


def test_what_the_weights_are_has_no_say_and_they_stay_as_they_are() -> None:
    dark = nn.Sequential(conv(3), nn.ReLU(), conv(3))
    with torch.no_grad():
        dark[0].weight.fill_(-1)
    before = torch.get_rng_state()
    assert measure_margin(dark, 2, stride=1) == 2
    assert bool((dark[0].weight == -1).all())
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_that_do_not_follow_from_the_image_are_refused() -> None:
    class Constant(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image * 0

    with pytest.raises(ConfigError, match="do not follow from the image"):
        measure_margin(Constant(), 2, stride=1)


@pytest.mark.parametrize(
    ("stride", "margin", "tile", "expected"),
    [
        (32, None, None, (512, 256, 256, True)),
        (32, None, 1024, (1024, 512, 512, True)),
        (32, 61, None, (640, 512, 64, False)),
        (32, 281, None, (1600, 1024, 288, False)),
        (32, 281, 640, (640, 64, 288, False)),
    ],
)
def test_tiles(stride: int, margin: int | None, tile: int | None, expected: tuple[int, int, int, bool]) -> None:
    made = tiling(stride, margin, tile)
    assert (made.tile, made.step, made.margin, made.is_blended) == expected


@pytest.mark.parametrize(
    ("margin", "tile", "sentence"),
    [
        (None, 96, "--tile 96: tiles overlap by half.*multiple of 64"),
        (281, 576, "--tile 576: this network sees 281 pixels to each side; take 576 and a multiple of 32 more"),
        (281, 600, "--tile 600.*multiple of 32 more"),
    ],
)
def test_tiles_that_do_not_suit_the_network_are_refused(margin: int | None, tile: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiling(32, margin, tile)


def test_weights_keep_the_names_that_they_have_outside(tmp_path: Path) -> None:
    network = load_bundle(str(outside_bundle(tmp_path / "bundle", "convs"))).network()
    assert isinstance(network, Outside)
    assert set(network.state_dict()) == set(network.module.state_dict())
    assert "encoder.first.0.weight" in network.state_dict()


def test_prediction_takes_the_module_as_it_is() -> None:
    """Folding norms follows lists of layers, which need not be the order in which a module from outside runs them."""
    network = build_outside(OutsideVariant(name="smp", encoder="gated"), 3, 3).eval()
    image = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        for one in (network, FlipsAndTurns(network)):
            folded = one.folded()
            torch.testing.assert_close(folded(image), one(image), rtol=1e-5, atol=1e-6)
            assert any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


def test_old_descriptions_read_and_write_as_before() -> None:
    told = load_bundle("roads-buildings").description
    assert told.model_dump(mode="json")["variant"] == {"name": "unet", "depth": 4, "width": 16, "norm": "batch"}
    assert BundleDescription.model_validate_json(told.model_dump_json()) == told


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        ({"name": "smp"}, "the setting 'variant.encoder' is missing"),
        ({"name": "smp", "encoder": "convs", "depth": 4}, "no setting 'variant.depth'"),
        (
            {"name": "smp", "encoder": "convs", "options": {"encoder_weights": "imagenet"}},
            "weights come with the bundle",
        ),
        ({"name": "unets", "depth": 4}, "variant: its name is one of unet, .*, or smp"),
        ({"name": "smp", "encoder": "resnet"}, "makes no Unet of resnet with options .*: 'Unet resnet is not there'"),
        ({"name": "smp", "encoder": "convs", "options": {"size": 3}}, "makes no Unet of convs.*size"),
    ],
)
def test_a_wrong_description_is_refused(variant: dict[str, object], sentence: str, tmp_path: Path) -> None:
    bundle = load_bundle(str(outside_bundle(tmp_path / "bundle", "convs")))
    told = {**bundle.description.model_dump(mode="json"), "variant": variant}
    with pytest.raises(ConfigError, match=sentence):
        Bundle.from_bytes(json.dumps(told).encode(), bundle.weights, origin="there")


def test_without_the_extra_a_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = outside_bundle(tmp_path / "bundle", "convs")
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    told = CliRunner().invoke(main, ["models", "--bundle", str(folder)])
    assert told.exit_code == 2
    assert "pip install 'geoseg[encoders]'" in told.output


def test_a_bundle_is_put_together_of_a_description_and_weights(tmp_path: Path) -> None:
    made = load_bundle(str(outside_bundle(tmp_path / "made", "convs")))
    told = made.description.model_dump(mode="json")
    del told["variant"]["margin"], told["variant"]["options"]
    (tmp_path / "model.json").write_text(json.dumps(told))
    (tmp_path / "weights.safetensors").write_bytes(made.weights)
    words = [
        "bundle",
        str(tmp_path / "model.json"),
        str(tmp_path / "weights.safetensors"),
        "--out",
        str(tmp_path / "b"),
    ]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "Unet of convs, stride 4, margin 7 measured; tiles of 528" in done.output
    assert load_bundle(str(tmp_path / "b")) == made
    (tmp_path / "weights.safetensors").unlink()
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "no bundle can be made" in done.output


def test_the_costs_of_a_network_from_outside_are_those_of_its_tiles(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["models", "--bundle", str(outside_bundle(tmp_path / "gated", "gated"))])
    assert told.exit_code == 0, told.output
    row = told.output.splitlines()[-1].split()
    assert (row[0], *row[2:5]) == ("outside-gated", "4", "none", "256")
    network = build_outside(OutsideVariant(name="smp", encoder="gated"), 3, 3)
    costs = count_costs(network, 3)
    assert 3.9 < costs.flops_in_window / costs.flops_per_pixel <= 4, "each pixel lies in four tiles"


@pytest.fixture
def real() -> Iterator[None]:
    with real_encoders():
        yield


@pytest.mark.parametrize(
    ("encoder", "margin"),
    [("resnet18", 281), ("mobilenet_v2", 309), ("efficientnet-b0", None), ("tu-convnext_nano", None)],
)
@pytest.mark.slow
def test_the_margin_of_real_encoders(encoder: str, margin: int | None, real: None) -> None:
    """By hand for resnet18: 217 pixels at stride 32 (a field of 435), and 2 x 2 convolutions of 3 x 3 at 16, 8, 4, 2 and 1."""
    assert measured(OutsideVariant(name="smp", encoder=encoder), 3).margin == margin


@pytest.mark.slow
def test_a_real_encoder_sees_its_margin_and_no_more(real: None) -> None:
    """With weights as they come: pixels beyond the margin move nothing, some inside it do."""
    torch.manual_seed(0)
    network = build_outside(OutsideVariant(name="smp", encoder="resnet18", margin=281), 3, 3).eval().double()
    around, margin = network.halo + 64, network.margin
    image = torch.randn(1, 3, 2 * around + 32, 64, dtype=torch.double)
    moved = []
    with torch.inference_mode():
        core = network(image)[..., around : around + 32, :]
        for beyond in (margin, margin - 32):
            changed = image.clone()
            changed[..., : around - beyond, :] += 5
            changed[..., around + 32 + beyond :, :] += 5
            moved.append(bool((network(changed)[..., around : around + 32, :] != core).any()))
    assert moved == [False, True]
