"""The pictures that a command is given: which files, what is told of them in what is drawn, and what to call that.

No torch: a file that is not there is told at once.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import pictures
from ldm.errors import UserError, explain_os_error
from ldm.jobs.adapters import read_hash

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HEADER = 1 << 20  # bytes, within which a sound picture says its size
SMALL = 32_768  # bytes of a mask that goes into each picture


def inits(words: Iterable[str]) -> list[Path]:
    """The files that --init names, a folder's in the order of their names.

    Raises UserError for what is not there or is no picture by its header, and for a folder without any.
    """
    found: list[Path] = []
    for word in words:
        if not word.strip():
            raise UserError("--init is empty; name a picture, several, or a folder")
        path = Path(word)
        if not path.is_dir():
            found.append(path)
            continue
        try:
            inside = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())
        except OSError as error:
            raise explain_os_error(error, f"reading the folder {path}") from error
        if not inside:
            raise UserError(f"the folder {path} has no picture ({', '.join(SUFFIXES)}); name another")
        found += inside
    for path in found:
        check(path)
    return found


def check(path: str | Path) -> None:
    """Raises UserError for a file that is not there, or is no picture by its header."""
    try:
        content = pictures.contents(path)[:HEADER]
        pictures.size(content)
    except pictures.BadPicture as error:
        raise UserError(f"{path}: {error}; give a sound PNG, JPEG or WebP") from error


def names(paths: Sequence[Path], count: int) -> list[list[str]]:
    """The file names of `count` pictures that are drawn of each file: its own name, and a number if there are several.

    Of two files with one name, in other folders or of other kinds, each keeps its ending; then its number.
    """
    stems = Counter(path.stem for path in paths)
    whole = Counter(path.name for path in paths)
    bases = [
        path.stem if stems[path.stem] == 1 else path.name if whole[path.name] == 1 else f"{i:05d}-{path.name}"
        for i, path in enumerate(paths)
    ]
    if len({*bases}) < len(bases):  # a.png, a.jpg and a.png.jpg
        bases = [f"{i:05d}-{path.name}" for i, path in enumerate(paths)]
    return [[f"{base}.png" if count == 1 else f"{base}-{k}.png" for k in range(count)] for base in bases]


def animated(picture: Image.Image) -> bool:
    """Whether it is the first of several pictures in its file."""
    return getattr(picture, "n_frames", 1) > 1


def described(path: Path) -> dict[str, Any]:
    """What a drawn picture says of one that it began with: its name, not its folder, and sha256 of the file in hex."""
    return {"name": path.name, "hash": read_hash(path)}


def described_mask(path: Path, mask: Image.Image) -> dict[str, Any]:
    """The same of a mask, and the mask itself as a PNG in base64, where that is small."""
    content = io.BytesIO()
    pictures.rgb(mask).convert("L").save(content, "PNG", optimize=True)
    small = content.tell() <= SMALL
    return described(path) | ({"png": base64.b64encode(content.getvalue()).decode()} if small else {})


def mask_within(described: Mapping[str, Any], where: str | Path) -> Image.Image | None:
    """The mask that a drawn picture carries; None if it does not. Raises UserError for what is damaged."""
    if "png" not in described:
        return None
    try:
        return pictures.decode(base64.b64decode(str(described["png"]), validate=True))
    except (binascii.Error, ValueError, pictures.BadPicture) as error:
        raise UserError(f"{where}: the mask inside is damaged; give it to inpaint as --mask") from error
