"""Which device a model runs on and in what precision."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    import torch

GPU = r"cuda:[0-9]{1,3}"  # one of several
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # names in torch


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is cuda, else mps, else the CPU; "cuda:1" is the second GPU. Raises UserError for a device that is not
    there."""
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in here.items() if there))
    if re.fullmatch(GPU, name) and here["cuda"]:
        if int(name.removeprefix("cuda:")) >= torch.cuda.device_count():
            raise UserError(f"there is no device '{name}'; torch sees cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        return torch.device(name)
    name = "cuda" if re.fullmatch(GPU, name) else name
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
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in PRECISIONS:
        raise UserError(f"there is no precision '{name}'; choose auto or one of {', '.join(PRECISIONS)}")
    return getattr(torch, PRECISIONS[name])


def precision_name(dtype: torch.dtype) -> str:
    """The name under which `choose_precision` knows `dtype`."""
    return next(name for name, value in PRECISIONS.items() if str(dtype) == f"torch.{value}")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CPU or CUDA device; None: it is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    return None
