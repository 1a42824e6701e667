"""Which adapters a picture was drawn with. No torch in here, so that a mistake is told at once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError, explain_os_error
from ldm.find import SHIPPED_LORAS, find_lora
from ldm.jobs.values import real

KINDS = ("lora", "embedding")


@dataclass(frozen=True)
class Adapter:
    """A file that changes a model: a LoRA with its scale, or the words of a textual inversion."""

    kind: str  # a name in KINDS
    path: str  # or a shipped LoRA's name
    scale: float = 1.0
    hash: str = ""  # sha256 of the file, in hex; empty until it has been read

    @property
    def file(self) -> str:
        return find_lora(self.path) if self.kind == "lora" else self.path


def parse_lora(word: str) -> Adapter:
    """ "FILE" or "FILE:SCALE" as a LoRA, or a name of one that ships for FILE.

    Raises UserError if there is no such file or the scale is not finite."""
    path, colon, tail = word.rpartition(":")
    try:
        scale = float(tail) if colon else 1.0
    except ValueError:
        path, scale = word, 1.0  # the colon is the path's own
    if not colon:
        path = word
    if not math.isfinite(scale):
        raise UserError(f"the scale of the LoRA {path} is {tail}; choose a finite number, such as 0.8")
    return _there(Adapter("lora", path, scale))


def parse_embedding(path: str) -> Adapter:
    """A file of textual inversion; raises UserError if there is none."""
    return _there(Adapter("embedding", path))


def path_of(lora: str | Path) -> str:
    """A LoRA as it is named in an Adapter: a Path is a file's, whatever ships under that name."""
    return f"./{lora}" if isinstance(lora, Path) and str(lora) in SHIPPED_LORAS else str(lora)


def read_hash(path: str | Path) -> str:
    """sha256 of a file, in hex; raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error


def from_record(plain: Any) -> tuple[Adapter, ...]:
    """The inverse of `asdict` for each; raises TypeError, KeyError or UserError for anything else."""
    if not isinstance(plain, Sequence) or not all(isinstance(item, Mapping) for item in plain):
        raise TypeError("adapters")
    found = []
    for item in plain:
        adapter = Adapter(
            str(item["kind"]), str(item["path"]), float(real(item["scale"], "the scale")), str(item["hash"])
        )
        if adapter.kind not in KINDS or not math.isfinite(adapter.scale):
            raise TypeError(f"an adapter of the kind {adapter.kind[:40]!r}")
        found.append(adapter)
    return tuple(found)


def differences(then: Sequence[Adapter], now: Sequence[Adapter]) -> list[str]:
    """A sentence for each adapter whose file is not the one that the picture was made with."""
    return [
        f"the {a.kind} {b.path} is not the file that the picture was made with"
        for a, b in zip(then, now, strict=True)
        if a.hash != b.hash
    ]


def _there(adapter: Adapter) -> Adapter:
    if not Path(adapter.file).is_file():
        names = ", ".join(SHIPPED_LORAS)
        raise UserError(
            f"there is no file '{adapter.path}'; name a LoRA as FILE or FILE:SCALE, or one that ships ({names}), an "
            "embedding as FILE"
        )
    return adapter
