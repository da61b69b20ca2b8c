"""Stages: what is left out follows from the last one, and a setting without effect is told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from geoseg.config import check
from geoseg.errors import ConfigError
from geoseg.train.stages import Stage, StageConfig, resolve_stages, warnings_of

CLASSES = ("background", "building", "road")
LAST = {"chip": 256, "batch": 4, "learning_rate": 0.004, "steps": 100}


def configs(*stages: dict[str, Any]) -> tuple[StageConfig, ...]:
    return tuple(check(StageConfig, stage, where="the test") for stage in stages)


def resolved(*stages: dict[str, Any], labelled_m2: float = 1e6, stride: int = 16) -> tuple[Stage, ...]:
    return resolve_stages(configs(*stages), resolution_m=0.5, labelled_m2=labelled_m2, stride=stride, classes=CLASSES)


def test_batch_and_learning_rate_follow_from_the_last_stage() -> None:
    coarse, last = resolved({"chip": 64, "steps": 10, "resolution_m": 2.0}, LAST)
    assert (coarse.batch, last.batch) == (64, 4), "as many pixels in a step"
    assert coarse.learning_rate == pytest.approx(last.learning_rate * math.sqrt(64 / 4))
    assert (coarse.resolutions_m, last.resolutions_m) == ((2.0,), (0.5,))


def test_an_epoch_covers_the_labelled_ground_once() -> None:
    (stage,) = resolved({**LAST, "steps": None, "epochs": 2}, labelled_m2=1e6)
    chip_m2 = (256 * 0.5) ** 2
    assert (stage.steps - 1) * stage.batch * chip_m2 < 2e6 <= stage.steps * stage.batch * chip_m2


def test_chips_of_several_resolutions_count_with_their_mean_ground() -> None:
    (stage,) = resolved({**LAST, "steps": None, "epochs": 1, "resolution_m": [2.0, 0.5]})
    mean_m2 = ((256 * 2.0) ** 2 + (256 * 0.5) ** 2) / 2
    assert stage.steps == math.ceil(1e6 / (mean_m2 * 4))
    assert stage.bundle_resolution_m == 0.5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_learning_rate_rises_in_a_line_and_falls_to_its_end(schedule: str) -> None:
    (stage,) = resolved({**LAST, "schedule": schedule, "warmup_steps": 20, "final_share": 0.1})
    rates = [stage.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.004 / 20)
    assert rates[19] == rates[20] == pytest.approx(0.004)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    end = stage.learning_rate_at(100)
    assert end == pytest.approx(0.004 if schedule == "constant" else 0.0004)
    if schedule == "linear":
        assert stage.learning_rate_at(60) == pytest.approx((0.004 + 0.0004) / 2)


def test_a_batch_is_made_of_whole_passes() -> None:
    (stage,) = resolved({**LAST, "batch": 12, "chips_per_pass": 4})
    assert (stage.num_passes, stage.chips_per_pass) == (3, 4)
    with pytest.raises(ConfigError, match="stage 1: a batch of 12 is not made of whole passes of 5"):
        resolved({**LAST, "batch": 12, "chips_per_pass": 5})


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (({"chip": 64, "steps": 1},), "the last stage must name its batch and its learning_rate"),
        (({**LAST, "chip": 100},), "stage 1: a chip's side must be a multiple of 16"),
        (({**LAST, "border": {"label": "tower"}},), "border.label 'tower' is none of the classes"),
        (({"chip": 64, "steps": 5, "warmup_steps": 5}, LAST), "stage 1: warmup_steps 5 leave nothing of its 5 steps"),
    ],
)
def test_what_cannot_be_is_told_with_its_stage(stages: tuple[dict[str, Any], ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolved(*stages)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 1}, "either steps or epochs"),
        ({"resolution_m": [1.0, 1.0]}, "named once"),
        ({"stepps": 3}, "did you mean 'steps'"),
    ],
)
def test_a_wrong_stage_is_refused_in_a_sentence(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        configs({**LAST, **change})


@pytest.mark.parametrize(
    ("change", "has_validation", "told"),
    [
        ({"schedule": "constant", "final_share": 0.5}, True, "final_share has no effect"),
        ({"evaluate_every": 100}, True, "evaluate_every has no effect: the stage has 100 steps"),
        ({"evaluate_every": 10}, False, "evaluate_every has no effect: there are no validation scenes"),
        (
            {"evaluate_every": 50, "plateau": {"patience": 2}},
            True,
            "plateau has no effect: the stage has 2 evaluations",
        ),
        ({"plateau": {}}, False, "plateau has no effect: there are no validation scenes"),
    ],
)
def test_a_setting_without_effect_is_told(change: dict[str, Any], has_validation: bool, told: str) -> None:
    stages = configs({**LAST, **change})
    plain = configs(LAST)
    (warning,) = warnings_of(stages, resolved({**LAST, **change}), has_validation=has_validation)
    assert told in warning
    assert warnings_of(plain, resolved(LAST), has_validation=has_validation) == []
