"""In which numbers a network computes: float32 anywhere, bfloat16 where the device has arithmetic for it.

bfloat16 keeps float32's range and 8 of its 24 bits; products are summed up in float32 (Kalamkar et al. 2019,
arXiv:1905.12322).
"""

from __future__ import annotations

from typing import Literal

import torch

from geoseg.errors import ConfigError

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def natural_precision(device: torch.device) -> Precision:
    """The less exact, faster one where the device computes in it, ``float32`` on any other device."""
    return "bfloat16" if _computes_bfloat16(device) else "float32"


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise ConfigError when a device cannot compute so, or only by pretending to."""
    if precision == "bfloat16" and not _computes_bfloat16(device):
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
        raise ConfigError(f"precision bfloat16: {what} does not compute in it; leave the setting out, or take float32")


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # noqa: SLF001 (torch has no other name)
