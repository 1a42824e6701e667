"""The one place that opens weight files, whoever wrote them. Nothing in a file is executed, and its sizes are not
believed: what is read costs memory and time in proportion to the file, and ends in tensors or in a UserError.

    .safetensors                    a JSON header, checked here; numbers mapped into memory
    .ckpt .pt .pth .bin (torch)     archive.py: the pickle is read as data, numbers mapped into memory

Which of the two a file is, its first bytes say, not its name.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.archive import MAX_SIDES, BadArchive, read_stream, read_zip
from ldm.checkpoints.places import Contents, MappedFile, Place
from ldm.errors import UserError, explain_os_error
from ldm.plain import DuplicateKey, once

MAX_HEADER = 16 << 20  # bytes; Stable Diffusion's has 0.1 million, a LoRA with its training's captions one
_PIECE = 1 << 15  # numbers looked at together: so few that no threads are woken for them, nor the heap torn

# safetensors' names of types
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file by name, in the file's order; each is read when it is asked for, and stays mapped.

    A tensor is a view of the file as it is stored: of its type, on the CPU, held once. Asking for one raises UserError
    if it has a number that is not finite: such a model draws nothing but noise or black, and tells it late.
    """

    def __init__(self, path: Path, contents: Contents, size: int):
        self.path, self.metadata = path, contents.metadata
        self._places = contents.places
        self._file = MappedFile(path, size, contents.places.values())
        self._finite: set[str] = set()  # those that have been looked at

    def __getitem__(self, name: str) -> Tensor:
        value = self._file.tensor(self._places[name])
        if name not in self._finite and not all_finite(value):
            raise UserError(
                f"the tensor {name[:200]} in {self.path} is not finite (it holds NaN or infinity), so the weights are "
                "spoilt; take another copy or an earlier checkpoint"
            )
        self._finite.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._places

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor, without reading it."""
        place = self._places[name]
        return place.dtype, place.shape


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a weight file, by name. A torch file's names are the dotted paths through its containers
    ("string_to_param.*"); of one with an outer `state_dict` it is that alone.

    Raises UserError, in one sentence, for whatever is missing, no weight file, torn, hostile or of a type unknown here.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=_open_file) as file:
            size = os.fstat(file.fileno()).st_size
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is not a file; name a file of weights")
            head = file.read(16)
            if head[:4] == b"PK\x03\x04":
                contents = read_zip(file, size)
            elif head[:1] == b"\x80" and head[8:9] != b"{":  # a safetensors header may be 128 + 256 k bytes long
                contents = read_stream(file, size)
            else:
                contents = _safetensors(path, file, head, size)
        if not contents.places:
            raise UserError(f"{path} holds no tensors, so it is no weight file; nothing in it was run")
    except BadArchive as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    return Tensors(path, contents, size)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The words that a weight file carries: safetensors' metadata, or the top-level words and numbers of a torch file
    ("global_step", "name"). Raises UserError as `read_tensors` does.
    """
    return read_tensors(path).metadata


def all_finite(value: Tensor) -> bool:
    """Whether no number of `value` is NaN or infinite, in memory of a few MB."""
    if not value.is_floating_point():
        return True
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    # A sum is as good as a look at each, and faster; if it overflows by itself, each is looked at.
    for piece in value.reshape(-1).split(_PIECE):
        piece = piece.to(wide)
        if not piece.sum().isfinite() and not piece.isfinite().all():
            return False
    return True


def _open_file(path: str, flags: int) -> int:
    """Without waiting for the other end, if it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _safetensors(path: Path, file: Any, head: bytes, size: int) -> Contents:
    """The header of a safetensors file: 8 bytes of length, JSON, then the numbers without a gap."""
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if head.startswith(b"version https://"):
        raise UserError(f"{path} is a git-lfs pointer and not the file it stands for; fetch it with git lfs pull")
    if not head:
        raise UserError(f"{path} is empty, so it is truncated or damaged; copy it again")
    if head[8:9] != b"{":
        raise UserError(f"{path} is truncated or damaged, or no weight file: it is neither safetensors nor torch's")
    if length > size - 8:
        raise UserError(
            f"{path} is truncated or damaged (its header says it is {length:,} bytes long and the file has {size:,}); "
            "copy it again"
        )
    if length > MAX_HEADER:
        raise UserError(f"{path} has a header of {length:,} bytes, which no model needs; it was not read")
    file.seek(8)
    try:
        header = json.loads(file.read(length), object_pairs_hook=once)
        metadata = _words(header.pop("__metadata__", None))
    except DuplicateKey as error:
        raise UserError(f"{path} is damaged ({error} in its header); copy it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is truncated or damaged (its header is no JSON); copy it again") from error
    places: dict[str, Place] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        places[name] = place = _place(path, name, entry, 8 + length)
        if place.start != 8 + length + end:  # each byte belongs to one tensor, so no file names more than it has
            raise UserError(f"{path} is truncated or damaged (a gap or an overlap before {name[:100]}); copy it again")
        end += place.count
    if 8 + length + end != size:
        raise UserError(
            f"{path} is truncated or damaged (it has {size:,} bytes and its tensors need {8 + length + end:,}); "
            "copy it again"
        )
    return Contents(places, metadata)


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First byte and end, among the numbers, of a tensor in a safetensors header."""
    found = _whole(entry.get("data_offsets") if isinstance(entry, dict) else None)
    if len(found) != 2 or found[0] > found[1]:
        reason = f"its header does not say where {name[:100]} lies"
        raise UserError(f"{path} is truncated or damaged ({reason}); copy it again")
    return found[0], found[1]


def _place(path: Path, name: str, entry: dict[str, Any], first: int) -> Place:
    """Where the tensor of a header's `entry` lies in a file whose numbers begin at byte `first`."""
    begin, end = _offsets(path, name, entry)
    dtype, shape = entry.get("dtype"), _whole(entry.get("shape"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path} holds {name[:200]} as {str(dtype)[:40]}, a type of number that is not read here")
    possible = entry.get("shape") == list(shape) and math.prod(max(side, 1) for side in shape) < 1 << 60
    if not possible or math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        reason = f"the shape and size of {name[:100]} do not agree"
        raise UserError(f"{path} is truncated or damaged ({reason}); copy it again")
    return Place(first + begin, end - begin, DTYPES[dtype], shape)


def _whole(value: Any) -> tuple[int, ...]:
    """A list of a few whole numbers from 0 on; () for anything else."""
    few = isinstance(value, list) and len(value) <= MAX_SIDES
    return tuple(value) if few and all(type(item) is int and 0 <= item < 1 << 60 for item in value) else ()


def _words(metadata: Any) -> dict[str, str]:
    """The metadata as text. The format allows nothing else; what writers put there beside it is kept as its JSON."""
    if metadata is None:
        return {}
    found = metadata if isinstance(metadata, dict) else {"__metadata__": metadata}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
