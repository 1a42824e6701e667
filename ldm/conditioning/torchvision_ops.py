"""Lets open_clip import torchvision on machines where torchvision's compiled extension cannot load.

The torchvision wheels that plain pip resolves are built for CUDA. Beside a CPU build of torch their extension does
not load, and then the import of torchvision's Python layer fails with `operator torchvision::nms does not exist`:
it registers fake kernels for operators that only the extension declares. Declaring the two schemas is enough for that
import. Nothing here computes anything: detection operators called without the extension still raise.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the declarations live as long as this object


def declare_missing_operators() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` if torchvision's own extension cannot; call before its import.

    Does nothing where the extension loads, where the operators exist already, or where torchvision is not installed.
    """
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms") or _extension_loads():
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(name + _SCHEMA)


def _extension_loads() -> bool:
    """Load torchvision's extension the way torchvision would; True also where there is no torchvision to help."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return True
    for extension in Path(package.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return True
    return False
