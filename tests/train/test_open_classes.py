"""Labels that leave a class open: the losses ask for the probability of the set, and for nothing within it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geoseg.errors import ConfigError
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.loss import (
    ClDice,
    CrossEntropy,
    DeepSupervision,
    Dice,
    Focal,
    Loss,
    Lovasz,
    Mix,
    OpenClasses,
    Tversky,
)

BACKGROUND, BUILDING, ROAD = range(3)
CODES = LabelCodes.for_sources(3, [(BUILDING,), (ROAD,), (BUILDING, ROAD)])
NO_BUILDING, NO_ROAD = CODES.background_of((BUILDING,)), CODES.background_of((ROAD,))
ANY = LabelCodes.for_sources(3, [()])
MIX = Mix(((1.0, CrossEntropy()), (0.5, Dice())))
EVERY = [
    CrossEntropy(class_weights=(0.5, 2.0, 1.0)),
    Focal(gamma=0.5),
    Focal(gamma=5.0),
    Dice(),
    Tversky(classes=(BUILDING, ROAD)),
    Lovasz(),
    ClDice(classes=(ROAD,), iterations=2),
    MIX,
]
every = pytest.mark.parametrize("loss", EVERY, ids=lambda loss: str(loss)[:32])


def chips(seed: int = 0, *, side: int = 6, unlabelled: float = 0.2) -> tuple[Tensor, Tensor]:
    """Logits in double (2, 3, h, w + 1) and labels uint8 with all codes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, side, side + 1)
    labels = torch.tensor([BACKGROUND, BUILDING, ROAD, NO_BUILDING, NO_ROAD], dtype=torch.uint8)[
        torch.randint(0, 5, shape, generator=generator)
    ]
    labels[torch.rand(shape, generator=generator) < unlabelled] = UNLABELLED
    return torch.randn(2, 3, *shape[1:], generator=generator, dtype=torch.double).requires_grad_(), labels


def slope(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    (given,) = torch.autograd.grad(loss(logits, labels), logits)
    return given


def of_code(given: Tensor, labels: Tensor, code: int) -> Tensor:
    """The values (n, c) of (b, c, h, w) at the pixels of a code."""
    return given.movedim(1, -1)[labels == code]


def test_cross_entropy_is_minus_log_of_the_probability_of_the_set() -> None:
    """Probabilities 1/2, 1/8 and 3/8, by hand: {background, road} has 7/8, {background, building} 5/8, building 1/8."""
    logits = torch.tensor([4.0, 1.0, 3.0]).log()[None, :, None, None].expand(1, 3, 1, 4)
    labels = torch.tensor([[[NO_BUILDING, NO_ROAD, BUILDING, UNLABELLED]]], dtype=torch.uint8)
    value = OpenClasses(CrossEntropy(), CODES)(logits, labels)
    assert value.item() == pytest.approx(-(math.log(7 / 8) + math.log(5 / 8) + math.log(1 / 8)) / 3)


def test_focal_by_hand() -> None:
    logits = torch.tensor([4.0, 1.0, 3.0]).log()[None, :, None, None]
    value = OpenClasses(Focal(gamma=2), CODES)(logits, torch.tensor([[[NO_BUILDING]]], dtype=torch.uint8))
    assert value.item() == pytest.approx(-((1 / 8) ** 2) * math.log(7 / 8))


@every
class TestEveryLoss:
    def test_labels_without_sets_give_equal_bits(self, loss: Loss) -> None:
        logits, labels = chips()
        closed = labels.masked_fill((labels == NO_BUILDING) | (labels == NO_ROAD), ROAD)
        for codes in (CODES, LabelCodes(3)):
            wrapped = OpenClasses(loss, codes)
            assert torch.equal(wrapped(logits, closed), loss(logits, closed))
            assert torch.equal(slope(wrapped, logits, closed), slope(loss, logits, closed))

    def test_has_the_slope_of_its_values(self, loss: Loss) -> None:
        logits, labels = chips(side=4)
        wrapped = OpenClasses(loss, CODES)
        assert torch.autograd.gradcheck(lambda given: wrapped(given, labels), logits)

    def test_what_moves_within_a_set_changes_nothing(self, loss: Loss) -> None:
        """Probability passes from background to road where no building is; building's stays as it is."""
        logits, labels = chips()
        wrapped = OpenClasses(loss, CODES)
        shares = logits.detach().exp()
        inside = labels == NO_BUILDING
        shares[:, ROAD] += torch.where(inside, 0.75 * shares[:, BACKGROUND], 0.0)
        shares[:, BACKGROUND] *= torch.where(inside, 0.25, 1.0)
        torch.testing.assert_close(wrapped(shares.log(), labels), wrapped(logits, labels), rtol=1e-12, atol=0)
        given, prob = (of_code(one, labels, NO_BUILDING) for one in (slope(wrapped, logits, labels), logits.softmax(1)))
        along = given[:, ROAD] / prob[:, ROAD] - given[:, BACKGROUND] / prob[:, BACKGROUND]
        torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("noise", [math.nan, math.inf, -math.inf])
    def test_an_unlabelled_pixel_has_no_slope_whatever_stands_there(self, loss: Loss, noise: float) -> None:
        logits, labels = chips()
        wrapped = OpenClasses(loss, CODES)
        noisy = logits.detach().masked_fill((labels == UNLABELLED)[:, None], noise).requires_grad_()
        assert torch.equal(wrapped(noisy, labels), wrapped(logits, labels))
        assert torch.equal(slope(wrapped, noisy, labels), slope(wrapped, logits, labels))
        assert not of_code(slope(wrapped, noisy, labels), labels, UNLABELLED).any()

    def test_all_classes_possible_is_right_whatever_is_predicted(self, loss: Loss) -> None:
        logits, labels = chips()
        anything = torch.full_like(labels, ANY.background_of(()))
        wrapped = OpenClasses(loss, ANY)
        assert wrapped(logits, anything).item() == pytest.approx(0, abs=1e-12)
        assert slope(wrapped, logits, anything).abs().max() < 1e-12

    @pytest.mark.parametrize("scale", [1e3, 1e30])
    def test_a_sure_network_has_a_finite_slope(self, loss: Loss, scale: float) -> None:
        logits, labels = chips()
        sure = (logits.detach().float() * scale).requires_grad_()
        assert slope(OpenClasses(loss, CODES), sure, labels).isfinite().all()


@pytest.mark.parametrize("loss", [Dice(classes=(ROAD,)), Tversky(classes=(ROAD,)), Lovasz(classes=(ROAD,))])
def test_the_overlap_of_road_does_not_see_pixels_that_may_be_road(loss: Loss) -> None:
    """Whatever stands there, building too, is neither hit nor miss nor false alarm of road."""
    logits, labels = chips()
    wrapped = OpenClasses(loss, CODES)
    other = torch.where((labels == NO_BUILDING)[:, None], logits + 3 * torch.randn_like(logits), logits)
    assert torch.equal(wrapped(other, labels), wrapped(logits, labels))
    assert not of_code(slope(wrapped, logits, labels), labels, NO_BUILDING).any()
    assert of_code(slope(wrapped, logits, labels), labels, NO_ROAD)[:, ROAD].any()


def test_a_building_where_none_is_counts_against_building() -> None:
    logits, labels = chips()
    given = of_code(slope(OpenClasses(Dice(classes=(BUILDING,)), CODES), logits, labels), labels, NO_BUILDING)
    assert (given[:, BUILDING] > 0).all()


def test_each_depth_is_asked_for_the_set() -> None:
    (first, labels), (second, _) = chips(), chips(1)
    wrapped = OpenClasses(MIX, CODES)
    value = DeepSupervision(wrapped)([first, second], labels)
    torch.testing.assert_close(value, (wrapped(first, labels) + wrapped(second, labels)) / 2)


def test_half_precision_is_computed_in_single() -> None:
    logits, labels = chips()
    half, wrapped = logits.detach().bfloat16(), OpenClasses(MIX, CODES)
    assert torch.equal(wrapped(half, labels), wrapped(half.float(), labels))


def test_codes_and_network_of_other_classes_are_refused() -> None:
    logits, labels = chips()
    with pytest.raises(ConfigError, match="codes are of 3 classes, the network has 2"):
        OpenClasses(MIX, CODES)(logits[:, :2], labels)
    with pytest.raises(ValueError, match=r"labels must be \(b, h, w\)"):
        OpenClasses(MIX, CODES)(logits, labels[:, 1:])
    with pytest.raises(ConfigError, match="labels go from 0 to 252"):
        OpenClasses(MIX, CODES)(logits, labels.masked_fill(labels == ROAD, 252))
