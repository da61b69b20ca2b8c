"""What every network of the family keeps to; what is special about one stands at the end."""

from __future__ import annotations

import pytest
import torch

from geoseg.errors import ConfigError
from geoseg.model.attention_unet import AttentionUNet
from geoseg.model.blocks import ResidualUnit, Sigmoid, UpsampleBilinear
from geoseg.model.description import UNetVariant
from geoseg.model.network import Network
from geoseg.model.reach import derive_reach
from geoseg.model.resunet import ResUNet
from geoseg.model.unet import UNet
from geoseg.model.unet3d import UNet3D
from geoseg.model.unet_plus_plus import UNetPlusPlus
from geoseg.model.variants import STACK_VARIANTS, VARIANTS, build
from geoseg.model.vnet import VNet
from geoseg.model.volume import Conv3d, mean_over_dates

DATES = 2


def channels(name: str) -> int:
    """Input channels of ``seeded``: two bands, for a stack with validity and at each date."""
    return 3 * DATES if name in STACK_VARIANTS else 2


def num_parameters(network: Network) -> int:
    return sum(weights.numel() for weights in network.parameters())


def seeded(name: str, depth: int, norm: str, *, width: int = 3) -> Network:
    """An untrained network in evaluation mode whose norms have seen something."""
    torch.manual_seed(depth)
    network = build(
        UNetVariant(name=name, depth=depth, width=width, norm=norm), 2, 3, dates=DATES if name in STACK_VARIANTS else 1
    )
    for _ in range(2):
        network(torch.randn(2, channels(name), 4 * 2**depth, 4 * 2**depth) * 2 + 1)
    return network.eval()


@pytest.mark.parametrize("name", [*VARIANTS, *STACK_VARIANTS])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("depth", [1, 2, 3])
class TestEveryVariant:
    @pytest.mark.sample(without=["3-none-vnet", "3-batch-vnet"])
    def test_both_paddings_give_the_core_the_same_logits(self, name: str, norm: str, depth: int) -> None:
        network = seeded(name, depth, norm).double()
        side = 3 * network.stride + 2 * network.margin
        image = torch.randn(1, channels(name), side, side + network.stride, dtype=torch.double)
        with torch.inference_mode():
            same = network.core_logits(image)
            with network.padded("valid"):
                valid = network.core_logits(image)
        assert same.shape == (1, 3, 3 * network.stride, 4 * network.stride)
        torch.testing.assert_close(valid, same, rtol=0, atol=1e-12)

    @pytest.mark.sample(without=["3-none-vnet", "3-batch-vnet"])
    def test_the_margin_is_enough_and_one_stride_less_is_not(self, name: str, norm: str, depth: int) -> None:
        """Pixels beyond the margin move no logit of the core; some pixel less than a stride inside it does."""
        network = seeded(name, depth, norm, width=1 if name == "vnet" else 3).double()
        stride, margin = network.stride, network.margin
        around = -(-margin // stride) * stride + 2 * stride
        side = stride + 2 * around
        image = torch.randn(1, channels(name), side, side, dtype=torch.double, requires_grad=True)
        core = network(image)[..., around : around + stride, around : around + stride]
        moved = torch.zeros(side, side, dtype=torch.bool)
        for _ in range(4):  # an image may leave a path of ReLUs dark; not four of them
            (slopes,) = torch.autograd.grad((core * torch.randn_like(core)).sum(), image, retain_graph=True)
            moved |= (slopes[0] != 0).any(0)
            rows, cols = moved.any(1).nonzero()[:, 0].tolist(), moved.any(0).nonzero()[:, 0].tolist()
            if min([*rows, *cols, side]) < around - margin + stride:
                break
            image = torch.randn_like(image, requires_grad=True)
            core = network(image)[..., around : around + stride, around : around + stride]
        assert around - margin <= min(*rows, *cols) < around - margin + stride
        assert max(*rows, *cols) < around + stride + margin

    def test_folding_batch_norm_keeps_the_function(self, name: str, norm: str, depth: int) -> None:
        network = seeded(name, depth, norm)
        image = torch.randn(1, channels(name), 8 * network.stride, 6 * network.stride)
        folded = network.folded()
        norms = [
            sum(isinstance(one, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)) for one in each.modules())
            for each in (network, folded)
        ]
        assert norms[1] < norms[0] or norm == "none"
        with torch.inference_mode():
            torch.testing.assert_close(folded(image), network(image), rtol=1e-4, atol=1e-4)
        assert folded.reach == derive_reach(folded) == network.reach

    def test_a_side_that_halves_unevenly_is_refused(self, name: str, norm: str, depth: int) -> None:
        network = seeded(name, depth, norm)
        with pytest.raises(ValueError, match="must be even"):
            network(torch.zeros(1, channels(name), 2**depth - 1, 2**depth * 8))


def test_the_paper_s_unet() -> None:
    """572 x 572 in, 388 x 388 out (Ronneberger et al. 2015, figure 1); 31.0 M parameters follow from its channels."""
    network = UNet(1, 2, depth=4, width=64, norm="none", padding="valid")
    assert num_parameters(network) == 31_030_658
    assert (network.stride, network.margin, network.halo, network.reach.shrinkage) == (16, 94, 96, 92)
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


def test_the_paper_s_unet_plus_plus() -> None:
    """9.04 M parameters (Zhou et al. 2018)."""
    assert round(num_parameters(UNetPlusPlus(3, 2)) / 1e6, 2) == 9.04


def test_a_pruned_unet_plus_plus_gives_the_logits_of_its_depth() -> None:
    network = seeded("unet++", 3, "batch")
    assert isinstance(network, UNetPlusPlus)
    image = torch.randn(1, 2, 64, 64)
    with torch.inference_mode():
        each = network.all_logits(image)
        torch.testing.assert_close(network(image), sum(each) / 3)
        for depth in (1, 2, 3):
            pruned = network.pruned(depth)
            assert torch.equal(pruned(image), each[depth - 1])
            assert pruned.stride == 2**depth
    assert num_parameters(network.pruned(1)) < num_parameters(network.pruned(2)) < num_parameters(network)
    with pytest.raises(ConfigError, match="pruned to 1 to 3"):
        network.pruned(4)


def test_the_paper_s_resunet() -> None:
    """7.8 M parameters (Zhang et al. 2018), which leaves out the 1 x 1 convolutions of the shortcuts."""
    network = ResUNet(3, 2)
    shortcuts = [module.shortcut for module in network.modules() if isinstance(module, ResidualUnit)]
    projections = sum(weights.numel() for shortcut in shortcuts for weights in shortcut.parameters())
    assert num_parameters(network) == 8_221_058
    assert round((num_parameters(network) - projections) / 1e6, 1) == 7.8


def test_the_attention_unet_is_a_unet_with_gates() -> None:
    """The paper counts its three-dimensional form alone; here the gates are counted by hand."""
    of_gates = 0
    for skip, deep in ((512, 1024), (256, 512), (128, 256)):
        inner = skip // 2
        of_gates += 4 * skip * inner + (deep + 1) * inner + (inner + 1) + (skip + 1) * skip + 2 * skip
    network = AttentionUNet(3, 2)
    assert num_parameters(network) == num_parameters(UNet(3, 2, norm="batch")) + of_gates == 32_417_541


def test_a_closed_gate_lets_nothing_of_a_skip_through() -> None:
    network = AttentionUNet(2, 3, depth=2, width=4).eval()
    weigh = network.gates[0].weigh[1]
    image = torch.randn(1, 2, 32, 32)
    with torch.inference_mode():
        seen = []
        for bias in (-1e4, 1e4):
            weigh.bias.fill_(bias)
            skip, deep = torch.randn(1, 8, 16, 16), torch.randn(1, 16, 8, 8)
            gate = network.gates[0]
            torch.testing.assert_close(gate(skip, deep), gate.out(skip * (bias > 0)))
            seen.append(network(image))
    assert not torch.allclose(*seen)


def test_a_sigmoid_rounds_alike_for_any_number_of_values() -> None:
    """Those of torch's own that fill no vector are computed in another way."""
    values = torch.randn(100_003) * 5
    whole = Sigmoid()(values)
    torch.testing.assert_close(whole, torch.sigmoid(values))
    for start, num in ((start, 1 + start % 61) for start in range(0, 99_000, 97)):
        part = values[start : start + num].clone()
        assert torch.equal(Sigmoid()(part), whole[start : start + num])


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (7, 5)])
def test_bilinear_is_torch_s(shape: tuple[int, int]) -> None:
    features = torch.randn(2, 3, *shape)
    expected = torch.nn.functional.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
    raised = UpsampleBilinear()
    torch.testing.assert_close(raised(features), expected)
    if min(shape) > 1:
        raised.pad("valid")
        torch.testing.assert_close(raised(features), expected[..., 1:-1, 1:-1])


def test_the_paper_s_3d_unet() -> None:
    """19,069,955 parameters, 132 pixels in, 44 out (Çiçek et al. 2016, section 2); norms are not among the counted."""
    assert num_parameters(UNet3D(3, 3, norm="none")) == 19_069_955
    network = UNet3D(3, 3, padding="valid", width=1)
    assert 132 - 2 * network.reach.shrinkage == 44


def test_the_paper_s_vnet() -> None:
    """Its stages have 1, 2, 3, 3 convolutions, 3 at the bottom: 551 pixels seen (Milletari et al. 2016, table 1).

    The table counts an up-convolution of kernel 2 as if a pixel came of two: 1, 2, 4 and 8 pixels too many. The first
    pixel of a core sees the margin before it, the last one the margin behind it, 16 pixels further on.
    """
    network = VNet(1, 2)
    assert [sum(isinstance(one, Conv3d) for one in stage.convs) for stage in network.down] == [1, 2, 3, 3, 3]
    assert [sum(isinstance(one, Conv3d) for one in stage.convs) for stage in network.up] == [3, 3, 2, 1]
    assert network.stride == 16
    seen, jump, after = 1, 1, []
    for stage in network.down:
        seen += 4 * jump * sum(isinstance(one, Conv3d) for one in stage.convs)
        after.append(seen)
        seen, jump = seen + jump, 2 * jump
    assert after == [5, 22, 72, 172, 372]
    assert network.margin == 274


@pytest.mark.parametrize("made", [UNet3D, VNet])
def test_a_date_that_is_not_valid_does_not_vote(made: type[UNet3D | VNet]) -> None:
    torch.manual_seed(1)
    network = made(3, 3, dates=3, depth=1, width=2).eval()
    stack = torch.randn(1, 3, 3, 16, 16)
    stack[:, :, 2] = 1  # valid
    of_dates = []
    network.head.register_forward_hook(lambda _layer, _image, out: of_dates.append(out))
    with torch.inference_mode():
        stack[:, 1] = 0
        stack[:, 1, 2] = 0
        logits = network(stack.flatten(1, 2))
    torch.testing.assert_close(logits, (of_dates[0][:, :, 0] + of_dates[0][:, :, 2]) / 2)
    torch.testing.assert_close(logits, mean_over_dates(of_dates[0], stack.transpose(1, 2)))


def test_dates_are_for_stacks() -> None:
    with pytest.raises(ConfigError, match="a unet takes one date, got 4; stacks are for unet3d and vnet"):
        build(UNetVariant(), 3, 3, dates=4)


@pytest.mark.parametrize(("depth", "margin"), [(1, 8), (2, 22), (3, 46), (4, 94)])
def test_margins_of_the_unet(depth: int, margin: int) -> None:
    assert UNet(1, 2, depth=depth, width=1).margin == margin


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"width": 0}])
def test_a_network_without_levels_or_channels_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a U-Net needs"):
        UNet(1, 2, **wrong)


def test_padding_can_be_changed_for_a_while() -> None:
    network = UNet(1, 2, depth=1, width=1)
    with network.padded("valid"):
        assert network.padding == "valid"
        assert network(torch.zeros(1, 1, 20, 20)).shape[-1] == 20 - 2 * network.reach.shrinkage
    assert network(torch.zeros(1, 1, 20, 20)).shape[-1] == 20


def test_a_norm_over_the_window_has_no_margin() -> None:
    network = UNet(2, 3, depth=1, width=2)
    network.down[0].append(torch.nn.GroupNorm(1, 2))
    with pytest.raises(ConfigError, match=r"GroupNorm.*no margin is exact"):
        derive_reach(network)
