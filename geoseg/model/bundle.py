"""The bundle: all that passes from training to prediction, as two plain files (safetensors weights and one JSON)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from geoseg.config import what_is_wrong
from geoseg.errors import BundleError
from geoseg.model.description import BundleDescription, Frozen, UNetVariant
from geoseg.model.network import Network
from geoseg.model.variants import build

WEIGHTS_NAME = "model.safetensors"
DESCRIPTION_NAME = "model.json"


class Bundle(Frozen):
    """A network's description and its weights as bytes; it travels between processes as it is."""

    description: BundleDescription
    weights: bytes

    @property
    def digest(self) -> str:
        """SHA-256 over description and weights, hex; part of every result's fingerprint."""
        digest = hashlib.sha256(self.description_json())
        digest.update(self.weights)
        return digest.hexdigest()

    def description_json(self) -> bytes:
        """The bytes of ``model.json``."""
        return (json.dumps(self.description.model_dump(mode="json"), indent=2) + "\n").encode()

    def network(self) -> Network:
        """The network with its weights, in evaluation mode, padding ``same``, on the CPU.

        Raises BundleError when the weights do not fit the description.
        """
        try:
            state = load(self.weights)
            _see_names_once(self.weights)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # torch lacks some dtypes
            raise BundleError(f"bundle {self.description.name}: {WEIGHTS_NAME} is not safetensors: {error}") from error
        if isinstance(self.description.variant, UNetVariant):
            # A description may ask for more memory than there is; on this device a network takes none.
            with torch.device("meta"):
                self._check(self._build().state_dict(), state)
            network = self._build()
        else:
            network = self._build()
            self._check(network.state_dict(), state)
        network.load_state_dict(state)
        return network.eval()

    def _build(self) -> Network:
        told = self.description
        return build(told.variant, len(told.bands), len(told.classes), dates=told.dates)

    def _check(self, wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        for name in sorted(wanted.keys() | state.keys()):
            want = tuple(wanted[name].shape) if name in wanted else "nothing"
            got = tuple(state[name].shape) if name in state else "nothing"
            if want != got:
                raise BundleError(
                    f"bundle {self.description.name}: the description wants {want} for tensor {name}, "
                    f"{WEIGHTS_NAME} has {got}; the two files do not belong together"
                )
            if not bool(state[name].isfinite().all()):
                raise BundleError(f"bundle {self.description.name}: tensor {name} holds NaN or infinite weights")

    @classmethod
    def from_network(cls, network: Network, description: BundleDescription) -> Bundle:
        """A bundle of ``network``'s weights."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        return cls(description=description, weights=save(state))

    @classmethod
    def from_bytes(cls, description_json: bytes, weights: bytes, *, origin: str) -> Bundle:
        """Read back the two files; ``origin`` (their URI) is named in errors. Raises BundleError."""
        try:
            description = BundleDescription.model_validate_json(description_json)
        except ValidationError as error:
            sentence = what_is_wrong(error, BundleDescription, _as_json(description_json))
            raise BundleError(f"{origin}: {DESCRIPTION_NAME} is no bundle description: {sentence}") from error
        bundle = cls(description=description, weights=weights)
        bundle.network()
        return bundle


def _see_names_once(weights: bytes) -> None:
    """Raises ValueError for a header that says something twice: which of them counts is up to who reads it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        told = dict(pairs)
        if len(told) < len(pairs):
            raise ValueError("a name stands twice in its header")
        return told

    json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")], object_pairs_hook=once)


def _as_json(text: bytes) -> Any:
    """The value, or nothing when it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}
