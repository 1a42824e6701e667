"""Record -> Sample: the picture in RGB and its caption. What cannot be used raises BadSample with the reason."""

from __future__ import annotations

import io
import json
import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ldm.data.shards import BadSample, Members, Record, ShardReader
from ldm.errors import UserError

PICTURES = ("webp", "png", "jpg", "jpeg")
CAPTIONS = ("txt", "variants")
FORMATS = ("WEBP", "PNG", "JPEG")
HEAD = 2**16  # bytes in which a PNG's or JPEG's size is found, unless it has a large thumbnail before it
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 swap width and height
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MiB of RGB

# Pillow has no one exception for damage: these are the ones its three decoders and EXIF parser raise.
_DAMAGE = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError)


@dataclass(frozen=True)
class Sample:
    """A captioned picture; `meta` is the sample's json, empty where it has none."""

    picture: Image.Image  # mode RGB
    caption: str
    key: str
    meta: dict[str, Any]


def fault(members: Members) -> str | None:
    """Why a sample with these members cannot be used, as far as their names and sizes tell; None if they do not."""
    if not any(members.get(name, (0, 0))[1] for name in PICTURES):
        return "no picture"
    if "json" not in members and not members.get("txt", (0, 0))[1]:
        return "no caption"
    return None


def decode(record: Record, caption: str, rng: random.Random) -> Sample:
    """Decode the picture and choose the caption.

    `caption` is "txt" (the .txt, else the json's `caption`, else the first of its `captions`) or "variants" (one of
    the json's `captions`, drawn with `rng`; a sample without any falls back to "txt"). Raises BadSample.
    """
    meta = _meta(record)
    text = choose_caption(record, meta, caption, rng)
    content = next(record.fields[name] for name in PICTURES if record.fields.get(name))
    return Sample(decode_picture(content), text, record.key, meta)


def decode_picture(content: bytes) -> Image.Image:
    """Bytes of a webp, png or jpeg -> RGB picture: EXIF orientation applied, alpha composited on white.

    Raises BadSample when it does not decode or is a decompression bomb.
    """
    picture = open_picture(content)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def picture_size(reader: ShardReader, shard: int, number: int) -> tuple[int, int]:
    """Height and width of a sample's picture, upright, from its header. Raises BadSample.

    Of a webp the whole is read, since its orientation stands at the end; of others the first 64 KiB as a rule.
    """
    members = reader.places(shard, number)
    name = next(name for name in PICTURES if members.get(name, (0, 0))[1])
    for size in (members[name][1],) if name == "webp" else (HEAD, members[name][1]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(reader.head(shard, number, name, size)), formats=FORMATS) as picture:
                    width, height = picture.size
                    turned = picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        except Image.DecompressionBombError as error:
            raise BadSample(f"the picture has more than {MAX_PIXELS} pixels") from error
        except _DAMAGE:
            continue
        if min(width, height) < 1:
            continue
        return (width, height) if turned else (height, width)
    raise BadSample("the picture does not decode")


def open_picture(content: bytes) -> Image.Image:
    """Bytes -> upright picture in 8 bits, its alpha kept. Raises BadSample like `decode_picture`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs, odd EXIF and palettes; what matters we refuse
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise BadSample(f"the picture has more than {MAX_PIXELS} pixels")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
    except Image.DecompressionBombError as error:
        raise BadSample(f"the picture has more than {MAX_PIXELS} pixels") from error
    except _DAMAGE as error:
        raise BadSample("the picture does not decode") from error
    if picture.mode.startswith("I"):  # 16 bits: Pillow would clip them at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
    return picture


def choose_caption(record: Record, meta: dict[str, Any], caption: str, rng: random.Random) -> str:
    """One caption of the sample, stripped and never empty; `caption` as in `decode`. Raises BadSample."""
    draw = rng.random()  # drawn whatever the mode, so that the picture's own draws do not depend on it
    variants = caption_variants(meta)
    if caption == "variants" and variants:
        return variants[int(draw * len(variants))]
    if "txt" in record.fields:
        try:
            text = record.fields["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadSample("the caption is not UTF-8") from error
    elif isinstance(meta.get("caption"), str):
        text = meta["caption"].strip()
    elif variants:
        text = variants[0]
    else:
        raise BadSample("no caption")
    if not text:
        raise BadSample("the caption is empty")
    if not _is_text(text):
        raise BadSample("the caption is not UTF-8")
    return text


def caption_variants(meta: dict[str, Any]) -> list[str]:
    """The json's `captions`, stripped, without empty ones and those that no UTF-8 holds; [] where there are none."""
    given = meta.get("captions")
    texts = [text.strip() for text in given if isinstance(text, str)] if isinstance(given, list) else []
    return [text for text in texts if text and _is_text(text)]


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON may spell half of a letter ("\\ud800")."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_caption(caption: str) -> None:
    """Raises UserError for an unknown rule of choosing captions."""
    if caption not in CAPTIONS:
        raise UserError(f"data.caption is '{caption}'; it must be one of {', '.join(CAPTIONS)}")


def _meta(record: Record) -> dict[str, Any]:
    if "json" not in record.fields:
        return {}
    try:
        meta = json.loads(record.fields["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample("the json does not parse") from error
    if not isinstance(meta, dict):
        raise BadSample("the json is not an object")
    return meta
