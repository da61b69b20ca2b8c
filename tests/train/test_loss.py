"""What every loss keeps to, then what each is by its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geoseg.config import check
from geoseg.errors import ConfigError
from geoseg.model.unet_plus_plus import UNetPlusPlus
from geoseg.train.codes import UNLABELLED
from geoseg.train.loss import (
    ClDice,
    CrossEntropy,
    DeepSupervision,
    Dice,
    Focal,
    Loss,
    LossConfig,
    Lovasz,
    Mix,
    Tversky,
    build_loss,
    labels_of_valid,
    soft_skeleton,
)

PIXELWISE = [
    CrossEntropy(),
    CrossEntropy(class_weights=(0.2, 2.0, 1.0)),
    Focal(),
    Focal(gamma=0.5, class_weights=(0.2, 2.0, 1.0)),
]
OVERLAPS = [Dice(), Dice(classes=(1, 2)), Tversky(), Tversky(alpha=0.0, beta=1.0), Lovasz(), Lovasz(classes=(2,))]
EVERY = [
    *PIXELWISE,
    *OVERLAPS,
    ClDice(classes=(2,), iterations=2),
    Mix(((1.0, CrossEntropy()), (0.5, Dice()), (0.25, ClDice(classes=(1, 2), iterations=1)))),
]


def name_of(loss: Loss) -> str:
    return str(loss).replace("name=", "")[:48]


every = pytest.mark.parametrize("loss", EVERY, ids=name_of)


def chips(seed: int = 0, *, num: int = 3, side: int = 9, unlabelled: float = 0.25) -> tuple[Tensor, Tensor]:
    """Logits in double (b, 3, h, w + 2), labels of three classes with some pixels unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num, side, side + 2)
    labels = torch.randint(0, 3, shape, generator=generator, dtype=torch.uint8)
    labels[torch.rand(shape, generator=generator) < unlabelled] = UNLABELLED
    logits = torch.randn(num, 3, *shape[1:], generator=generator, dtype=torch.double)
    return logits.requires_grad_(), labels


def certain(labels: Tensor, num_classes: int = 3) -> Tensor:
    """Logits that are sure of ``labels``; of class 0 where there are none."""
    classes = labels.masked_fill(labels == UNLABELLED, 0).long()
    return (F.one_hot(classes, num_classes).movedim(-1, 1).double() - 0.5) * 200


def value_and_slope(loss: Loss, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, labels, weights_bhw=weights)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


@every
class TestEveryLoss:
    def test_is_zero_for_the_truth_and_large_for_its_opposite(self, loss: Loss) -> None:
        _, labels = chips()
        wrong = torch.where(labels == UNLABELLED, labels, (labels + 1) % 3)
        assert loss(certain(labels), labels) < 1e-9
        assert loss(certain(wrong), labels) > 0.4

    def test_has_the_slope_of_its_values(self, loss: Loss) -> None:
        logits, labels = chips(num=2, side=4)
        weights = torch.rand(labels.shape, dtype=torch.double) + 0.1
        assert torch.autograd.gradcheck(lambda given: loss(given, labels, weights_bhw=weights), logits)

    @pytest.mark.parametrize("noise", [0.0, 1e4, math.nan, math.inf, -math.inf])
    def test_what_stands_at_an_unlabelled_pixel_changes_nothing(self, loss: Loss, noise: float) -> None:
        logits, labels = chips()
        weights = torch.rand(labels.shape, dtype=torch.double)
        unlabelled = labels == UNLABELLED
        noisy = logits.detach().masked_fill(unlabelled[:, None], noise)
        expected, expected_slope = value_and_slope(loss, logits, labels, weights)
        value, slope = value_and_slope(loss, noisy, labels, weights.masked_fill(unlabelled, noise))
        assert torch.equal(value, expected)
        assert torch.equal(slope, expected_slope)
        assert not slope[unlabelled[:, None].expand_as(slope)].any()
        assert slope[~unlabelled[:, None].expand_as(slope)].any()

    @pytest.mark.parametrize("noise", [0.0, math.nan])
    def test_nothing_labelled_is_a_loss_of_zero_without_slope(self, loss: Loss, noise: float) -> None:
        logits, labels = chips(unlabelled=1.0)
        value, slope = value_and_slope(loss, logits + noise, labels)
        assert value == 0
        assert torch.equal(slope, torch.zeros_like(slope))

    def test_unlabelled_is_as_beyond_the_chip(self, loss: Loss) -> None:
        logits, labels = chips(unlabelled=0.1)
        labels[:, :, 7:] = UNLABELLED
        labels[:, :2] = UNLABELLED
        torch.testing.assert_close(loss(logits, labels), loss(logits[:, :, 2:, :7], labels[:, 2:, :7]))

    def test_the_order_of_the_batch_does_not_matter(self, loss: Loss) -> None:
        logits, labels = chips(num=4)
        weights = torch.rand(labels.shape, dtype=torch.double)
        order = torch.tensor([2, 0, 3, 1])
        value, slope = value_and_slope(loss, logits, labels, weights)
        other_value, other_slope = value_and_slope(loss, logits[order], labels[order], weights[order])
        torch.testing.assert_close(other_value, value)
        torch.testing.assert_close(other_slope, slope[order])

    def test_a_chip_without_labels_in_the_batch_changes_nothing(self, loss: Loss) -> None:
        logits, labels = chips(num=3)
        labels[1] = UNLABELLED
        torch.testing.assert_close(loss(logits, labels), loss(logits[[0, 2]], labels[[0, 2]]))

    def test_half_precision_is_computed_in_single(self, loss: Loss) -> None:
        logits, labels = chips()
        logits = logits.detach().bfloat16()
        value = loss(logits, labels)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(logits.float(), labels))

    def test_what_cannot_be_a_label_is_refused(self, loss: Loss) -> None:
        logits, labels = chips()
        with pytest.raises(ConfigError, match=r"labels go from 0 to 3, the network has classes 0 to 2.*255"):
            loss(logits, labels.masked_fill(labels == 1, 3))
        with pytest.raises(ValueError, match=r"labels must be \(b, h, w\)"):
            loss(logits, labels[:, 1:])
        with pytest.raises(ValueError, match="integers"):
            loss(logits, labels.float())


@pytest.mark.parametrize("loss", PIXELWISE + OVERLAPS, ids=name_of)
def test_weights_are_counts(loss: Loss) -> None:
    """A pixel of weight 2 is two pixels, one of weight 0 is unlabelled."""
    logits, labels = chips(num=2)
    weights = torch.randint(0, 3, labels.shape).double()
    once, twice = labels.masked_fill(weights < 1, UNLABELLED), labels.masked_fill(weights < 2, UNLABELLED)
    repeated = loss(torch.cat([logits, logits]), torch.cat([once, twice]))
    torch.testing.assert_close(loss(logits, labels, weights_bhw=weights), repeated)
    torch.testing.assert_close(loss(logits, labels, weights_bhw=7 * weights), repeated)


@pytest.mark.parametrize("loss", OVERLAPS, ids=name_of)
def test_a_chip_without_the_class_leaves_the_others_their_slope(loss: Loss) -> None:
    """With the overlap of each image it would halve it; a class that no chip has is left out of the mean."""
    logits, labels = chips(num=2)
    labels[1] = 0
    sure = torch.cat([logits[:1], certain(labels)[1:]])
    _, alone = value_and_slope(loss, sure[:1], labels[:1])
    _, beside = value_and_slope(loss, sure, labels)
    if getattr(loss, "classes", None):
        torch.testing.assert_close(beside[:1], alone)
    value, slope = value_and_slope(loss, certain(torch.zeros_like(labels)), torch.zeros_like(labels))
    assert value < 1e-9
    assert slope.isfinite().all()


def test_labels_of_valid() -> None:
    labels = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    joined = labels_of_valid(labels, torch.tensor([[[True, False, False]]]))
    assert joined.tolist() == [[[0, UNLABELLED, UNLABELLED]]]
    assert joined.dtype == torch.uint8


@pytest.mark.parametrize("class_weights", [None, (0.5, 3.0, 1.0)])
def test_cross_entropy_is_torch_s(class_weights: tuple[float, ...] | None) -> None:
    logits, labels = chips()
    table = None if class_weights is None else torch.tensor(class_weights, dtype=torch.double)
    torch.testing.assert_close(
        CrossEntropy(class_weights=class_weights)(logits, labels),
        F.cross_entropy(logits, labels.long(), weight=table, ignore_index=UNLABELLED),
    )


def test_cross_entropy_by_hand() -> None:
    """Probabilities 1/2 and 4/5 with weights 3 and 1."""
    logits = torch.tensor([[[[0.0, math.log(4)]], [[0.0, 0.0]]]])
    value = CrossEntropy()(logits, torch.tensor([[[1, 0]]]), weights_bhw=torch.tensor([[[3.0, 1.0]]]))
    assert value.item() == pytest.approx((3 * math.log(2) + math.log(5 / 4)) / 4)


def test_focal_by_hand() -> None:
    logits = torch.tensor([[[[math.log(4)]], [[0.0]]]])
    assert Focal(gamma=2)(logits, torch.tensor([[[0]]])).item() == pytest.approx(0.2**2 * math.log(5 / 4))
    assert Focal(gamma=2)(logits, torch.tensor([[[1]]])).item() == pytest.approx(0.8**2 * math.log(5))


def test_focal_without_gamma_is_cross_entropy() -> None:
    logits, labels = chips()
    torch.testing.assert_close(Focal(gamma=0)(logits, labels), CrossEntropy()(logits, labels))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_focal_has_a_finite_slope_where_the_network_is_sure(gamma: float, scale: float) -> None:
    _, labels = chips()
    _, slope = value_and_slope(Focal(gamma=gamma), certain(labels).float() * scale, labels)
    assert slope.isfinite().all()


def test_overlaps_by_hand() -> None:
    """Class 1 has probabilities 1/2, 4/5 where it is and 1/5 where it is not: TP 1.3, FP 0.2, FN 0.7."""
    first = math.log(4)
    logits = torch.tensor([[[[0.0, 0.0, first]], [[0.0, first, 0.0]]]])
    labels = torch.tensor([[[1, 1, 0]]])
    assert Dice(classes=(1,))(logits, labels).item() == pytest.approx(1 - 2.6 / (2.6 + 0.2 + 0.7))
    assert Tversky(alpha=0.3, beta=0.9, classes=(1,))(logits, labels).item() == pytest.approx(
        1 - 1.3 / (1.3 + 0.3 * 0.2 + 0.9 * 0.7)
    )
    # Class 0: TP 4/5, FP 1/2 + 1/5, FN 1/5.
    both = (1 - 2.6 / 3.5 + 1 - 1.6 / (1.6 + 0.7 + 0.2)) / 2
    assert Dice()(logits, labels).item() == pytest.approx(both)


def jaccard_loss(wrong: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    """``1 - IoU`` of a hard prediction that is wrong at some pixels."""
    missed, added = wrong & inside, wrong & ~inside
    return 1 - (weights * (inside & ~missed)).sum() / (weights * (inside | added)).sum()


def test_lovasz_is_the_jaccard_loss_at_each_corner() -> None:
    """All hard predictions of 2 classes on 6 pixels, with weights."""
    labels = torch.tensor([[[0, 1, 1, UNLABELLED, 0, 1]]])
    weights = torch.tensor([[[1.0, 2.0, 0.5, 9.0, 1.0, 3.0]]], dtype=torch.double)
    labelled = labels[0, 0] != UNLABELLED
    for prediction in itertools.product([0, 1], repeat=6):
        told = torch.tensor([[prediction]])
        wrong = ((told != labels)[0, 0])[labelled]
        each = [jaccard_loss(wrong, (labels[0, 0] == code)[labelled], weights[0, 0][labelled]) for code in (0, 1)]
        value = Lovasz()(certain(told, 2), labels, weights_bhw=weights)
        torch.testing.assert_close(value, torch.stack(each).mean())


def test_lovasz_between_the_corners_is_the_extension_by_its_definition() -> None:
    """The sum of errors, the largest first, times what each adds to the set function."""
    logits, labels = chips(num=2, side=3)
    weights = torch.rand(labels.shape, dtype=torch.double)
    known = labels != UNLABELLED
    values = []
    for code in range(3):
        prob, inside, weight = logits.softmax(1)[:, code][known], labels[known] == code, weights[known]
        errors = torch.where(inside, 1 - prob, prob)
        value, before, wrong = torch.zeros(()), torch.zeros(()), torch.zeros_like(inside)
        for index in errors.argsort(descending=True):
            wrong[index] = True
            after = jaccard_loss(wrong, inside, weight)
            value, before = value + errors[index] * (after - before), after
        values.append(value)
    torch.testing.assert_close(Lovasz()(logits, labels, weights_bhw=weights), torch.stack(values).mean())


def test_lovasz_keeps_its_slope_in_a_large_batch() -> None:
    """Single precision gives what double gives, to six digits, on a million pixels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (1, 1000, 1000), generator=generator)
    logits = torch.randn(1, 2, 1000, 1000, generator=generator)
    _, single = value_and_slope(Lovasz(classes=(1,)), logits, labels)
    _, double = value_and_slope(Lovasz(classes=(1,)), logits.double(), labels)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-11)


def road(*, width: int = 3, gap: slice | None = None) -> Tensor:
    """Class 2 along the middle of a chip of 21 x 31 pixels, with a gap."""
    labels = torch.zeros(1, 21, 31, dtype=torch.uint8)
    labels[:, 10 - width // 2 : 10 - width // 2 + width] = 2
    if gap is not None:
        labels[:, :, gap] = 0
    return labels


def test_the_skeleton_of_a_road_is_its_middle_line() -> None:
    prob = (road(width=5) == 2).double()
    everywhere = torch.ones_like(prob, dtype=torch.bool)
    skeleton = soft_skeleton(prob, everywhere, 3)
    assert skeleton[0, 10].all()
    assert skeleton.sum() == 31


def test_the_skeleton_of_probabilities_is_that_of_the_paper_s_algorithm() -> None:
    """Pixel by pixel, leaving out what lies beyond the chip or is unlabelled."""
    logits, labels = chips(num=1, side=7)
    prob, labelled = logits.softmax(1)[0, 2].detach(), labels[0] != UNLABELLED
    cross = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    square = list(itertools.product((-1, 0, 1), repeat=2))

    def pooled(values: Tensor, around: list[tuple[int, int]], best: Callable[[list[float]], float]) -> Tensor:
        out = torch.zeros_like(values)
        for row, col in itertools.product(*map(range, values.shape)):
            places = [(row + down, col + right) for down, right in around]
            seen = [values[at].item() for at in places if at in known]
            out[row, col] = best(seen) if seen else (1.0 if best is min else 0.0)
        return out

    known = {tuple(at) for at in labelled.nonzero().tolist()}
    skeleton, image = torch.zeros_like(prob), prob
    for _ in range(3):
        eroded = pooled(image, cross, min)
        ridge = (image - pooled(eroded, square, max)).clamp(min=0)
        skeleton, image = skeleton + ridge - skeleton * ridge, eroded
    torch.testing.assert_close(soft_skeleton(prob[None], labelled[None], 2)[0], skeleton * labelled)


def test_cldice_weighs_pixels_of_the_skeleton() -> None:
    labels, loss = road(width=5), ClDice(classes=(2,), iterations=3)
    weights = torch.ones(labels.shape, dtype=torch.double)
    weights[:, :, 11:17] = 0
    assert loss(certain(road(width=5, gap=slice(12, 16))), labels, weights_bhw=weights) < 1e-3


def test_cldice_minds_a_gap_more_than_a_narrower_road() -> None:
    loss = ClDice(classes=(2,), iterations=3)
    narrower = loss(certain(road(width=3)), road(width=5))
    broken = loss(certain(road(width=5, gap=slice(12, 16))), road(width=5))
    assert narrower < 1e-9
    # Precision 1, sensitivity (27 + 1) / (31 + 1) but for the four ends, which a skeleton may not reach.
    assert broken.item() == pytest.approx(1 - 2 * (28 / 32) / (1 + 28 / 32), abs=0.01)


def test_unlabelled_ground_neither_cuts_a_skeleton_nor_adds_to_it() -> None:
    labels = road(width=5)
    labels[:, :, 12:16] = UNLABELLED
    labels[:, 14:, 20:] = UNLABELLED
    skeleton = soft_skeleton((labels == 2).double(), labels != UNLABELLED, 3)
    expected = soft_skeleton((road(width=5) == 2).double(), torch.ones_like(labels, dtype=torch.bool), 3)
    assert torch.equal(skeleton, expected.masked_fill(labels == UNLABELLED, 0))


def test_cldice_minds_false_roads_where_there_are_none() -> None:
    labels = torch.zeros_like(road())
    assert ClDice(classes=(2,))(certain(labels), labels) < 1e-9
    assert ClDice(classes=(2,))(certain(road()), labels) > 0.9


def test_deep_supervision_is_the_mean_over_depths() -> None:
    network = UNetPlusPlus(2, 3, depth=2, width=2)
    each = network.all_logits(torch.randn(2, 2, 16, 16))
    labels = torch.randint(0, 3, (2, 16, 16))
    weights = torch.rand(2, 16, 16)
    values = [Dice()(one, labels, weights_bhw=weights) for one in each]
    torch.testing.assert_close(DeepSupervision(Dice())(each, labels, weights_bhw=weights), (values[0] + values[1]) / 2)
    torch.testing.assert_close(
        DeepSupervision(Dice(), (1.0, 3.0))(each, labels, weights_bhw=weights), (values[0] + 3 * values[1]) / 4
    )
    with pytest.raises(ConfigError, match="3 weights, the network gives logits of 2 depths"):
        DeepSupervision(Dice(), (1.0, 1.0, 1.0))(each, labels)


def test_a_mix_is_built_from_its_config() -> None:
    config = check(
        LossConfig,
        {"terms": [{"loss": {"name": "cross_entropy"}}, {"loss": {"name": "tversky", "alpha": 0.4}, "factor": 0.5}]},
        where="loss",
    )
    logits, labels = chips()
    expected = CrossEntropy()(logits, labels) + 0.5 * Tversky(alpha=0.4)(logits, labels)
    torch.testing.assert_close(build_loss(config)(logits, labels), expected)
    assert LossConfig.model_validate_json(config.model_dump_json()) == config
    assert build_loss(LossConfig()).terms == ((1.0, CrossEntropy()),)


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ([], "at least 1 item"),
        ([{"loss": {"name": "dyce"}}], "dyce"),
        ([{"loss": {"name": "focal", "gama": 1}}], "gama"),
        ([{"loss": {"name": "focal"}, "factor": 0}], "greater than 0"),
        ([{"loss": {"name": "cldice"}}], "classes.*missing"),
        ([{"loss": {"name": "focal", "gamma": -1}}], "gamma of 0 or more, got -1"),
    ],
)
def test_a_wrong_config_is_refused(terms: list[object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(LossConfig, {"terms": terms}, where="loss")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CrossEntropy(class_weights=(1.0, -1.0)),
        lambda: Focal(gamma=math.nan),
        lambda: Tversky(beta=0.0),
        lambda: Dice(classes=()),
        lambda: Dice(classes=(1, 1)),
        lambda: Lovasz(classes=(-1,)),
        lambda: ClDice(classes=(2,), iterations=0),
        lambda: ClDice(classes=(2,), smooth=0.0),
        lambda: DeepSupervision(Dice(), (0.0, 0.0)),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_made(wrong: Callable[[], Loss]) -> None:
    with pytest.raises(ConfigError, match="got"):
        wrong()


def test_settings_that_do_not_fit_the_network_are_refused() -> None:
    logits, labels = chips()
    with pytest.raises(ConfigError, match="2 class weights, the network has 3 classes"):
        CrossEntropy(class_weights=(1.0, 1.0))(logits, labels)
    with pytest.raises(ConfigError, match=r"counts classes \(1, 3\)"):
        Dice(classes=(1, 3))(logits, labels)
