"""Models that mean harm: nothing in them is run, none of them takes memory that it did not bring, each is refused in a sentence."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.oracle import seeded_bundle
from safetensors.torch import load, save

from geoseg.errors import BundleError, ConfigError, StoreError
from geoseg.model.bundle import DESCRIPTION_NAME, WEIGHTS_NAME
from geoseg.predict.bundles import load_bundle
from geoseg.train.checkpoint import load_checkpoint


class Boom:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return (Path.touch, (self.trace,))


def safetensors(header: bytes, data: bytes = b"", *, size: int | None = None) -> bytes:
    """Return a file of that header, which says of itself that it has ``size`` bytes."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def zipped(members: dict[str, bytes]) -> bytes:
    """Return an archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return made.getvalue()


def saved(told: Any) -> bytes:
    """Return what ``torch.save`` makes."""
    made = io.BytesIO()
    torch.save(told, made)
    return made.getvalue()


def weights(trace: Path, sound: bytes) -> dict[str, bytes]:
    """Return weights that mean harm, by what they are; ``sound`` are those of the bundle."""
    evil = pickle.dumps(Boom(trace))
    tensors = load(sound)
    (size,) = struct.unpack_from("<Q", sound)
    header = sound[8 : 8 + size]
    first = min(json.loads(header).keys() - {"__metadata__"})
    entry = json.dumps({first: json.loads(header)[first]})[1:-1].encode()
    wide = {first: {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}
    odd = {first: {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
    return {
        "a pickle": evil,
        "a checkpoint of torch": saved({"state_dict": Boom(trace)}),
        "a program of torch": zipped({"archive_format": b"pt2", "version": b"0", "data/sample_inputs/model.pt": evil}),
        "an archive that climbs": zipped({"../../climbed": b"x", "/tmp/climbed": b"x", "data.pkl": evil}),
        "a header of 2^63 bytes": safetensors(header, size=1 << 63),
        "a header beyond the end": safetensors(header, size=len(header) + (1 << 20)),
        "a name twice": safetensors(header.replace(b"{", b"{" + entry + b",", 1), sound[8 + size :]),
        "a shape beyond the data": safetensors(json.dumps(wide).encode(), b"1234"),
        "a dtype that torch lacks": safetensors(json.dumps(odd).encode(), b"1234"),
        "brackets to the end": safetensors(b"[" * 100_000),
        "no header": b"",
        "NaN": save({**tensors, first: torch.full_like(tensors[first], float("nan"))}),
        "another shape": save({**tensors, first: torch.zeros(3, 1, 4)}),
        "one tensor more": save({**tensors, "more": torch.zeros(1)}),
        "one tensor less": save({name: tensor for name, tensor in tensors.items() if name != first}),
    }


HUGE = {"name": "unet", "depth": 8, "width": 512, "norm": "batch"}
DESCRIPTIONS: dict[str, bytes | dict[str, Any]] = {
    "a network of 10^11 weights": {"variant": HUGE},
    "a hundred thousand bands": {"bands": ["b"] * 100_000, "mean": [0] * 100_000, "std": [1] * 100_000},
    "brackets to the end": b"[" * 100_000,
    "a tag of YAML": b"!!python/object/apply:os.system ['touch trace']",
    "a class by its path": {"variant": {"name": "smp", "encoder": "os.system", "class_path": "os.system"}},
    "options of a library": {"variant": {"name": "smp", "encoder": "resnet18", "options": {"encoder_weights": "x"}}},
    "bytes that are no text": b"\xff\xfe\x00",
}


def refused(folder: Path) -> str:
    """Return the sentence of a bundle that is refused."""
    with pytest.raises((BundleError, ConfigError)) as caught:
        load_bundle(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_mean_harm_are_refused_and_run_nothing(tmp_path: Path, figure: Callable[..., None]) -> None:
    folder, trace = seeded_bundle(tmp_path / "bundle"), tmp_path / "trace"
    made = weights(trace, (folder / WEIGHTS_NAME).read_bytes())
    for name, body in made.items():
        (folder / WEIGHTS_NAME).write_bytes(body)
        assert WEIGHTS_NAME in refused(folder) or "tensor" in refused(folder), name
    ran = [
        path
        for path in (trace, tmp_path / "climbed", tmp_path.parent / "climbed", Path("/tmp/climbed"))
        if path.exists()
    ]
    figure("S7", f"code run or files made by {len(made)} kinds of weights that mean harm", len(ran), goal="0")
    assert not ran


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_means_harm_is_refused(name: str, tmp_path: Path) -> None:
    """That of a network of 400 GB too, before it is made."""
    folder, change = seeded_bundle(tmp_path / "bundle"), DESCRIPTIONS[name]
    told = json.loads((folder / DESCRIPTION_NAME).read_text())
    body = change if isinstance(change, bytes) else json.dumps({**told, **change}).encode()
    (folder / DESCRIPTION_NAME).write_bytes(body)
    assert refused(folder)
    assert not list(tmp_path.glob("**/trace"))


def test_mutated_weights_are_read_or_refused(tmp_path: Path) -> None:
    """By seed: bits of the header flipped, bytes cut off."""
    folder = seeded_bundle(tmp_path / "bundle")
    sound = (folder / WEIGHTS_NAME).read_bytes()
    (size,) = struct.unpack_from("<Q", sound)
    num_read = 0
    for seed in range(200):
        rng, body = random.Random(seed), bytearray(sound)
        for _ in range(rng.choice((1, 2, 8))):
            body[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
        (folder / WEIGHTS_NAME).write_bytes(body[: rng.choice((None, None, rng.randrange(len(body))))])
        with contextlib.suppress(BundleError):  # any other error is a surprise
            load_bundle(str(folder))
            num_read += 1
    assert num_read < 100


def test_a_checkpoint_that_means_harm_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder, trace = tmp_path / "checkpoints", tmp_path / "trace"
    folder.mkdir()
    metadata = [
        b"[]",
        b"{}",
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"geoseg": "3"}}',
        b'{"__metadata__": {"geoseg": "{"}}',
    ]
    bodies = [pickle.dumps(Boom(trace)), saved(Boom(trace)), b"", safetensors(b"{}", size=1 << 63)]
    for body in (*bodies, *map(safetensors, metadata)):
        (folder / "000-000000001.safetensors").write_bytes(body)
        with pytest.raises(StoreError, match="is no checkpoint of this version of geoseg"):
            load_checkpoint(str(tmp_path))
    assert not trace.exists()
