"""Settings are checked as a whole; a wrong one gets a sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from geoseg.config import Job, PredictConfig, job_schema, load_job
from geoseg.errors import ConfigError

MINIMAL = 'scenes = ["a.tif"]\nout = "out"\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINIMAL + "[predict]\nwindw = 512\n", "no setting 'predict.windw'; did you mean 'window'"),
        (MINIMAL + "[predict]\nwindow = 500\n", "predict.window.*512.*got 500"),
        (MINIMAL + "[predict]\nscale = [5, 5]\n", "rising"),
        (MINIMAL + "[predict]\nresolution = 'fine'\n", "resolution.*got 'fine'"),
        (MINIMAL + "[predict]\npyramid = [2, 1]\n", "predict.pyramid.*rising factors, for example 1,2,4.*got"),
        (MINIMAL + "[predict]\npyramid = [2, 2]\n", "rising factors"),
        (MINIMAL + "[predict]\npyramid = []\n", "rising factors"),
        (MINIMAL + "[predict]\npyramid = [1]\n", "leave it out for 1 alone"),
        (MINIMAL + "[predict]\npyramid = [1, 3]\n", "predict.pyramid.*got 3"),
        (MINIMAL + "[predict]\nresampling = 'nearest'\n", "predict.resampling.*no effect without a pyramid"),
        (MINIMAL + "[predict]\npyramid = [2]\nresampling = 'cubic'\n", "predict.resampling.*got 'cubic'"),
        (MINIMAL + "[predict]\ncoarse = 3\n", "predict.coarse.*2, 4 or 8.*got 3"),
        (MINIMAL + "[predict]\ncoarse_threshold = 0.1\n", "predict.coarse_threshold.*no effect without a coarse pass"),
        (MINIMAL + "[predict]\ncoarse = 4\ncoarse_threshold = 1\n", "predict.coarse_threshold.*less than 1.*got 1"),
        (MINIMAL + "[cluster]\nworkers = 0\n", "cluster.workers.*greater than or equal to 1"),
        ('scenes = ["a.tif"]\n', "'out' is missing"),
        ('scenes = []\nout = "o"\n', "scenes"),
        ("scenes = [", "not a readable TOML file"),
        ("predict = 3\n" + MINIMAL, "predict: .*got 3"),
    ],
)
@pytest.mark.parametrize("overrides", [{}, {"predict": {"batch": 2}}], ids=["the file alone", "with options"])
def test_a_wrong_job_file_is_refused_in_one_sentence(
    text: str, sentence: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_job(str(tmp_path / "job.toml"), overrides)
    assert "\n" not in str(caught.value)
    assert "job.toml" in str(caught.value)


def test_the_command_line_overrules_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(MINIMAL + "[predict]\nwindow = 512\nprobabilities = true\n")
    job = load_job(
        str(tmp_path / "job.toml"), {"out": "other", "scenes": None, "predict": {"window": 1024, "aoi": None}}
    )
    assert (job.out, job.scenes, job.predict.window, job.predict.probabilities) == ("other", ("a.tif",), 1024, True)


def test_the_schema_knows_every_section() -> None:
    schema = json.loads(job_schema())
    assert set(schema["properties"]) == set(Job.model_fields)


def test_every_setting_of_pixels_is_in_the_fingerprint_and_no_other() -> None:
    all_in_use = PredictConfig(
        warp_stacks=True,
        prune=1,
        flips_and_turns=True,
        pyramid=(1, 2),
        tile=512,
        max_seam_score=2,
        uncertainty="entropy",
        coarse=4,
        precision="float32",
    )
    left_out = {"window", "batch", "aoi", "max_seam_score"}
    assert set(PredictConfig.model_fields) - set(all_in_use.pixel_settings()) == left_out


def test_hybrids_not_in_use_leave_the_fingerprint_as_it_was_and_each_in_use_changes_it() -> None:
    before = {
        "resolution": "bundle",
        "bands": None,
        "scale": None,
        "nodata": None,
        "assume_crs": None,
        "sidecar_mask": False,
        "probabilities": False,
    }
    assert PredictConfig().pixel_settings() == before
    assert PredictConfig(flips_and_turns=False, pyramid=None, coarse=None).pixel_settings() == before
    assert PredictConfig(max_seam_score=2).pixel_settings() == before
    told = [
        PredictConfig(**settings).pixel_settings()
        for settings in (
            {"warp_stacks": True},
            {"prune": 1},
            {"flips_and_turns": True},
            {"pyramid": (1, 2)},
            {"pyramid": (2,)},
            {"pyramid": (2,), "resampling": "nearest"},
            {"pyramid": (2,), "flips_and_turns": True},
            {"tile": 512},
            {"uncertainty": "entropy"},
            {"uncertainty": "margin"},
            {"coarse": 2},
            {"coarse": 4},
            {"coarse": 4, "coarse_threshold": 0.3},
        )
    ]
    assert len({json.dumps(settings) for settings in [before, *told]}) == 14


def test_bilinear_said_or_not_is_the_same_pyramid() -> None:
    said = PredictConfig(pyramid=(1, 2), resampling="bilinear")
    assert said == PredictConfig(pyramid=(1, 2))
    assert PredictConfig(**said.model_dump(mode="json")) == said
    assert PredictConfig(**PredictConfig().model_dump(mode="json")) == PredictConfig()


def test_the_example_job_is_valid() -> None:
    job = load_job(str(Path(__file__).parents[1] / "jobs" / "configs" / "predict.toml"), {})
    assert job.cluster.workers == 8
