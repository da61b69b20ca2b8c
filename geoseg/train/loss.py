"""From logits and labels to one number to make small; a pixel without a label counts for nothing.

Legend of axes: b batch, c classes, h rows, w columns.

Every loss is called as ``loss(logits_bchw, labels_bhw, weights_bhw=None)`` and gives a scalar, 0 for a perfect prediction:

- labels are class codes of any integer dtype, ``UNLABELLED`` where nothing is known. What a network says there, NaN and
  infinity included, moves neither the loss nor a gradient; where nothing at all is labelled both are 0.
- A pixel of weight 2 counts as two, one of weight 0 as none, so a factor on all weights changes nothing.
- Sums run over the whole batch and are divided once. The mean of an overlap per image would give a chip with ten pixels of
  road the voice of one with thousands, and has no value for a chip without any.

kornia's losses take no weights of pixels, its Lovász no label to ignore and its Tversky is a mean per image; hence these.
Half precision is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from geoseg.config import Section
from geoseg.errors import ConfigError
from geoseg.train.codes import UNLABELLED, LabelCodes


def labels_of_valid(labels_bhw: Tensor, valid_bhw: Tensor) -> Tensor:
    """The labels, ``UNLABELLED`` where ``valid_bhw`` (True = data) is False. The labels' dtype must hold 255."""
    return labels_bhw.masked_fill(~valid_bhw, UNLABELLED)


class Loss(Protocol):
    """What every loss below is."""

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """A scalar of the logits' dtype, float32 at least. Raises ConfigError for a label that is no class."""
        ...


class _Settings:
    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy(_Settings):
    """The weighted mean of ``-log p`` of the labelled class.

    ``class_weights``, one per class, multiply the weight of a pixel; with a map of weights it is the energy of Ronneberger
    et al. 2015 (arXiv:1505.04597, equation 1), divided by the sum of the weights.
    """

    name: Literal["cross_entropy"] = "cross_entropy"
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_class_weights(self.class_weights)

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``."""
        pixels = _pixels(logits_bchw, labels_bhw, weights_bhw)
        return _mean(-_log_prob_of_label(pixels), _by_class(pixels, self.class_weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class Focal(_Settings):
    """The weighted mean of ``-(1 - p)^gamma log p`` of the labelled class: less voice for what is right already.

    T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002; ``class_weights`` is its alpha,
    for each class one. ``gamma`` 0 is the cross entropy.
    """

    name: Literal["focal"] = "focal"
    gamma: float = 2.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(f"the focal loss needs a gamma of 0 or more, got {self.gamma}")
        _check_class_weights(self.class_weights)

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``."""
        pixels = _pixels(logits_bchw, labels_bhw, weights_bhw)
        # log(1 - p) from the other classes' logits: powers of 1 - p itself have no slope at p = 1 for a gamma below 1.
        others_bchw = pixels.logits_bchw.scatter(1, pixels.classes_bhw[:, None], -math.inf)
        log_rest_bhw = others_bchw.logsumexp(1) - pixels.logits_bchw.logsumexp(1)
        values_bhw = -(self.gamma * log_rest_bhw).exp() * _log_prob_of_label(pixels)
        return _mean(values_bhw, _by_class(pixels, self.class_weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tversky(_Settings):
    """The mean over classes of ``1 - TP / (TP + alpha FP + beta FN)``, with probabilities for counts.

    S. S. M. Salehi, D. Erdogmus, A. Gholipour, "Tversky loss function for image segmentation using 3D fully convolutional
    deep networks", MLMI 2017, arXiv:1706.05721. TP, FP and FN are sums over the batch. A class that no pixel of the batch
    is labelled with is left out, for it has no overlap; probability that is lost to it is missing in the others' TP.
    So no constant is added to either sum. ``classes`` are the codes that count, None for all.
    """

    name: Literal["tversky"] = "tversky"
    alpha: float = 0.3
    beta: float = 0.7
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 < self.beta < math.inf):
            raise ConfigError(
                f"the Tversky loss needs an alpha of 0 or more and a beta above 0, got {self.alpha} and {self.beta}"
            )
        _check_classes(self.classes)

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``."""
        pixels = _pixels(logits_bchw, labels_bhw, weights_bhw)
        prob_bchw = pixels.logits_bchw.softmax(1)
        values, present = [], []
        for code in _codes(self.classes, pixels):
            is_class_bhw = pixels.weights_bhw * (pixels.classes_bhw == code)
            hit = (is_class_bhw * prob_bchw[:, code]).sum()
            truth = is_class_bhw.sum()
            false = (pixels.weights_bhw * prob_bchw[:, code]).sum() - hit
            some = truth > 0
            values.append(1 - hit / torch.where(some, hit + self.alpha * false + self.beta * (truth - hit), 1.0))
            present.append(some)
        return _mean_of_present(values, present)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dice(_Settings):
    """The mean over classes of ``1 - 2 TP / (2 TP + FP + FN)``: ``Tversky`` with alpha and beta 1/2, over the batch as it is.

    F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net", 3DV 2016, arXiv:1606.04797, whose denominator sums squares instead.
    """

    name: Literal["dice"] = "dice"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_classes(self.classes)

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``."""
        overlap = Tversky(alpha=0.5, beta=0.5, classes=self.classes)
        return overlap(logits_bchw, labels_bhw, weights_bhw=weights_bhw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lovasz(_Settings):
    """The mean over classes of the Lovász extension of ``1 - IoU``: exact for hard predictions, convex between them.

    M. Berman, A. Rannen Triki, M. B. Blaschko, "The Lovász-Softmax loss", CVPR 2018, arXiv:1705.08790. The IoU is that of
    the batch; classes are left out as in ``Tversky``. ``classes`` are the codes that count, None for all.
    """

    name: Literal["lovasz"] = "lovasz"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_classes(self.classes)

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``."""
        pixels = _pixels(logits_bchw, labels_bhw, weights_bhw)
        prob_bchw = pixels.logits_bchw.softmax(1)
        values, present = [], []
        for code in _codes(self.classes, pixels):
            is_class_bhw = pixels.classes_bhw == code
            errors_bhw = torch.where(is_class_bhw, 1 - prob_bchw[:, code], prob_bchw[:, code])
            errors, order = errors_bhw.flatten().sort(descending=True)
            inside = is_class_bhw.flatten()[order]
            steps, some = _jaccard_steps(inside, pixels.weights_bhw.flatten()[order])
            values.append((errors * steps).sum())
            present.append(some)
        return _mean_of_present(values, present)


def _jaccard_steps(inside: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What each pixel in turn adds to ``1 - IoU`` when it is wrong as all before it are; whether any pixel is inside.

    Written out, not as differences of ``1 - IoU``, which float32 would round to nothing in a batch of millions.
    """
    inner = torch.where(inside, weights, 0.0)
    outer = weights - inner
    total = inner.sum()
    some = total > 0
    intersection = (total - inner.cumsum(0)).clamp(min=0.0)
    union = torch.where(some, total + outer.cumsum(0), 1.0)
    before = torch.where(some, torch.cat([total[None], union[:-1]]), 1.0)
    return torch.where(inside, weights / union, intersection / before * (weights / union)), some


@dataclass(frozen=True, slots=True, kw_only=True)
class ClDice(_Settings):
    """``1 - clDice``: the skeleton of each of truth and prediction should lie in the other, so that roads stay whole.

    S. Shit et al., "clDice - a Novel Topology-Preserving Loss Function for Tubular Structure Segmentation", CVPR 2021,
    arXiv:2003.07311, with the pooling of its authors' code: minima over the cross, maxima over the square of 3 pixels.
    ``iterations`` is at least half the width, in pixels, of the widest road; ``smooth``, in pixels, is the paper's epsilon.
    The mean over ``classes``; a skeleton is that of one image, precision and sensitivity are sums over the batch.

    Pooling leaves out unlabelled pixels as it leaves out what lies beyond the chip: they erode nothing and spread nothing,
    so a road that meets them goes on as at the chip's border, and one along them is taken for half of a wider one. They are
    never skeleton themselves. Weights do not change the skeleton, only how much a pixel of it counts.
    """

    name: Literal["cldice"] = "cldice"
    classes: tuple[int, ...]
    iterations: int = 10
    smooth: float = 1.0

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.smooth < math.inf:
            raise ConfigError(
                f"clDice needs at least one iteration and a smooth above 0, got {self.iterations} and {self.smooth}"
            )
        _check_classes(self.classes)

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``."""
        pixels = _pixels(logits_bchw, labels_bhw, weights_bhw)
        prob_bchw = pixels.logits_bchw.softmax(1)
        values = []
        for code in _codes(self.classes, pixels):
            truth_bhw = (pixels.classes_bhw == code).to(prob_bchw.dtype)
            share = [
                self._share(skeleton_of_bhw, inside_bhw, pixels)
                for skeleton_of_bhw, inside_bhw in ((prob_bchw[:, code], truth_bhw), (truth_bhw, prob_bchw[:, code]))
            ]
            values.append(1 - 2 * share[0] * share[1] / (share[0] + share[1]))
        return torch.stack(values).mean()

    def _share(self, skeleton_of_bhw: Tensor, inside_bhw: Tensor, pixels: _Pixels) -> Tensor:
        """How much of one's skeleton lies in the other."""
        weighted_bhw = pixels.weights_bhw * soft_skeleton(skeleton_of_bhw, pixels.labelled_bhw, self.iterations)
        return ((weighted_bhw * inside_bhw).sum() + self.smooth) / (weighted_bhw.sum() + self.smooth)


def soft_skeleton(prob_bhw: Tensor, labelled_bhw: Tensor, iterations: int) -> Tensor:
    """The skeleton of probabilities, 0 to 1 (b, h, w), by repeated pooling (Shit et al. 2021); see ``ClDice``."""
    skeleton_bhw = torch.zeros_like(prob_bhw)
    for _ in range(iterations + 1):
        eroded_bhw = _eroded(prob_bhw, labelled_bhw)
        ridge_bhw = F.relu(prob_bhw - _dilated(eroded_bhw, labelled_bhw))
        skeleton_bhw = skeleton_bhw + (1 - skeleton_bhw) * ridge_bhw
        prob_bhw = eroded_bhw
    return skeleton_bhw.masked_fill(~labelled_bhw, 0.0)


def _eroded(prob_bhw: Tensor, labelled_bhw: Tensor) -> Tensor:
    negative_bhw = -prob_bhw.masked_fill(~labelled_bhw, 1.0)
    in_rows = F.max_pool2d(negative_bhw, (1, 3), stride=1, padding=(0, 1))
    in_cols = F.max_pool2d(negative_bhw, (3, 1), stride=1, padding=(1, 0))
    return -torch.maximum(in_rows, in_cols)


def _dilated(prob_bhw: Tensor, labelled_bhw: Tensor) -> Tensor:
    return F.max_pool2d(prob_bhw.masked_fill(~labelled_bhw, 0.0), 3, stride=1, padding=1)


@dataclass(frozen=True, slots=True)
class Mix:
    """The sum of losses, each times its factor."""

    terms: tuple[tuple[float, Loss], ...]

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``."""
        values = [factor * loss(logits_bchw, labels_bhw, weights_bhw=weights_bhw) for factor, loss in self.terms]
        return torch.stack(values).sum()


@dataclass(frozen=True, slots=True)
class DeepSupervision:
    """The weighted mean of a loss over the logits of several depths, as ``UNetPlusPlus.all_logits`` gives them.

    C.-Y. Lee et al., "Deeply-Supervised Nets", AISTATS 2015, arXiv:1409.5185; for U-Net++ Zhou et al. 2018,
    arXiv:1807.10165. ``depth_weights``, one per depth, are equal when None.
    """

    loss: Loss
    depth_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        weights = self.depth_weights
        if weights is not None and not (all(0 <= one < math.inf for one in weights) and sum(weights) > 0):
            raise ConfigError(f"deep supervision needs weights of 0 or more, one of them above, got {weights}")

    def __call__(
        self, each_logits_bchw: Sequence[Tensor], labels_bhw: Tensor, *, weights_bhw: Tensor | None = None
    ) -> Tensor:
        """See ``Loss``; all logits are of the labels' size. Raises ConfigError for another number of depths."""
        weights = self.depth_weights or (1.0,) * len(each_logits_bchw)
        if len(weights) != len(each_logits_bchw):
            raise ConfigError(
                f"deep supervision has {len(weights)} weights, the network gives logits of {len(each_logits_bchw)} depths"
            )
        total = sum(weights)
        mix = [
            weight / total * self.loss(logits_bchw, labels_bhw, weights_bhw=weights_bhw)
            for weight, logits_bchw in zip(weights, each_logits_bchw, strict=True)
        ]
        return torch.stack(mix).sum()


@dataclass(frozen=True, slots=True)
class OpenClasses:
    """Another loss, on labels some of which are sets of classes: it asks for the probability of the set, whichever class it is.

    At a pixel of a set the logits of its classes become one, their logsumexp, which is that of their lowest class, the
    pixel's label; the others have probability 0. So the cross entropy is ``-log`` of the sum of p over the set: the
    likelihood of a label that is known in part (T. Cour, B. Sapp, B. Taskar, "Learning from Partial Labels", JMLR 12, 2011;
    for segmentation the "marginal loss" of G. Shi et al., MedIA 70, 2021, arXiv:2007.03868).

    What moves between the classes of the set changes no loss, nor has it a slope. A sum over pixels takes such a pixel for
    one of the lowest class (background, in sets made for sources) with its class weight, and the other classes of the
    set neither gain nor lose there: they are neither TP nor FP nor FN. ``ClDice`` too sees them as absent, so their skeletons
    end where a set begins.
    """

    loss: Loss
    codes: LabelCodes

    def __call__(self, logits_bchw: Tensor, labels_bhw: Tensor, *, weights_bhw: Tensor | None = None) -> Tensor:
        """See ``Loss``; labels are of ``codes``. Raises ConfigError for a network with another number of classes."""
        if logits_bchw.shape[1] != self.codes.num_classes:
            raise ConfigError(
                f"the labels' codes are of {self.codes.num_classes} classes, the network has {logits_bchw.shape[1]}; "
                "give both the same classes"
            )
        _check_shapes(logits_bchw, labels_bhw, weights_bhw)
        is_open_bhw = (labels_bhw >= UNLABELLED - len(self.codes.sets)) & (labels_bhw < UNLABELLED)
        if self.codes.sets and is_open_bhw.any():
            logits_bchw, labels_bhw = _merged(logits_bchw, labels_bhw, is_open_bhw, self.codes)
        return self.loss(logits_bchw, labels_bhw, weights_bhw=weights_bhw)


def _merged(logits_bchw: Tensor, labels_bhw: Tensor, is_open_bhw: Tensor, codes: LabelCodes) -> tuple[Tensor, Tensor]:
    """Logits and labels in which each open pixel (n of them) has the lowest class of its set for all of the set."""
    logits_bchw = logits_bchw.to(torch.promote_types(logits_bchw.dtype, torch.float32))
    logits_bhwc = logits_bchw.movedim(1, -1)
    possible = torch.from_numpy(codes.possible).to(labels_bhw.device)
    # Open pixels alone: a NaN beside them would reach the slope of a sum over all, even times 0.
    logits_nc, possible_nc = logits_bhwc[is_open_bhw], possible[labels_bhw[is_open_bhw].to(torch.int64)]
    merged_n1 = logits_nc.masked_fill(~possible_nc, -math.inf).logsumexp(1, keepdim=True)
    lowest_n = possible_nc.to(torch.uint8).argmax(1)
    # Far below any logit, and far enough from the end of the dtype for differences to stay finite.
    rest_nc = logits_nc.masked_fill(possible_nc, torch.finfo(logits_nc.dtype).min / 4)
    merged_bhwc = logits_bhwc.index_put((is_open_bhw,), rest_nc.scatter(1, lowest_n[:, None], merged_n1))
    merged_labels_bhw = labels_bhw.index_put((is_open_bhw,), lowest_n.to(labels_bhw.dtype))
    return merged_bhwc.movedim(-1, 1), merged_labels_bhw


class _Pixels(NamedTuple):
    """Finite logits where nothing is labelled, classes as indices (0 there), weights (0 there)."""

    logits_bchw: Tensor
    classes_bhw: Tensor
    weights_bhw: Tensor
    labelled_bhw: Tensor


def _check_shapes(logits_bchw: Tensor, labels_bhw: Tensor, weights_bhw: Tensor | None) -> None:
    for name, one in (("labels", labels_bhw), ("weights", weights_bhw)):
        if one is not None and one.shape != (len(logits_bchw), *logits_bchw.shape[2:]):
            raise ValueError(
                f"{name} must be (b, h, w) as the logits are (b, c, h, w), got {tuple(one.shape)} "
                f"beside {tuple(logits_bchw.shape)}"
            )
    if labels_bhw.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels_bhw.dtype}")


def _pixels(logits_bchw: Tensor, labels_bhw: Tensor, weights_bhw: Tensor | None) -> _Pixels:
    _check_shapes(logits_bchw, labels_bhw, weights_bhw)
    num_classes = logits_bchw.shape[1]
    labelled_bhw = labels_bhw != UNLABELLED
    classes_bhw = labels_bhw.masked_fill(~labelled_bhw, 0).to(torch.int64)
    lowest, highest = (int(end) for end in classes_bhw.aminmax()) if classes_bhw.numel() else (0, 0)
    if lowest < 0 or highest >= num_classes:
        raise ConfigError(
            f"labels go from {lowest} to {highest}, the network has classes 0 to {num_classes - 1}; "
            f"give what is not to be learnt the code {UNLABELLED}"
        )
    logits_bchw = logits_bchw.to(torch.promote_types(logits_bchw.dtype, torch.float32))
    if weights_bhw is None:
        weights_bhw = torch.ones_like(logits_bchw[:, 0])
    return _Pixels(
        logits_bchw.masked_fill(~labelled_bhw[:, None], 0.0),
        classes_bhw,
        weights_bhw.to(logits_bchw.dtype).masked_fill(~labelled_bhw, 0.0),
        labelled_bhw,
    )


def _log_prob_of_label(pixels: _Pixels) -> Tensor:
    return -F.cross_entropy(pixels.logits_bchw, pixels.classes_bhw, reduction="none")


def _by_class(pixels: _Pixels, class_weights: tuple[float, ...] | None) -> Tensor:
    if class_weights is None:
        return pixels.weights_bhw
    num_classes = pixels.logits_bchw.shape[1]
    if len(class_weights) != num_classes:
        raise ConfigError(f"there are {len(class_weights)} class weights, the network has {num_classes} classes")
    return pixels.weights_bhw * pixels.weights_bhw.new_tensor(class_weights)[pixels.classes_bhw]


def _mean(values_bhw: Tensor, weights_bhw: Tensor) -> Tensor:
    total = weights_bhw.sum()
    return (values_bhw * weights_bhw).sum() / torch.where(total > 0, total, 1.0)


def _mean_of_present(values: list[Tensor], present: list[Tensor]) -> Tensor:
    is_present = torch.stack(present)
    return torch.where(is_present, torch.stack(values), 0.0).sum() / is_present.sum().clamp(min=1)


def _codes(classes: tuple[int, ...] | None, pixels: _Pixels) -> Sequence[int]:
    num_classes = pixels.logits_bchw.shape[1]
    if classes is not None and max(classes) >= num_classes:
        raise ConfigError(f"the loss counts classes {classes}, the network has classes 0 to {num_classes - 1}")
    return range(num_classes) if classes is None else classes


def _check_classes(classes: tuple[int, ...] | None) -> None:
    if classes is not None and (not classes or min(classes) < 0 or len(set(classes)) < len(classes)):
        raise ConfigError(f"a loss counts class codes of 0 or more, each once, got {classes}")


def _check_class_weights(class_weights: tuple[float, ...] | None) -> None:
    if class_weights is not None and not all(0 <= weight < math.inf for weight in class_weights):
        raise ConfigError(f"class weights are numbers of 0 or more, got {class_weights}")


class LossTerm(Section):
    """One loss, by its ``name`` and with its settings, and its ``factor`` in the sum."""

    loss: Annotated[CrossEntropy | Focal | Dice | Tversky | Lovasz | ClDice, Field(discriminator="name")]
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class LossConfig(Section):
    """The losses that are added up.

    In TOML: ``terms = [{loss = {name = "cross_entropy"}}, {loss = {name = "dice", classes = [1, 2]}, factor = 0.5}]``.
    """

    terms: Annotated[tuple[LossTerm, ...], Field(min_length=1)] = (LossTerm(loss=CrossEntropy()),)


def build_loss(config: LossConfig) -> Mix:
    """The sum that the config names."""
    return Mix(tuple((term.factor, term.loss) for term in config.terms))
