"""Networks from outside in training: built from the seed alone, stepped as ours are, and what comes out predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.encoders import STAND_IN, real_encoders, stand_in
from kit.object_store import free_ports
from kit.training import scenes, values
from safetensors.torch import load_file

import geoseg
from geoseg.config import check
from geoseg.errors import ConfigError
from geoseg.predict.bundles import load_bundle
from geoseg.run_training import run_training
from geoseg.train.feed import feed_from_threads
from geoseg.train.job import TrainJob
from geoseg.train.log import MetricsLog
from geoseg.train.loop import Group
from geoseg.training import keep_tables_in_threads, prepare, train_share

WORKER = Path(__file__).parents[1] / "kit" / "one_worker.py"


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Let the stand-in be imported unless a test asks for the real one."""
    with stand_in():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def told(folder: Path, out: Path, encoder: str = "convs", **options: Any) -> dict[str, Any]:
    whole = values(folder, out)
    return whole | {"model": whole["model"] | {"variant": {"name": "smp", "encoder": encoder, "options": options}}}


def job(
    folder: Path, out: Path, encoder: str = "convs", *, more: dict[str, Any] | None = None, **options: Any
) -> TrainJob:
    return check(TrainJob, told(folder, out, encoder, **options) | (more or {}), where="the test")


def train(job: TrainJob) -> Path:
    torch.set_num_threads(1)
    prepared = prepare(job, keep_tables=keep_tables_in_threads)
    feed = partial(feed_from_threads, threads=2)
    train_share(prepared, feed, lambda *_: None, group=Group(), device="cpu")
    return Path(job.out)


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in MetricsLog.load(str(out), up_to=(9, 99)).records if record["kind"] == "train"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "stage-2" / "last" / "model.safetensors")


@pytest.mark.parametrize("encoder", ["convs", "gated"])
def test_a_training_ends_with_a_bundle_that_predicts(folder: Path, tmp_path: Path, encoder: str) -> None:
    report = run_training(job(folder, tmp_path, encoder), warn=lambda _: None, quiet=True)
    assert Path(report.chips).stat().st_size > 0
    assert report.gflop > 0
    variant = load_bundle(report.bundle).description.variant
    assert variant.margin == (None if encoder == "gated" else 7), "measured, though the file says nothing of it"
    masks = geoseg.predict(str(folder / "v.tif"), str(tmp_path / "masks"), bundle=report.bundle)
    assert masks.counts["published"] == 1


def test_the_seed_decides_the_weights(folder: Path, tmp_path: Path) -> None:
    one, same = (weights(train(job(folder, tmp_path / name))) for name in "ab")
    assert all(torch.equal(one[name], same[name]) for name in one)
    other = weights(train(job(folder, tmp_path / "c", more={"seed": 6})))
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_two_workers_take_the_steps_of_one_where_layers_drop_at_random_and_some_are_idle(
    folder: Path, tmp_path: Path
) -> None:
    alone = train(job(folder, tmp_path / "one", dropout=0.5, idle=True))
    path = tmp_path / "job.json"
    path.write_text(json.dumps(told(folder, tmp_path / "two", dropout=0.5, idle=True)))
    (port,) = free_ports(1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(STAND_IN), *sys.path])}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, path, str(rank), "2", str(port)], stderr=subprocess.PIPE, env=environment
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=300)
        assert worker.returncode == 0, said.decode()
    assert np.allclose(losses(tmp_path / "two"), losses(alone), rtol=1e-4)


def test_a_network_that_cannot_be_made_is_told_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.variant: .* makes no Unet of resnet"):
        prepare(job(folder, tmp_path, "resnet"), keep_tables=keep_tables_in_threads)


def test_padding_that_it_does_not_have_is_refused(folder: Path, tmp_path: Path) -> None:
    stage = {"chip": 32, "steps": 1, "batch": 2, "learning_rate": 0.01, "padding": "valid"}
    with pytest.raises(ConfigError, match="stage 1: padding = 'valid' is for networks of ours, a Unet of convs pads"):
        prepare(job(folder, tmp_path, more={"stage": [stage]}), keep_tables=keep_tables_in_threads)


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", "tu-mobilenetv3_small_050"])
def test_real_encoders_train(folder: Path, tmp_path: Path, encoder: str) -> None:
    with real_encoders():
        stage = {"chip": 64, "steps": 2, "batch": 2, "learning_rate": 0.01}
        small = job(folder, tmp_path, encoder, more={"stage": [stage]}, decoder_channels=[16, 8, 8, 8, 8])
        report = run_training(small, warn=lambda _: None, quiet=True)
        assert np.isfinite(losses(tmp_path)).all()
        load_bundle(report.bundle)
