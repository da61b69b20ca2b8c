"""The bundle: all that passes from training to prediction, as two plain files (safetensors weights and one JSON)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from geoseg.config import what_is_wrong
from geoseg.errors import BundleError
from geoseg.model.description import BundleDescription, Frozen
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
        network = build(
            self.description.variant,
            len(self.description.bands),
            len(self.description.classes),
            dates=self.description.dates,
        )
        try:
            state = load(self.weights)
        except SafetensorError as error:
            raise BundleError(f"bundle {self.description.name}: {WEIGHTS_NAME} is not safetensors: {error}") from error
        wanted = network.state_dict()
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
        network.load_state_dict(state)
        return network.eval()

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


def _as_json(text: bytes) -> Any:
    """The value, or nothing when it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return {}
