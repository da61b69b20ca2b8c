"""Checkpoints: all that training needs to go on, in one object, so that there is a whole one or none; no pickle.

A checkpoint is a safetensors file; its header's ``geoseg`` entry is JSON with where training stood.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from geoseg.errors import ConfigError, StoreError
from geoseg.raster import store

_FOLDER = "checkpoints"
_NAME = re.compile(r"(\d{3})-(\d{9})\.safetensors")
_KEPT = 2
_FORMAT = "geoseg-checkpoint/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where training stands: ``step`` of ``stage`` is the next one, ``total_steps`` have been taken in all stages.

    These took ``seconds`` and ``gflop`` billions of operations. ``best`` is the best score of the stage, None before the first;
    ``worse`` counts evaluations since. ``settings`` is the digest of what decides the weights.
    """

    stage: int
    step: int
    total_steps: int
    seconds: float
    gflop: float
    best: float | None
    worse: int
    settings: str


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A position and tensors by name."""

    position: Position
    tensors: dict[str, Tensor]


def save_checkpoint(out: str, checkpoint: Checkpoint) -> None:
    """Put a checkpoint below ``out``, then remove all but the last two."""
    position = checkpoint.position
    told = json.dumps({"format": _FORMAT, **asdict(position)})
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    name = f"{position.stage:03d}-{position.step:09d}.safetensors"
    store.write(store.join(out, _FOLDER, name), save(tensors, metadata={"geoseg": told}))
    store.delete(_checkpoints(out)[:-_KEPT])


def load_checkpoint(out: str) -> Checkpoint | None:
    """The last checkpoint below ``out``; None when there is none. Raises StoreError for one that cannot be read."""
    found = _checkpoints(out)
    if not found:
        return None
    data = store.read(found[-1])
    try:
        position = _position(data)
        return Checkpoint(position, load(data))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoreError(
            f"{store.redact(found[-1])}: is no checkpoint of this version of geoseg ({error}); remove it to go on "
            "from the one before"
        ) from error


def last_step(out: str, stage: int) -> int:
    """The step at which ``stage`` goes on after the last checkpoint below ``out``; 0 when that is in another stage."""
    found = _checkpoints(out)
    at = _NAME.fullmatch(store.base_name(found[-1])) if found else None
    return int(at[2]) if at is not None and int(at[1]) == stage else 0


def check_settings(checkpoint: Checkpoint, settings: str, out: str) -> None:
    """Raise ConfigError when a checkpoint was made with other settings than ``settings`` (their digest)."""
    if checkpoint.position.settings != settings:
        raise ConfigError(
            f"{store.redact(out)}: holds a training with other settings or other data (see its job.json); name another out, or "
            "remove its checkpoints to begin anew"
        )


def _checkpoints(out: str) -> list[str]:
    """All checkpoints, the last one last."""
    uris = [info.uri for info in store.walk(store.join(out, _FOLDER))]
    return sorted(uri for uri in uris if _NAME.fullmatch(store.base_name(uri)))


def _position(data: bytes) -> Position:
    size = int.from_bytes(data[:8], "little")
    told: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["geoseg"])
    if told.pop("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT}")
    return Position(**told)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as tensors by name: ``optimizer.<parameter>.<key>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{key}": torch.as_tensor(value)
        for number, values in state.items()
        for key, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, key = rest.split(".")
            state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def of_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix`` and a dot, without that."""
    return {
        name.removeprefix(prefix + "."): tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")
    }
