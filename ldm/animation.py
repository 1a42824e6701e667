"""Pictures -> one moving picture: GIF, of 256 colours, or APNG, of all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.files import Taken, atomic_write_bytes
from ldm.image_io import finite, readable, to_pil

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"gif": ".gif", "apng": ".png"}


def save(
    images: Sequence[Tensor],
    folder: str | Path,
    kind: str,
    fps: float,
    metadata: Mapping[str, Any],
    first: int = 0,
) -> Path:
    """Write pictures (3, H, W) in [-1, 1] to `folder`/film-NNNNN, endlessly repeated; the path. `kind`: of FORMATS.

    The number is the first that is free from `first` on. Raises UserError for pictures of several sizes, and for a
    folder or disk that does not take it.
    """
    if len({tuple(image.shape) for image in images}) > 1:
        raise UserError("the pictures are of several sizes, which one film has not; give them one --width and --height")
    content, frames = io.BytesIO(), [to_pil(image) for image in images]
    how: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 1000 / fps, "loop": 0}
    if kind == "apng":
        texts = PngInfo()
        texts.add_text("parameters", readable(metadata))
        texts.add_text("ldm", json.dumps(finite(metadata), allow_nan=False))
        frames[0].save(content, "PNG", pnginfo=texts, **how)
    else:
        frames[0].save(content, "GIF", comment=readable(metadata).encode()[:65_000], **how)
    while True:
        path = Path(folder) / f"film-{first:05d}{FORMATS[kind]}"
        try:
            atomic_write_bytes(path, content.getvalue(), new=True)
            return path
        except Taken:
            first += 1
