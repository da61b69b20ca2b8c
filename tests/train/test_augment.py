"""Augmented chips: labels follow their pixels, light follows no label, and draws do not depend on settings."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geoseg.config import check
from geoseg.errors import ConfigError
from geoseg.train.augment import Augmentation, AugmentConfig, Chips, augmented, draw_augmentation

MEAN, RANGE = (110.0, 90.0, 70.0), (0.0, 255.0)
PLAIN = (1.0, 1.0, 1.0)
EIGHT = [Augmentation(mirrored=mirrored, quarter_turns=n, gains=PLAIN) for mirrored in (False, True) for n in range(4)]
LIGHT = AugmentConfig(scale=(0.5, 2.0), brightness=0.2, contrast=0.3, color=0.1)


def function_of(pixels_bkhw: Tensor) -> Tensor:
    """Labels that each pixel decides alone."""
    return (pixels_bkhw.to(torch.int64).sum(1) % 7).to(torch.uint8)


def chips(num: int = 8, *, side: int = 5, bands: int = 3, dtype: torch.dtype = torch.uint8) -> Chips:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num, bands, side, side), generator=generator).to(dtype)
    return Chips(pixels, function_of(pixels), pixels[:, 0].to(torch.int64) > 40, pixels[:, 1].to(torch.float32) / 8)


def by(chips: Chips, augmentations: list[Augmentation], **changed: Any) -> Chips:
    return augmented(chips, augmentations, **{"mean": MEAN, "value_range": RANGE, **changed})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32], ids=str)
def test_labels_validity_and_weights_follow_their_pixels(dtype: torch.dtype) -> None:
    before = chips(dtype=dtype)
    after = by(before, EIGHT)
    assert after.pixels_bkhw.dtype == torch.float32
    assert torch.equal(after.labels_bhw, function_of(after.pixels_bkhw))
    assert torch.equal(after.valid, after.pixels_bkhw[:, 0] > 40)
    assert after.weights_bhw is not None
    assert torch.equal(after.weights_bhw, after.pixels_bkhw[:, 1] / 8)
    for one, other in zip(before.pixels_bkhw, after.pixels_bkhw, strict=True):
        assert sorted(one.flatten().tolist()) == sorted(other.flatten().tolist())


def test_the_eight_ways_are_the_symmetries_of_the_square() -> None:
    corner = torch.arange(4).reshape(1, 1, 2, 2).expand(8, 1, 2, 2)
    same = Chips(corner, corner[:, 0].to(torch.uint8), corner[:, 0] > 0)
    laid = {tuple(one.flatten().tolist()) for one in by(same, EIGHT).labels_bhw}
    assert len(laid) == 8
    # Opposite corners, 0 and 3, stay opposite.
    assert all({one[0], one[3]} in ({0, 3}, {1, 2}) for one in laid)
    first = Augmentation(mirrored=True, quarter_turns=1, gains=PLAIN)
    assert by(Chips(corner[:1], same.labels_bhw[:1], same.valid[:1]), [first]).labels_bhw.tolist() == [[[0, 2], [1, 3]]]


def test_each_way_is_drawn_equally_often() -> None:
    class Evenly:
        """A generator whose first numbers are evenly spread."""

        def __init__(self, first: float) -> None:
            self.first = first

        def random(self, count: int) -> Any:
            return np.array([self.first, *np.zeros(count - 1)])

    drawn = [draw_augmentation(AugmentConfig(), Evenly(i / 800), 3) for i in range(800)]  # type: ignore[arg-type]
    ways = [(one.mirrored, one.quarter_turns) for one in drawn]
    assert {way: ways.count(way) for way in ways} == {(one.mirrored, one.quarter_turns): 100 for one in EIGHT}


def test_what_is_drawn_next_does_not_depend_on_the_settings() -> None:
    after = []
    for config in (AugmentConfig(), AugmentConfig(flips_and_turns=False, blur=1, noise=0.1), LIGHT):
        rng = np.random.default_rng(3)
        draw_augmentation(config, rng, 4)
        after.append(rng.bit_generator.state)
    assert after[0] == after[1] == after[2]


def test_draws_stay_within_the_settings_and_reach_to_their_ends() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_augmentation(LIGHT, rng, 3) for _ in range(2000)]
    for values, low, high in (
        ([one.scale for one in drawn], 0.5, 2.0),
        ([one.contrast for one in drawn], 0.7, 1.3),
        ([one.brightness for one in drawn], -0.2, 0.2),
        ([gain for one in drawn for gain in one.gains], 0.9, 1.1),
    ):
        assert low <= min(values) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < max(values) <= high
    assert np.median([one.scale for one in drawn]) == pytest.approx(1, abs=0.1)


def test_without_settings_nothing_changes() -> None:
    off = draw_augmentation(AugmentConfig(flips_and_turns=False), np.random.default_rng(0), 3)
    assert off == Augmentation(gains=PLAIN)
    before = chips()
    assert torch.equal(by(before, [off] * 8).pixels_bkhw, before.pixels_bkhw.float())


def test_an_augmentation_travels() -> None:
    one = draw_augmentation(LIGHT, np.random.default_rng(0), 3)
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301 - bytes made here


def test_light_by_hand() -> None:
    """60 in a range from 10: (10 + 50 * 1.2 - 40) * 0.5 + 40 + 0.1 * 100 = 65; 200 is beyond the range."""
    pixels = torch.tensor([60.0, 200.0]).reshape(2, 1, 1, 1)
    same = Chips(pixels, torch.zeros(2, 1, 1, dtype=torch.uint8), torch.ones(2, 1, 1, dtype=torch.bool))
    light = Augmentation(gains=(1.2,), contrast=0.5, brightness=0.1)
    lit = augmented(same, [light, light], mean=(40.0,), value_range=(10.0, 110.0)).pixels_bkhw
    assert lit.flatten().tolist() == pytest.approx([65, 110])


def test_light_is_that_of_a_pixel_alone() -> None:
    """Neither its neighbours nor whether they are valid (NaN stands where they are not) nor the turn has a say."""
    before, rng = chips(dtype=torch.float32), np.random.default_rng(1)
    lights = [draw_augmentation(LIGHT, rng, 3) for _ in range(8)]
    lit = by(before, lights)
    with_nan = before.pixels_bkhw.masked_fill(~before.valid[:, None], torch.nan)
    other = by(Chips(with_nan, before.labels_bhw, before.valid), lights)
    valid = lit.valid[:, None].expand_as(lit.pixels_bkhw)
    assert torch.equal(other.pixels_bkhw[valid], lit.pixels_bkhw[valid])
    assert other.pixels_bkhw[~valid].isnan().all()
    assert torch.equal(other.valid, lit.valid)
    assert 0 <= lit.pixels_bkhw.min() < lit.pixels_bkhw.max() <= 255


def test_a_blur_is_the_weighted_mean_of_what_is_valid() -> None:
    before = chips(2, side=21)
    one = Augmentation(gains=PLAIN, blur=1.3)
    after = by(before, [one, Augmentation(gains=PLAIN)])
    assert torch.equal(after.pixels_bkhw[1], before.pixels_bkhw[1].float())
    assert torch.equal(after.labels_bhw, before.labels_bhw)
    rows, cols = np.mgrid[-4:5, -4:5]
    weights = np.exp(-0.5 * (rows**2 + cols**2) / 1.3**2)
    for row, col in ((10, 10), (0, 0), (3, 20)):
        pixels = np.pad(before.pixels_bkhw[0].numpy().astype(float), ((0, 0), (4, 4), (4, 4)))
        valid = np.pad(before.valid[0].numpy(), 4)[row : row + 9, col : col + 9] * weights
        wanted = (pixels[:, row : row + 9, col : col + 9] * valid).sum((1, 2)) / valid.sum()
        got = after.pixels_bkhw[0, :, row, col].numpy()
        if before.valid[0, row, col]:
            assert got == pytest.approx(wanted, rel=1e-4)
        else:
            assert (got == before.pixels_bkhw[0, :, row, col].numpy()).all()
    changed = Chips(before.pixels_bkhw.clone(), before.labels_bhw, before.valid)
    changed.pixels_bkhw[:, :, 12, 12] = 255 - changed.pixels_bkhw[:, :, 12, 12]
    hidden = before.valid.clone()
    hidden[:, 12, 12] = False
    results = [
        by(Chips(each.pixels_bkhw, each.labels_bhw, hidden), [one, one]).pixels_bkhw for each in (before, changed)
    ]
    results[1][:, :, 12, 12] = results[0][:, :, 12, 12]
    assert torch.equal(*results), "what is invalid has no say"


def test_noise_has_its_size_and_follows_from_its_seed() -> None:
    before = Chips(
        torch.full((3, 3, 64, 64), 128), torch.zeros(3, 64, 64, dtype=torch.uint8), torch.ones(3, 64, 64).bool()
    )
    told = [Augmentation(gains=PLAIN, noise=noise, noise_seed=seed) for noise, seed in ((0.05, 1), (0.05, 2), (0.0, 3))]
    once, again = by(before, told).pixels_bkhw, by(before, told).pixels_bkhw
    assert torch.equal(once, again)
    assert once[0].std().item() == pytest.approx(0.05 * 255, rel=0.05)
    assert not torch.equal(once[0], once[1])
    assert torch.equal(once[2], before.pixels_bkhw[2].float())
    alone = by(Chips(before.pixels_bkhw[1:2], before.labels_bhw[1:2], before.valid[1:2]), told[1:2]).pixels_bkhw
    assert torch.equal(alone[0], once[1]), "whatever else is in its batch"
    assert by(before, [Augmentation(gains=PLAIN, noise=0.9)] * 3).pixels_bkhw.max() <= 255


def test_half_of_the_chips_stay_sharp_and_half_without_noise() -> None:
    config = AugmentConfig(blur=2.0, noise=0.1)
    drawn = [draw_augmentation(config, np.random.default_rng(seed), 3) for seed in range(1000)]
    for values, most in (([one.blur for one in drawn], 2.0), ([one.noise for one in drawn], 0.1)):
        assert 450 < sum(value == 0 for value in values) < 550
        assert 0.95 * most < max(values) <= most
    assert len({one.noise_seed for one in drawn if one.noise}) == sum(one.noise > 0 for one in drawn)


def test_all_dates_of_a_stack_have_one_light_and_one_turn() -> None:
    one, rng = chips(), np.random.default_rng(2)
    lights = [draw_augmentation(LIGHT, rng, 3) for _ in range(8)]
    stack = Chips(one.pixels_bkhw.repeat(1, 2, 1, 1), one.labels_bhw, torch.stack([one.valid, ~one.valid], 1))
    lit, of_date = by(stack, lights), by(one, lights)
    assert torch.equal(lit.pixels_bkhw, of_date.pixels_bkhw.repeat(1, 2, 1, 1))
    assert torch.equal(lit.valid, torch.stack([of_date.valid, ~of_date.valid], 1))


def test_what_cannot_be_augmented_is_refused() -> None:
    wide = chips()
    with pytest.raises(ValueError, match=r"only square chips.*\(4, 5\)"):
        by(Chips(wide.pixels_bkhw[:, :, 1:], wide.labels_bhw, wide.valid), EIGHT)
    with pytest.raises(ValueError, match="got 7 for 8 chips"):
        by(wide, EIGHT[1:])
    lights = [draw_augmentation(LIGHT, np.random.default_rng(0), 3)] * 8
    with pytest.raises(ValueError, match="one date or more, got 4 of 3"):
        by(chips(bands=4), lights)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scale": (1.2, 0.8)}, "smaller first"),
        ({"scale": (0.0, 1.0)}, "0.25 to 4"),
        ({"contrast": 1.0}, "less than 1"),
        ({"brightness": -0.1}, "greater than or equal to 0"),
        ({"colour": 0.1}, "did you mean 'color'"),
    ],
)
def test_a_wrong_setting_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(AugmentConfig, values, where="augment")
