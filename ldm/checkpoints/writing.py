"""One safetensors file written, with the operating system's own words where the disk does not take it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write `tensors`, on the CPU, to `path` (a temporary one, see `files.atomic_write`); raises OSError."""
    stored: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        stored[name] = value.clone() if value.data_ptr() in places else value  # tied weights: the format has no ties
        places.add(value.data_ptr())
    try:
        save_file(stored, path, dict(metadata))
    except SafetensorError as error:  # the library wraps the operating system's errors; unwrap what can be told
        found = re.search(r"os error (\d+)", str(error))  # "I/O error: File too large (os error 27)"
        number = int(found.group(1)) if found else 5  # EIO
        raise OSError(number, os.strerror(number)) from error
