"""Bytes, a file, or a picture of Pillow's -> RGB in 8 bits: the one way in for whatever is read as a picture.

Upright by its EXIF orientation, alpha composited on white, 16 bits scaled, palettes and CMYK converted; within bounded
memory, whatever the file says or carries. No torch in here; inputs.py makes tensors of it.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageOps

from ldm.errors import UserError, explain_os_error

FORMATS = ("WEBP", "PNG", "JPEG")
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MiB of RGB
MAX_BYTES = 2**30  # of a file; so many pixels in 16 bits of red, green, blue and alpha are 683 MiB
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 swap width and height

# Pillow has no one exception for damage: these are the ones its three decoders and EXIF parser raise.
_DAMAGE = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, EOFError, struct.error)
_PNG = b"\x89PNG\r\n\x1a\n"
_BESIDE = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"fcTL", b"fdAT")  # texts, colour profile, animation
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # modes whose colours are multiplied by alpha, and those where they are not


class BadPicture(Exception):
    """A picture that cannot be used; the message says why, as "the picture ..."."""


def read(given: Image.Image | str | os.PathLike[str]) -> Image.Image:
    """A picture's file (PNG, JPEG, WebP), or a picture that is open -> upright, in 8 bits, alpha kept. UserError."""
    try:
        return upright(given) if isinstance(given, Image.Image) else decode(contents(given))
    except BadPicture as error:
        where = "" if isinstance(given, Image.Image) else f"{given}: "
        raise UserError(f"{where}{error}; give a sound PNG, JPEG or WebP") from error


def contents(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a picture's file. Raises UserError if there is none, or it is larger than a picture can be."""
    path = Path(path)
    try:
        if not path.exists():
            raise UserError(f"there is no picture {path}; check the path")
        if path.stat().st_size > MAX_BYTES or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no file of at most {MAX_BYTES >> 20} MiB, so it is not read as a picture")
        return path.read_bytes()
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    except ValueError as error:  # a null byte in the path
        raise UserError(f"there is no picture {path}; check the path") from error


def decode(content: bytes) -> Image.Image:
    """Bytes of a PNG, JPEG or WebP -> upright picture in 8 bits, its alpha kept. Raises BadPicture."""

    def turn(picture: Image.Image) -> None:
        picture.load()
        with suppress(*_DAMAGE):  # damaged EXIF turns nothing
            ImageOps.exif_transpose(picture, in_place=True)

    return _eight_bits(opened(content, turn))


def size(content: bytes) -> tuple[int, int]:
    """Height and width of the upright picture, by its header; `content` may end behind it. Raises BadPicture."""
    picture = opened(content, _turned)
    width, height = picture.size
    if min(width, height) < 1:
        raise BadPicture("the picture does not decode")
    return (width, height) if _turned(picture) else (height, width)


def upright(picture: Image.Image) -> Image.Image:
    """A picture of any mode, left as it is -> the same turned as its EXIF says, in 8 bits. Raises BadPicture."""
    with _refused():
        _check_size(picture)
        picture.load()
        with suppress(*_DAMAGE):
            picture = ImageOps.exif_transpose(picture)
        return _eight_bits(picture)


def rgb(picture: Image.Image) -> Image.Image:
    """An upright picture in 8 bits -> RGB, alpha composited on white."""
    if picture.mode in _STRAIGHT:
        picture = picture.convert(_STRAIGHT[picture.mode])
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def opened(content: bytes, use: Callable[[Image.Image], object]) -> Image.Image:
    """The picture in `content` when `use` of it went well; a PNG is tried once more without what is beside its picture.

    Texts and profiles may unpack to any size, so Pillow refuses large ones. Raises BadPicture.
    """
    with _refused():
        try:
            return _open(content, use)
        except _DAMAGE:
            bare = bare_png(content)
            if len(bare) == len(content):
                raise
        return _open(bare, use)


def bare_png(content: bytes, keyword: bytes = b"") -> bytes:
    """A PNG without what its picture does not need: texts (but those of `keyword`), colour profile, animation.

    What is damaged is left to the decoder, and so is what is no PNG.
    """
    if not content.startswith(_PNG):
        return content
    view, bare, at = memoryview(content), bytearray(content[:8]), 8
    while at + 8 <= len(content):
        name, body = content[at + 4 : at + 8], at + 8
        end = body + int.from_bytes(content[at : at + 4], "big") + 4
        if name not in _BESIDE or (keyword and content.startswith(keyword + b"\0", body)):
            bare += view[at:end]
        at = end
    return bytes(bare)


def _open(content: bytes, use: Callable[[Image.Image], object]) -> Image.Image:
    picture = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_size(picture)
    use(picture)
    return picture


def _turned(picture: Image.Image) -> bool:
    """Whether EXIF swaps width and height."""
    try:
        return picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except _DAMAGE:
        picture.load()  # raises where the content ends too early; if it does not, the EXIF is damaged
        return False


def _check_size(picture: Image.Image) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise BadPicture(f"the picture has more than {MAX_PIXELS} pixels")


@contextmanager
def _refused() -> Iterator[None]:
    """Turns what Pillow raises into BadPicture. Its warnings are kept back: what matters of them is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise BadPicture(f"the picture has more than {MAX_PIXELS} pixels") from error
    except _DAMAGE as error:
        raise BadPicture("the picture does not decode") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The same where it has no more; 16 bits of grey are scaled, which Pillow would clip at 255."""
    if picture.mode == "F":
        raise BadPicture("the picture has floating-point pixels, whose range is unknown; convert it to 8 bits")
    if not picture.mode.startswith("I"):
        return picture
    import numpy as np

    levels = np.asarray(picture)
    if levels.min() < 0 or levels.max() >= 2**16:
        raise BadPicture(f"the picture has pixels from {levels.min()} to {levels.max()}; convert it to 8 bits")
    levels = levels.astype(np.uint32)
    levels *= 255
    levels += 2**15 - 1  # so that the division rounds to nearest
    levels //= 2**16 - 1
    return Image.fromarray(levels.astype(np.uint8))
