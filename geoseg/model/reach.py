"""How far a network sees, derived from its layers: the stride of its windows and the margin they need.

The layers are traced once; along one axis, since all that is done to rows is done to columns. A core that begins and ends
on multiples of the stride is followed back from the logits to the image (what it needs) and an image with that margin is
followed forward through valid convolutions (what is left of it). Each feature map covers its share of the core and some
pixels more on either side; these are counted here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from geoseg.errors import ConfigError
from geoseg.model import blocks, volume


@dataclass(frozen=True, slots=True)
class Reach:
    """``stride``: cores begin and end on multiples of it. ``margin``: pixels of context a core needs on every side.

    ``shrinkage``: pixels that valid convolutions take off each side of a core with its margin.
    """

    stride: int
    margin: int
    shrinkage: int


@dataclass(frozen=True, slots=True)
class _Rule:
    """What one layer does along an axis.

    ``needed`` of its input for so many pixels beyond the core of its output; ``left`` of the input's after valid
    convolutions, None when the pixels in hand do not fall on the layer's grid; ``factor`` from input to output size;
    ``stride``: cores of its input begin and end on multiples of it.
    """

    needed: Callable[[int], int]
    left: Callable[[int], int | None]
    factor: float = 1.0
    stride: int = 1


_POINTWISE = (nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.PReLU, nn.Identity, blocks.Sigmoid)
_JOINS = (blocks.concat, blocks.added, blocks.scaled, volume.volume, volume.mean_over_dates)
# Rows become columns and first becomes last, but both ends of both axes have as many pixels beyond the core.
_TURNS = (torch.flip, torch.rot90)
_SAME = _Rule(lambda pixels: pixels, lambda pixels: pixels)
_HALVED = _Rule(lambda pixels: 2 * pixels, lambda pixels: None if pixels % 2 else pixels // 2, 0.5)
# Every second pixel, beside a 3 x 3 convolution of stride 2, which begins one pixel in.
_THINNED = _Rule(lambda pixels: 2 * pixels, lambda pixels: (pixels - 1) // 2 if pixels % 2 else None, 0.5)
_DOUBLED = _Rule(lambda pixels: -(-pixels // 2), lambda pixels: 2 * pixels, 2.0)


def derive_reach(network: nn.Module, *, method: str = "logits", beyond: int = 0) -> Reach:
    """Stride, margin and shrinkage of a network's ``method``, a function of one image, for a core and ``beyond`` around it.

    Raises ConfigError naming a layer whose output depends on the whole window, so that no margin is exact.
    """
    nodes, rules = _traced(network, method)
    stride = _stride(nodes, rules)
    needed = _needed(nodes, rules, beyond)
    for margin in range(needed, needed + stride + 1):
        left = _left(nodes, rules, margin)
        if left is not None and left >= beyond:
            return Reach(stride, margin, margin - left)
    raise ConfigError(f"{type(network).__name__}: no margin lets every layer fall on its grid with valid convolutions")


def _traced(network: nn.Module, method: str = "logits") -> tuple[list[fx.Node], list[_Rule]]:
    """The layers in the order they are run, and what each does."""
    tracer = _Tracer(autowrap_functions=_JOINS)
    tracer.traced_func_name = method
    nodes = [node for node in tracer.trace(network).nodes if node.op != "output"]
    rules: dict[Any, _Rule] = {}
    for node in nodes:  # a layer that is run several times is looked at once
        if (node.op, node.target) not in rules:
            rules[node.op, node.target] = _rule(network, node)
    return nodes, [rules[node.op, node.target] for node in nodes]


class _Tracer(fx.Tracer):
    """Follows the forward pass down to single layers, and to networks within the network."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del module_qualified_name
        return not list(m.children()) or _is_network(m)


def _is_network(layer: nn.Module) -> bool:
    """Whether it is a ``Network``, whose module imports this one."""
    return callable(getattr(layer, "logits", None))


def _rule(network: nn.Module, node: fx.Node) -> _Rule:
    if node.op == "placeholder" or node.target in (*_JOINS, *_TURNS, operator.mul):
        return _SAME
    layer: Any = network.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    rule = _own_rule(layer) or _other_rule(layer)
    if rule is None:
        raise ConfigError(
            f"{type(network).__name__}: layer {node.target} ({type(layer).__name__}) is not known to see a fixed number of "
            "pixels, so no margin is exact"
        )
    return rule


def _own_rule(layer: Any) -> _Rule | None:
    """The rule of a layer that depends on its settings."""
    if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
        return _conv_rule(layer)
    if isinstance(layer, blocks.UpsampleBilinear):
        half = layer.factor // 2
        return _Rule(
            lambda pixels: (pixels + half - 1) // layer.factor + 1,
            lambda pixels: layer.factor * pixels - half,
            layer.factor,
        )
    if isinstance(layer, blocks.Trim):
        return _Rule(lambda pixels: pixels, lambda pixels: pixels - layer.pixels)
    if isinstance(layer, nn.Module) and _is_network(layer):
        nodes, rules = _traced(layer)
        return _Rule(
            lambda pixels: _needed(nodes, rules, pixels),
            lambda pixels: _left(nodes, rules, pixels),
            stride=_stride(nodes, rules),
        )
    return None


def _other_rule(layer: Any) -> _Rule | None:
    known: list[tuple[type | tuple[type, ...], _Rule]] = [
        (_POINTWISE, _SAME),
        ((blocks.Pool, blocks.Downsample, volume.Pool3d), _HALVED),
        (blocks.Subsample, _THINNED),
        ((blocks.UpConv2d, volume.UpConv3d, blocks.UpsampleNearest), _DOUBLED),
    ]
    return next((rule for kind, rule in known if isinstance(layer, kind)), None)


def _conv_rule(layer: nn.Conv2d | nn.Conv3d) -> _Rule | None:
    size, stride, dilation = layer.kernel_size[-1], layer.stride[-1], layer.dilation[-1]
    beyond = dilation * (size // 2)
    if size % 2 == 0:
        return _HALVED if size == stride == 2 else None
    if stride == 1:
        return _Rule(lambda pixels: pixels + beyond, lambda pixels: pixels - beyond)
    if stride == 2 and beyond == 1:
        return _Rule(lambda pixels: 2 * pixels + 1, _THINNED.left, 0.5)
    return None


def _stride(nodes: Sequence[fx.Node], rules: Sequence[_Rule]) -> int:
    size: dict[fx.Node, float] = {}
    for node, rule in zip(nodes, rules, strict=True):
        sizes = {size[before] for before in node.all_input_nodes} or {1.0}
        if len(sizes) > 1:
            raise ConfigError(f"{node.target} joins features of different resolutions: {sorted(sizes)}")
        size[node] = sizes.pop() * rule.factor
    return round(1 / min(size[node] / rule.stride for node, rule in zip(nodes, rules, strict=True)))


def _needed(nodes: Sequence[fx.Node], rules: Sequence[_Rule], beyond: int) -> int:
    """Pixels of the image beyond a core, for its logits and ``beyond`` more on every side."""
    needed = dict.fromkeys(nodes, 0)
    needed[nodes[-1]] = beyond
    for node, rule in zip(reversed(nodes), reversed(rules), strict=True):
        for before in node.all_input_nodes:
            needed[before] = max(needed[before], rule.needed(needed[node]))
    return needed[nodes[0]]


def _left(nodes: Sequence[fx.Node], rules: Sequence[_Rule], margin: int) -> int | None:
    """Logits beyond a core that come of an image with ``margin`` around it; None when a layer's grid is missed."""
    left: dict[fx.Node, int] = {}
    for node, rule in zip(nodes, rules, strict=True):
        after = rule.left(min((left[before] for before in node.all_input_nodes), default=margin))
        if after is None or after < 0:
            return None
        left[node] = after
    return after
