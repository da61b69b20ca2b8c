"""Ahead of every peer: a scene from the real object store to a COG there, by geoseg and by what people use otherwise.

    pip install --no-deps --target .peers -r tests/benchmarks/requirements-peers.txt
    python tests/benchmarks/peers.py [--side 4096] [--rounds 3] [--ways geoseg plain monai] [--predict precision=bfloat16]

All ways run the same network with the same weights on a generated scene, each in a process of its own, in turns; the medians of
the rounds are printed. See ``ways.py`` for how each is written. Peers that are not installed are named and left out.

    wall s, CPU s  from when the imports were done until the mask stood; of all processes (see ``kit/measured.py``), Ray's included
                   and the object store's not
    to geoseg      those as multiples of what geoseg's plain loop took in the same round
    of bare        geoseg's rate against that of the bare forward pass before and after (see ``end_to_end.py``)
    computed       pixels that went through the network for each that was kept; of geoseg, operations against those that a pixel
                   of an endless image takes
    differ         share of the pixels whose class is another than in the float32 reference, made in windows with more context
                   around them than reaches a pixel; a rim of the scene as wide as that context is left out, since each way has
                   its own idea of what lies outside
"""

from __future__ import annotations

import argparse
import importlib.machinery
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import rasterio
import torch
from benchmarks.end_to_end import MIB, setting
from benchmarks.ways import Outcome, Task, run_way
from kit.benched import BarePass, BenchedScene, benched_scene
from kit.oracle import mirrored_whole
from numpy.typing import NDArray
from rasterio.io import MemoryFile

from geoseg.config import DEFAULT_BUNDLE
from geoseg.model.bundle import Bundle
from geoseg.predict.bundles import load_bundle, save_bundle
from geoseg.raster import store

REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")
_CORE = 1024


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table: the way that makes it, the module of a peer that it needs, and geoseg's ``[cluster]``."""

    title: str
    way: str
    needs: str | None = None
    cluster: Mapping[str, Any] = field(default_factory=dict)


def all_entries(cores: int) -> dict[str, Entry]:
    """All lines by the names that the command line has for them."""
    return {
        "geoseg": Entry(title="geoseg, plain loop", way="geoseg", cluster={"engine": "local"}),
        "geoseg-ray": Entry(title="geoseg on Ray", way="geoseg", cluster={"engine": "ray", "workers": cores}),
        "plain": Entry(title="rasterio + torch loop", way="plain"),
        "tuned": Entry(title="the loop tuned by hand", way="tuned"),
        "torchgeo": Entry(title="TorchGeo", way="torchgeo", needs="torchgeo"),
        "monai": Entry(title="MONAI", way="monai", needs="monai"),
        "rastervision": Entry(title="Raster Vision", way="rastervision", needs="rastervision.pytorch_learner"),
        "ray-data": Entry(title="Ray Data", way="ray_data"),
    }


@torch.inference_mode()
def reference(bundle: Bundle, pixels_bhw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The classes (row, col) by the network as it was trained, in float32 and without a seam, and the bundle's thresholds."""
    network, description = bundle.network().laid_channels_last(), bundle.description
    offsets_chw = torch.tensor(description.offsets)[:, None, None]
    halo = network.halo
    image_bhw = mirrored_whole(pixels_bhw, halo, network.stride)
    classes_hw = np.zeros(pixels_bhw.shape[1:], np.uint8)
    for row in range(0, classes_hw.shape[0], _CORE):
        for col in range(0, classes_hw.shape[1], _CORE):
            around_bhw = image_bhw[:, row : row + _CORE + 2 * halo, col : col + _CORE + 2 * halo]
            image_bkhw = torch.from_numpy(around_bhw.copy())[None]
            valid_bhw = torch.ones(1, *image_bkhw.shape[2:], dtype=torch.bool)
            logits_chw = network(description.normalization(image_bkhw, valid_bhw))[0] + offsets_chw
            to_hw = classes_hw[row : row + _CORE, col : col + _CORE]
            rows, cols = to_hw.shape
            to_hw[:] = logits_chw[:, halo : halo + rows, halo : halo + cols].max(0).indices.numpy()
    return classes_hw


def is_installed(entry: Entry, peers: Path) -> bool:
    """Whether what a way needs is in this environment or in the folder of the peers."""
    place: list[str] | None = [str(peers), *sys.path]
    for name in entry.needs.split(".") if entry.needs else []:
        found = importlib.machinery.PathFinder.find_spec(name, place)
        if found is None:
            return False
        place = list(found.submodule_search_locations or [])
    return True


@dataclass(frozen=True, kw_only=True)
class Result:
    """A way in one round; the last three as columns of the table."""

    outcome: Outcome
    differ: float
    computed: float
    of_bare: float | None = None


class Contest:
    """A scene in the object store, the reference for it, and the ways that are run on it."""

    def __init__(self, scene: BenchedScene, folder: str, *, peers: Path, predict: Mapping[str, Any]) -> None:
        self._scene, self._folder, self._peers, self._predict = scene, folder, peers, predict
        self.bare = BarePass(scene.uri, bundle=folder, predict=predict)
        bundle = load_bundle(folder)
        self._rim = bundle.network().halo
        with rasterio.open(scene.path) as source:
            self._truth_hw = reference(bundle, source.read())

    def run(self, entry: Entry, out: str, *, cores: int) -> Result:
        """Run a way once; geoseg between two bare passes."""
        task = Task(
            scene=self._scene.uri,
            out=f"{self._scene.root}/{out}",
            bundle=self._folder,
            cores=cores,
            predict=self._predict,
            cluster=entry.cluster,
        )
        environment = dict(self._scene.environment)
        if entry.needs:
            path = [str(self._peers.resolve()), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        num_pixels = self._truth_hw.size
        if entry.way != "geoseg":
            outcome = run_way(entry.way, task, environment=environment)
            return Result(outcome=outcome, differ=self._differ(outcome), computed=outcome.computed / num_pixels)
        before, _ = self.bare.rate()
        outcome = run_way(entry.way, task, environment=environment)
        after, _ = self.bare.rate()
        return Result(
            outcome=outcome,
            differ=self._differ(outcome),
            computed=self.bare.computed_per_kept,
            of_bare=num_pixels / outcome.working_s / statistics.mean((before, after)),
        )

    def _differ(self, outcome: Outcome) -> float:
        with MemoryFile(store.read(outcome.mask)) as file, file.open() as dataset:
            mask_hw = dataset.read(1)
        inside = (slice(self._rim, -self._rim), slice(self._rim, -self._rim))
        return float((mask_hw[inside] != self._truth_hw[inside]).mean())


def table(rounds: Sequence[Mapping[str, Result]], entries: Mapping[str, Entry], mpx: float) -> list[str]:
    """A heading and a line for each way, with the medians of the rounds."""
    heading = (
        f"{'way':<22} {'wall s':>7} {'Mpx/s':>6} {'to geoseg':>9} {'CPU s':>7} {'to geoseg':>9} {'peak MiB':>8} {'computed':>8} "
        f"{'of bare':>7} {'differ %':>8}"
    )
    lines = [heading]
    for name in entries:
        runs = [each[name] for each in rounds]
        wall_s, cpu_s, peak = (
            statistics.median(getattr(run.outcome, key) for run in runs) for key in ("seconds", "cpu_s", "peak_bytes")
        )
        wall_ratio, cpu_ratio = (
            statistics.median(
                getattr(run.outcome, key) / getattr(each["geoseg"].outcome, key)
                for run, each in zip(runs, rounds, strict=True)
            )
            for key in ("seconds", "cpu_s")
        )
        bare = [run.of_bare for run in runs if run.of_bare is not None]
        lines.append(
            f"{entries[name].title:<22} {wall_s:>7.1f} {mpx / wall_s:>6.2f} {wall_ratio:>9.2f} {cpu_s:>7.1f} {cpu_ratio:>9.2f} "
            f"{peak / MIB:>8.0f} {runs[0].computed:>8.2f} {f'{statistics.median(bare):.2f}' if bare else '':>7} "
            f"{100 * max(run.differ for run in runs):>8.4f}"
        )
    return lines


def main() -> None:
    """Run the rounds and print the table."""
    cores = len(os.sched_getaffinity(0))
    known = all_entries(cores)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096, help="of the scene: a multiple of 16, at least 1024 pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=known, default=list(known), help="beside geoseg's plain loop")
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE)
    parser.add_argument("--predict", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="for geoseg")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder in which the peers were installed")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    chosen = {"geoseg": known["geoseg"], **{name: known[name] for name in options.ways}}
    missing = [name for name, entry in chosen.items() if not is_installed(entry, options.peers)]
    for name in missing:
        how = f"pip install --no-deps --target {options.peers} -r {REQUIREMENTS}"
        print(f"{chosen.pop(name).title} is not installed and left out; get it with: {how}", flush=True)
    mpx = options.side**2 / 1e6
    with benched_scene(options.side, where="bucket") as scene, tempfile.TemporaryDirectory() as folder:
        bundle = load_bundle(options.bundle)
        save_bundle(bundle, folder)
        contest = Contest(scene, folder, peers=options.peers, predict=dict(options.predict))
        told = f"{mpx:.1f} Mpx, {bundle.description.name}, windows of geoseg {contest.bare.window}"
        print(f"{told}, {torch.get_num_threads()} threads", flush=True)
        rounds: list[dict[str, Result]] = []
        for turn in range(options.rounds):
            rounds.append({})
            for name, entry in list(chosen.items()):
                try:
                    done = contest.run(entry, f"{name}-{turn}", cores=cores)
                except subprocess.CalledProcessError as error:
                    if name == "geoseg":
                        raise
                    print(f"{entry.title} ended with status {error.returncode} and is left out", flush=True)
                    del chosen[name]
                    continue
                rounds[-1][name] = done
                told = f"{entry.title}: {done.outcome.seconds:.1f} s, {done.outcome.cpu_s:.1f} CPU s"
                print(f"round {turn + 1} of {options.rounds}, {told}", flush=True)
    print("\n".join(table(rounds, chosen, mpx)))


if __name__ == "__main__":
    main()
