"""The bundle: all that passes from training to prediction, as two plain files (safetensors weights and one JSON)."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save

from geoseg.errors import BundleError
from geoseg.model.normalize import Normalization
from geoseg.model.unet import UNet

WEIGHTS_NAME = "model.safetensors"
DESCRIPTION_NAME = "model.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class UNetVariant(_Frozen):
    """The network's shape: variant name and widths."""

    name: Literal["unet"] = "unet"
    depth: Annotated[int, Field(ge=1, le=8)] = 4
    width: Annotated[int, Field(ge=1, le=512)] = 64
    norm: Literal["none", "batch"] = "batch"


class ClassName(_Frozen):
    """One class of the mask: its value is its place in the list."""

    name: str
    color: tuple[int, int, int]


class BundleDescription(_Frozen):
    """What ``model.json`` says: enough to run the weights on a scene and to refuse a scene they do not fit.

    ``resolution_m`` is the size of a pixel on the ground in metres that the network was trained at; None takes any.
    ``value_range`` is the range of raw values that the training imagery could take (0 to 255 for 8-bit imagery).
    """

    format: Literal["geoseg-bundle/1"] = "geoseg-bundle/1"
    name: str
    variant: UNetVariant
    bands: tuple[str, ...]
    dtype: Literal["uint8", "uint16", "int16", "float32"] = "uint8"
    value_range: tuple[float, float] = (0.0, 255.0)
    resolution_m: Annotated[float, Field(gt=0)] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[ClassName, ...]
    origin: str

    @model_validator(mode="after")
    def _lengths_agree(self) -> BundleDescription:
        if not len(self.bands) == len(self.mean) == len(self.std):
            raise ValueError(f"bands, mean and std must be equally many, got {self.bands} {self.mean} {self.std}")
        if not 2 <= len(self.classes) <= 254:
            raise ValueError(f"a mask has 2 to 254 classes, got {len(self.classes)}")
        if self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range must rise, got {self.value_range}")
        return self

    @property
    def normalization(self) -> Normalization:
        """The function from raw bands to network input."""
        return Normalization(mean=self.mean, std=self.std)


class Bundle(_Frozen):
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

    def network(self) -> UNet:
        """The network with its weights, in evaluation mode, padding ``same``, on the CPU.

        Raises BundleError when the weights do not fit the description.
        """
        network = _empty_network(self.description)
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
    def from_network(cls, network: UNet, description: BundleDescription) -> Bundle:
        """A bundle of ``network``'s weights."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        return cls(description=description, weights=save(state))

    @classmethod
    def from_bytes(cls, description_json: bytes, weights: bytes, *, origin: str) -> Bundle:
        """Read back the two files; ``origin`` (their URI) is named in errors. Raises BundleError."""
        try:
            description = BundleDescription.model_validate_json(description_json)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or DESCRIPTION_NAME
            raise BundleError(
                f"{origin}: {DESCRIPTION_NAME} is no bundle description: {where}: {first['msg']}"
            ) from error
        bundle = cls(description=description, weights=weights)
        bundle.network()
        return bundle


def _empty_network(description: BundleDescription) -> UNet:
    variant = description.variant
    return UNet(
        len(description.bands),
        len(description.classes),
        depth=variant.depth,
        width=variant.width,
        norm=variant.norm,
    )
