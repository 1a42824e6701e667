"""Tensor -> PNG, with the settings that made the picture inside; grids of pictures.

A PNG carries two texts: "parameters", to be read by people in the usual viewers, and "ldm", the same as JSON.
"""

from __future__ import annotations

import io
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from ldm import pictures
from ldm.errors import UserError, explain_os_error
from ldm.files import Taken, atomic_write_bytes
from ldm.plain import leaves, parse_json

if TYPE_CHECKING:
    from torch import Tensor

LABELS = {"cfg": "CFG scale", "cfg_rescale": "CFG rescale", "cfg_interval": "CFG interval"}


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit RGB, rounded to nearest; values beyond are clamped.

    Raises UserError for what is no such picture, and for values that are not finite: they would come out black.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise UserError(
            f"a tensor {tuple(image.shape)} of {image.dtype} is not a picture (3, H, W) of floats in [-1, 1]; of a "
            "batch, take one"
        )
    if not bool(image.isfinite().all()):
        raise UserError("the picture has values that are not finite, so it was not converted; try --precision fp32")
    levels = image.detach().float().cpu().add(1).mul(127.5).round().clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), "RGB")


def save_png(image: Tensor, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write (3, H, W) in [-1, 1] to `path`, whole or not at all; `metadata` (plain dicts, numbers, texts) goes along.

    An infinite number in it is written as the word "inf" or "-inf", since JSON has none.
    Raises UserError for a picture that is not finite, and for a folder or disk that does not take it.
    """
    atomic_write_bytes(path, to_png(image, metadata))


def save_numbered(
    image: Tensor,
    folder: str | Path,
    metadata: Mapping[str, Any] | None = None,
    prefix: str = "",
    first: int | None = None,
) -> Path:
    """As `save_png`, to `folder`/NNNNN.png behind a prefix; the path.

    The number is the first that is free from `first` on (None: from above the highest of a picture there). Other
    processes may write into the folder too: each name is given once.
    """
    content, number = to_png(image, metadata), next_number(folder) if first is None else first
    while True:
        path = Path(folder) / f"{prefix}{number:05d}.png"
        try:
            atomic_write_bytes(path, content, new=True)
            return path
        except Taken:
            number += 1


def to_png(image: Tensor, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The bytes that `save_png` writes."""
    picture, texts, content = to_pil(image), PngInfo(), io.BytesIO()
    if metadata:
        texts.add_text("parameters", readable(metadata))
        texts.add_text("ldm", json.dumps(finite(metadata), allow_nan=False))
    picture.save(content, "PNG", pnginfo=texts)
    return content.getvalue()


def read_metadata(path: str | Path | bytes) -> dict[str, Any]:
    """The metadata that `save_png` put into `path`, or into such bytes. Raises UserError if it is no PNG or carries
    none."""
    content, path = (path, "the picture") if isinstance(path, bytes) else (pictures.contents(path), path)
    try:
        picture = pictures.opened(pictures.bare_png(content, b"ldm"), lambda picture: picture.load())
    except pictures.BadPicture as error:
        raise UserError(f"{path} is not a PNG that can be read ({error})") from error
    if not isinstance(picture, PngImageFile):
        raise UserError(f"{path} is not a PNG, and other pictures carry no settings")
    text = picture.text.get("ldm")  # some programs put it behind the picture
    if not text:
        raise UserError(f"{path} carries no settings of ours; other programs drop them when they save a picture again")
    return parse_json(text, path)


def finite(value: Any) -> Any:
    """`value` with words in the place of numbers that are not finite, in mappings and lists all the way down."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def readable(metadata: Mapping[str, Any]) -> str:
    """The prompt, the negative prompt, and "Steps: 30, Sampler: ddim, …": the form that viewers of such PNGs know.

    They take the last line apart at the commas and colons, so a value that has any stands in quotes.
    """
    lines = [str(metadata["prompt"])] if "prompt" in metadata else []
    if metadata.get("negative"):
        lines.append(f"Negative prompt: {metadata['negative']}")
    rest = {key: value for key, value in metadata.items() if key not in ("prompt", "negative")}
    if "width" in rest and "height" in rest:
        rest["size"] = f"{rest.pop('width')}x{rest.pop('height')}"
    lines.append(", ".join(f"{label}: {_quoted(value)}" for label, value in _labelled(rest)))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """The text of `value`, as a JSON string where it would not be one value, or not the same, without quotes."""
    text = str(value)
    if text.isprintable() and text == text.strip() and not any(letter in text for letter in ',:"'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _labelled(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Label and value of each entry that says something; those of a nested mapping carry its name before theirs."""
    for path, value in leaves(values):
        if value is not None and value != "" and path != "mask.png":
            name = LABELS.get(path, path.replace("_", " "))
            yield re.sub(r"[^\w /-]", " ", name[0].upper() + name[1:]), value


def grid(images: Tensor, columns: int | None = None, gap: int = 2, labels: Sequence[str] | None = None) -> Tensor:
    """(B, 3, H, W) -> one picture (3, H', W'), row by row, `gap` white pixels between; `labels` below the pictures.

    Without `columns` the sheet is about as wide as high, and full where up to twice as many columns as rows allow it.
    """
    if labels is not None:
        from ldm.labels import below

        images = below(images, labels)
    count, channels, height, width = images.shape
    side = math.ceil(math.sqrt(count))
    full = (c for c in range(side, count) if count % c == 0 and c * c <= 2 * count)
    columns = min(columns or next(full, side), count)
    rows = math.ceil(count / columns)
    sheet = images.new_ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def next_number(folder: str | Path) -> int:
    """One more than the highest number that a file "NNNNN.png" in `folder` has; 0 where there is none."""
    numbers = [int(path.stem) for path in Path(folder).glob("*.png") if path.stem.isdecimal()]
    return max(numbers, default=-1) + 1


def check_folder(folder: str | Path) -> None:
    """Make `folder` and a file in it, and remove the file; raises UserError now rather than after the work is done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # of no name: others may be preparing the same folder
            probe.write(b"\0")
    except OSError as error:
        raise explain_os_error(error, f"preparing the output folder {folder}") from error
