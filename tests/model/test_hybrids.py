"""A network run several times keeps to what a network keeps to, and its parts are what torch and the group D4 say."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geoseg.errors import ConfigError
from geoseg.model.blocks import Downsample, UpsampleBilinear
from geoseg.model.description import UNetVariant
from geoseg.model.hybrids import FlipsAndTurns, Pyramid
from geoseg.model.network import Network
from geoseg.model.variants import VARIANTS, build

HYBRIDS: dict[str, Callable[[Network], Network]] = {
    "D4": FlipsAndTurns,
    "1,2": lambda network: Pyramid(network, (1, 2)),
    "1,2,4": lambda network: Pyramid(network, (1, 2, 4)),
    "1,8": lambda network: Pyramid(network, (1, 8)),
    "2": lambda network: Pyramid(network, (2,)),
    "4 nearest": lambda network: Pyramid(network, (4,), resampling="nearest"),
    "1,2 nearest": lambda network: Pyramid(network, (1, 2), resampling="nearest"),
    "D4 of 1,2": lambda network: FlipsAndTurns(Pyramid(network, (1, 2))),
}


def seeded(name: str = "unet", depth: int = 1) -> Network:
    """An untrained network in double precision whose norms have seen something."""
    torch.manual_seed(depth)
    network = build(UNetVariant(name=name, depth=depth, width=3, norm="batch"), 2, 3)
    for _ in range(2):
        network(torch.randn(2, 2, 32, 32) * 2 + 1)
    return network.eval().double()


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize(("name", "depth"), [(name, 2 if name == "unet" else 1) for name in VARIANTS])
class TestEveryHybrid:
    def test_both_paddings_give_the_core_the_same_logits(self, hybrid: str, name: str, depth: int) -> None:
        network = HYBRIDS[hybrid](seeded(name, depth))
        side = network.stride + 2 * network.margin
        image = torch.randn(1, 2, side, side + network.stride, dtype=torch.double)
        with torch.inference_mode():
            same = network.core_logits(image)
            with network.padded("valid"):
                valid = network.core_logits(image)
        assert same.shape == (1, 3, network.stride, 2 * network.stride)
        torch.testing.assert_close(valid, same, rtol=0, atol=1e-12)

    @pytest.mark.sample(without=["unet-2-1,8"])
    def test_the_margin_is_enough_and_one_stride_less_is_not(self, hybrid: str, name: str, depth: int) -> None:
        network = HYBRIDS[hybrid](seeded(name, depth))
        stride, margin = network.stride, network.margin
        around = network.halo + stride
        side = stride + 2 * around
        moved = torch.zeros(side, side, dtype=torch.bool)
        for _ in range(4):  # an image may leave a path of ReLUs dark; not four of them
            image = torch.randn(1, 2, side, side, dtype=torch.double, requires_grad=True)
            core = network(image)[..., around : around + stride, around : around + stride]
            (slopes,) = torch.autograd.grad((core * torch.randn_like(core)).sum(), image)
            moved |= (slopes[0] != 0).any(0)
        rows = moved.any(1).nonzero()[:, 0]
        cols = moved.any(0).nonzero()[:, 0]
        first, last = int(min(rows.min(), cols.min())), int(max(rows.max(), cols.max()))
        assert around - margin <= first < around - margin + stride
        assert last < around + stride + margin


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4), (2, 8), (8,)])
@pytest.mark.parametrize("resampling", ["bilinear", "nearest"])
def test_stride_and_margin_are_those_of_the_coarsest_scale(name: str, scales: tuple[int, ...], resampling: str) -> None:
    """What bilinear needs beyond a core costs a step of the deepest level at most."""
    for depth in (1, 3):
        network = build(UNetVariant(name=name, depth=depth, width=1, norm="batch"), 2, 3)
        pyramid = Pyramid(network, scales, resampling=resampling)
        assert pyramid.stride == network.stride * scales[-1]
        assert network.margin * scales[-1] <= pyramid.margin <= (network.margin + network.stride) * scales[-1]


def turned(image: Tensor, flipped: bool, quarters: int) -> Tensor:
    return (image.flip(-2) if flipped else image).rot90(quarters, (-2, -1))


def test_flips_and_turns_take_a_turned_scene_to_turned_logits() -> None:
    plain = seeded(depth=2).float()
    network = FlipsAndTurns(plain)
    image = torch.randn(1, 2, 24, 40)
    with torch.inference_mode():
        logits = network(image)
        assert (plain(turned(image, True, 0)) - turned(plain(image), True, 0)).abs().max() > 1e-2
        for flipped, quarters in itertools.product((False, True), range(4)):
            again = network(turned(image, flipped, quarters))
            torch.testing.assert_close(again, turned(logits, flipped, quarters), rtol=0, atol=1e-5)


def test_flips_and_turns_are_the_mean_of_eight() -> None:
    plain = seeded()
    image = torch.randn(1, 2, 24, 40, dtype=torch.double)
    each = [
        turned(plain(turned(image, flipped, quarters)).rot90(-quarters, (-2, -1)), flipped, 0)
        for flipped, quarters in itertools.product((False, True), range(4))
    ]
    torch.testing.assert_close(FlipsAndTurns(plain)(image), torch.stack(each).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("resampling", ["bilinear", "nearest"])
def test_down_is_what_torch_interpolates(resampling: str) -> None:
    image = torch.randn(2, 3, 38, 54)
    expected = F.interpolate(image, scale_factor=0.5, mode=resampling)
    torch.testing.assert_close(Downsample(resampling)(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_up_is_what_torch_interpolates_and_valid_leaves_out_what_lies_outside(factor: int) -> None:
    up = UpsampleBilinear(factor)
    features = torch.randn(2, 3, 7, 5)
    expected = F.interpolate(features, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(features), expected, rtol=0, atol=1e-6)
    whole, half = up(features), factor // 2
    up.pad("valid")
    assert torch.equal(up(features), whole[..., half:-half, half:-half])


@pytest.mark.parametrize("resampling", ["bilinear", "nearest"])
def test_a_pyramid_is_the_mean_over_halvings_by_torch(resampling: str) -> None:
    network = seeded(depth=1)
    image = torch.randn(1, 2, 64, 48, dtype=torch.double)
    half = F.interpolate(image, scale_factor=0.5, mode=resampling)
    quarter = F.interpolate(half, scale_factor=0.5, mode=resampling)
    each = [
        F.interpolate(network(smaller), size=(64, 48), mode=resampling) if smaller is not image else network(image)
        for smaller in (image, half, quarter)
    ]
    pyramid = Pyramid(network, (1, 2, 4), resampling=resampling)
    torch.testing.assert_close(pyramid(image), sum(each) / 3, rtol=0, atol=1e-12)
    alone = Pyramid(network, (4,), resampling=resampling)
    torch.testing.assert_close(alone(image), each[2], rtol=0, atol=1e-12)


def test_padding_reaches_the_network_within() -> None:
    network = seeded()
    hybrid = FlipsAndTurns(Pyramid(network, (1, 2)))
    with hybrid.padded("valid"):
        assert network.padding == "valid"
    assert network.padding == "same"


@pytest.mark.parametrize("scales", [(), (2, 1), (1, 3), (2, 2), (0, 1), (-1, 1)])
def test_a_pyramid_of_other_than_rising_powers_of_two_is_refused(scales: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="rising powers of two, for example 1,2,4"):
        Pyramid(seeded(), scales)


def test_a_side_that_halves_unevenly_is_refused() -> None:
    with pytest.raises(ValueError, match="must be even"):
        Pyramid(seeded(), (1, 2))(torch.zeros(1, 2, 15, 16, dtype=torch.double))
