"""The U-Net of the 2015 paper: its sizes, its parameters, and one set of weights for both paddings."""

from __future__ import annotations

import pytest
import torch

from geoseg.errors import ConfigError
from geoseg.model.unet import UNet


def test_the_paper_s_network_has_the_paper_s_sizes() -> None:
    """572 x 572 in, 388 x 388 out (Ronneberger et al. 2015, figure 1); 31.0 M parameters follow from its channels."""
    network = UNet(1, 2, depth=4, width=64, norm="none", padding="valid")
    assert sum(weights.numel() for weights in network.parameters()) == 31_030_658
    assert (network.stride, network.margin, network.halo, network.shrinkage) == (16, 94, 96, 92)
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_folding_batch_norm_keeps_the_function(depth: int, norm: str) -> None:
    torch.manual_seed(0)
    network = UNet(2, 3, depth=depth, width=3, norm=norm)
    for _ in range(3):
        network(torch.randn(2, 2, 32, 32) * 3 + 1)  # gives the norms something to remember
    network.eval()
    image = torch.randn(1, 2, 48, 64)
    folded = network.folded()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        torch.testing.assert_close(folded(image), network(image), rtol=1e-4, atol=1e-4)
    assert folded.margin == network.margin


def test_an_input_that_pools_unevenly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(30, 32\).*must be even"):
        UNet(1, 2, depth=2, width=1)(torch.zeros(1, 1, 30, 32))
    with pytest.raises(ValueError, match="padding='valid'"):
        UNet(1, 2, depth=4, width=1, padding="valid")(torch.zeros(1, 1, 570, 570))


def test_padding_can_be_changed_for_a_while() -> None:
    network = UNet(1, 2, depth=1, width=1)
    with network.padded("valid"):
        assert network.padding == "valid"
        assert network(torch.zeros(1, 1, 20, 20)).shape[-1] == 20 - 2 * network.shrinkage
    assert network(torch.zeros(1, 1, 20, 20)).shape[-1] == 20


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"width": 0}])
def test_a_network_without_levels_or_channels_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a U-Net needs"):
        UNet(1, 2, **wrong)
