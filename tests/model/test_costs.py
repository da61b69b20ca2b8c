"""Costs are counted without computing; here they are held against what is computed."""

from __future__ import annotations

import itertools

import pytest
import torch
from click.testing import CliRunner

from geoseg.cli import main
from geoseg.model.costs import count_costs, peak_bytes, shadow_of
from geoseg.model.description import UNetVariant
from geoseg.model.unet import UNet
from geoseg.model.variants import STACK_VARIANTS, VARIANTS, build

WIDTH = 3


def test_operations_of_a_small_unet_counted_by_hand() -> None:
    """Multiply-adds of each convolution times the pixels it is computed for, all of them at a quarter below the pooling."""
    costs = count_costs(UNet(2, 3, depth=1, width=WIDTH), 2, core=100)
    full = 9 * (2 * WIDTH + WIDTH * WIDTH) + 9 * (2 * WIDTH * WIDTH + WIDTH * WIDTH) + WIDTH * 3
    deep = 9 * (WIDTH * 2 * WIDTH + 4 * WIDTH * WIDTH)
    raised = 2 * WIDTH * WIDTH  # a kernel of 2 x 2 at stride 2: one product for each pixel and pair of channels
    assert costs.flops_per_pixel == 2 * (full + deep / 4 + raised)
    assert costs.flops_per_pixel < costs.flops_in_window < costs.flops_padded
    assert (costs.core, costs.margin, costs.stride) == (100, 8, 2)


def test_a_window_has_less_waste_the_larger_it_is() -> None:
    network = UNet(2, 3, depth=2, width=WIDTH)
    small, large = (count_costs(network, 2, core=core) for core in (128, 1024))
    assert small.flops_per_pixel == large.flops_per_pixel
    assert large.flops_in_window / large.flops_per_pixel < 1.05 < small.flops_in_window / small.flops_per_pixel


@pytest.mark.parametrize("name", [*VARIANTS, *STACK_VARIANTS])
def test_the_peak_is_what_torch_allocates(name: str) -> None:
    """Beside the tensors torch's profiler sees scratch memory, such as weights in another order; of volumes more."""
    dates = 4 if name in STACK_VARIANTS else 1
    channels = 4 * dates if dates > 1 else 3
    network = build(UNetVariant(name=name, depth=2, width=8, norm="batch"), 3, 3, dates=dates).folded()
    network.padding = "valid"
    side = 128 + 2 * network.margin
    shadow = shadow_of(network)
    shadow.padding = "valid"
    told = peak_bytes(shadow, (1, channels, side, side))
    image = torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(image)
        with torch.profiler.profile(profile_memory=True) as profile:
            network(image)
    results = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(results, key=lambda one: one.start_ns()) if event.name() == "[memory]"]
    allocated = max(itertools.accumulate(sizes)) + image.nbytes
    assert told <= allocated < (1.6 if dates > 1 else 1.35) * told


def test_the_networks_are_listed() -> None:
    told = CliRunner().invoke(main, ["models", "--window", "64", "--bundle", "roads-buildings"])
    assert told.exit_code == 0, told.output
    names = [line.split()[0] for line in told.output.splitlines()]
    assert names == ["network", *VARIANTS, *STACK_VARIANTS, "roads-buildings"]
    assert "31,031,875     16     94     64" in told.output
