"""Which device a model runs on and in what precision."""

from __future__ import annotations

import torch

from ldm.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is cuda, else mps, else the CPU. Raises UserError for a device that is not there."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in here.items() if there))
    if name not in here:
        raise UserError(f"there is no device '{name}'; choose one of {', '.join(DEVICES)}")
    if not here[name]:
        raise UserError(f"torch sees no {name} device on this machine; use --device cpu, or auto")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is fp16 on a GPU and fp32 on the CPU, where half precision is emulated and can be far slower.

    fp16 rather than bf16: it resolves eight times finer, and nothing that samples comes near its range; where an
    autoencoder's activations do, the codec decodes once more in fp32. Raises UserError for an unknown name.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in PRECISIONS:
        raise UserError(f"there is no precision '{name}'; choose auto or one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def precision_name(dtype: torch.dtype) -> str:
    """The name under which `choose_precision` knows `dtype`."""
    return next(name for name, value in PRECISIONS.items() if value is dtype)
