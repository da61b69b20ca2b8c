"""What a network costs before it is run: operations for a pixel, memory for a window, counted on shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from geoseg.model.network import Network
from geoseg.model.outside import Outside
from geoseg.model.tiling import tiling
from geoseg.model.variants import STACK_VARIANTS, VARIANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one forward pass over a window of ``core`` x ``core`` pixels and its margin, in float32.

    ``flops_per_pixel`` (a product and a sum are two) are those that a pixel costs in an endless image, ``flops_in_window``
    those of a pixel of the core with its share of the margin, by valid convolutions, ``flops_padded`` the same by padded ones.
    ``margin`` is None where none is exact. A network from outside is run in tiles: there ``core`` is the step of the tiles,
    and in a window it costs what it costs padded.
    ``peak_bytes`` are the tensors that stand at once, input and logits included, weights and the library's scratch memory not.
    """

    num_parameters: int
    stride: int
    margin: int | None
    core: int
    flops_per_pixel: float
    flops_in_window: float
    flops_padded: float
    peak_bytes: int


def count_costs(network: Network, num_channels: int, *, core: int = 512) -> Costs:
    """The costs of a network for images of ``num_channels``; ``core`` is rounded up to the stride. Nothing is computed."""
    shadow = shadow_of(network)

    def flops(side: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            shadow(torch.empty(1, num_channels, side, side, device="meta"))
        return int(counter.get_total_flops())

    stride = network.stride
    if isinstance(network, Outside):
        tiles = tiling(stride, network.measured_margin)
        in_tile = flops(tiles.tile)
        return Costs(
            num_parameters=sum(weights.numel() for weights in network.parameters()),
            stride=stride,
            margin=network.measured_margin,
            core=tiles.step,
            flops_per_pixel=flops(8 * stride) / (8 * stride) ** 2,
            flops_in_window=in_tile / tiles.step**2,
            flops_padded=in_tile / tiles.step**2,
            peak_bytes=peak_bytes(shadow, (1, num_channels, tiles.tile, tiles.tile)),
        )
    margin, halo = network.margin, network.halo
    core = -(-core // stride) * stride
    with shadow.padded("valid"):
        in_window = flops(core + 2 * margin)
        peak = peak_bytes(shadow, (1, num_channels, core + 2 * margin, core + 2 * margin))
    return Costs(
        num_parameters=sum(weights.numel() for weights in network.parameters()),
        stride=stride,
        margin=margin,
        core=core,
        flops_per_pixel=flops(8 * stride) / (8 * stride) ** 2,
        flops_in_window=in_window / core**2,
        flops_padded=flops(core + 2 * halo) / core**2,
        peak_bytes=peak,
    )


def shadow_of(network: Network) -> Network:
    """The network as it is run, with shapes for weights."""
    return network.folded().to("meta")


def peak_bytes(shadow: Network, shape: Sequence[int]) -> int:
    """Bytes of the tensors that stand at once while a network on the device ``meta`` runs an image of ``shape``."""
    with torch.inference_mode(), _Standing() as standing:
        image = torch.empty(*shape, device="meta")  # a name of its own, so that it stands to the end
        shadow(image)
    return int(standing.peak)


def family_costs(*, core: int, dates: int) -> dict[str, Costs]:
    """The costs of each variant with the widths and depth of its paper, for 3 bands (of ``dates`` dates) and 3 classes."""
    of_images = {name: count_costs(made(3, 3), 3, core=core) for name, made in VARIANTS.items()}
    of_stacks = {
        name: count_costs(made(4, 3, dates=dates), 4 * dates, core=core) for name, made in STACK_VARIANTS.items()
    }
    return {**of_images, **of_stacks}


def costs_table(costs: Mapping[str, Costs]) -> list[str]:
    """A heading and a line for each network."""
    heading = (
        f"{'network':<16} {'parameters':>11} {'stride':>6} {'margin':>6} {'window':>6} {'kFLOP/px':>9} {'in window':>10} "
        f"{'padded':>10} {'peak MiB':>8}"
    )
    lines = [
        f"{name:<16} {one.num_parameters:>11,} {one.stride:>6} {'none' if one.margin is None else one.margin:>6} {one.core:>6} "
        f"{one.flops_per_pixel / 1e3:>9,.0f} {one.flops_in_window / 1e3:>10,.0f} {one.flops_padded / 1e3:>10,.0f} "
        f"{one.peak_bytes / 2**20:>8,.0f}"
        for name, one in costs.items()
    ]
    return [heading, *lines]


class _Standing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, until nothing holds them any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key = storage._cdata  # noqa: SLF001 (a storage has no other name)
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes
