"""Networks from outside: U-Nets of segmentation_models.pytorch with any encoder of its own or of timm.

Their layers follow no rules of ours, so the margin is not derived but measured, and where there is none they are blended.
Legend of axes: b batch, k input channels, c channels, h rows, w columns.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from geoseg.errors import ConfigError
from geoseg.model.blocks import Padding
from geoseg.model.description import OutsideVariant
from geoseg.model.network import Network
from geoseg.model.reach import Reach
from geoseg.model.tiling import MAX_MARGIN

_STRIDE = 32  # of five halvings, where the encoder does not say
_SMALL = 1e-30
_NEGLIGIBLE = 1e-3
_LINEAR = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class Outside(Network):
    """A module from outside as a network: padding ``same`` alone, sides that are multiples of ``stride``.

    Its weights have the names that they have in the module.
    """

    from_outside = True

    def __init__(self, module: nn.Module, *, stride: int, margin: int | None) -> None:
        super().__init__()
        self.module = module
        self._stride, self.measured_margin = stride, margin

    def logits(self, image_bkhw: Tensor) -> Tensor:
        """See ``Network.logits``."""
        logits_bchw: Tensor = self.module(image_bkhw)
        return logits_bchw

    @property
    def padding(self) -> Padding:
        """``same``, as far as its own code has it."""
        return "same"

    @padding.setter
    def padding(self, padding: Padding) -> None:
        """``same`` alone; what its layers call a padding is their own."""
        assert padding == "same"

    @property
    def stride(self) -> int:
        """See ``Network.stride``."""
        return self._stride

    @cached_property
    def reach(self) -> Reach:
        """Stride and margin as they were measured. Raises ConfigError when no margin is exact."""
        if self.measured_margin is None:
            raise ConfigError("this network sees the whole of its input, so no margin is exact; it is blended")
        return Reach(self._stride, self.measured_margin, 0)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module.load_state_dict(*args, **kwargs)


def build_outside(variant: OutsideVariant, num_bands: int, num_classes: int) -> Outside:
    """The network with random weights. Raises ConfigError when the extra is missing or knows no such network."""
    module = _module(variant, num_bands, num_classes)
    stride = getattr(getattr(module, "encoder", None), "output_stride", _STRIDE)
    return Outside(module, stride=stride, margin=variant.margin)


def measured(variant: OutsideVariant, num_bands: int) -> OutsideVariant:
    """The variant with the margin that its network has; takes seconds. Raises as ``build_outside``."""
    network = build_outside(variant, num_bands, 2)
    margin = measure_margin(network.module, num_bands, stride=network.stride)
    return variant.model_copy(update={"margin": margin})


def _module(variant: OutsideVariant, num_bands: int, num_classes: int) -> nn.Module:
    try:
        import segmentation_models_pytorch as smp
    except (ImportError, RuntimeError, AttributeError) as error:  # torchvision beside a torch that it was not built for
        raise ConfigError(
            f"the bundle's network is a {variant.title} of segmentation_models.pytorch, which cannot be imported ({error}); "
            "install it with: pip install 'geoseg[encoders]'"
        ) from error
    try:
        module: nn.Module = smp.create_model(
            variant.architecture,
            variant.encoder,
            encoder_weights=None,
            in_channels=num_bands,
            classes=num_classes,
            **variant.options,
        )
    except (KeyError, ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"segmentation_models.pytorch makes no {variant.title} with options {variant.options}: {lines[0]}"
        ) from error
    return module.eval()


def measure_margin(module: nn.Module, num_bands: int, *, stride: int) -> int | None:
    """Pixels of context that a core on multiples of ``stride`` needs on every side; None when they are more than MAX_MARGIN.

    A core in the middle of a long strip is followed back by its gradient: pixels whose slope is not zero have a say. The
    layers are those of the module, in evaluation mode; their weights are random and positive and add up to one, so that no
    path is dark and none cancels another; values are small, so that nothing saturates; and a mean stands for a maximum,
    whose slope knows one pixel of its window alone.
    So the margin is a property of the layers, and the weights can only use less. Sides are measured along rows and columns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = copy.deepcopy(module).eval().double().requires_grad_(requires_grad=False)
        _average_for_max(probe)
        _draw_weights(probe)
        margins = [_margin_along(probe, axis, num_bands, stride) for axis in (-2, -1)]
    return None if None in margins else max(margin for margin in margins if margin is not None)


def _margin_along(probe: nn.Module, axis: int, num_bands: int, stride: int) -> int | None:
    before = -(-2 * MAX_MARGIN // stride) * stride  # further, since a dilated convolution leaves gaps
    size = [1, num_bands, 2 * stride, 2 * stride]
    size[axis] = 2 * before + stride
    strip = (torch.rand(size, dtype=torch.double) * _SMALL).requires_grad_()
    core = probe(strip).narrow(axis, before, stride)
    (slopes,) = torch.autograd.grad((core * torch.rand_like(core)).sum(), strip)
    seen = (slopes != 0).movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
    if not len(seen):
        raise ConfigError(f"{type(probe).__name__}: its logits do not follow from the image")
    margin = max(before - int(seen.min()), int(seen.max()) - (before + stride - 1), 0)
    return margin if margin <= MAX_MARGIN else None


def _average_for_max(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d) and child.dilation == 1 and not child.return_indices:
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode))
        else:
            _average_for_max(child)


def _draw_weights(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, _LINEAR):
            layer.weight.uniform_(0.5, 1.5)
            layer.weight.div_(layer.weight[0].numel())
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 (the base of those for 1, 2 and 3 axes)
            layer.reset_parameters()
        elif not isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            # A scale of a layer's own, as that of ConvNeXt's blocks, begins so near zero that its branch would not be seen.
            for weights in layer.parameters(recurse=False):
                if weights.abs().max() < _NEGLIGIBLE:
                    weights.fill_(1.0)
