"""Record -> Sample: the picture in RGB and its caption. What cannot be used raises BadSample with the reason."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ldm import pictures
from ldm.data.shards import BadSample, Members, Record, ShardReader
from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

PICTURES = ("webp", "png", "jpg", "jpeg")
CAPTIONS = ("txt", "variants", "none")
NO_CAPTION = "no caption"
SHOWN = 5  # labels, in a reason
MOST = 1e4  # of a score
HEAD = 2**16  # bytes in which a PNG's or JPEG's size is found, unless it has a large thumbnail before it


@dataclass(frozen=True)
class Sample:
    """A captioned picture; `meta` is the sample's json, empty where it has none."""

    picture: Image.Image  # mode RGB
    caption: str
    key: str
    meta: dict[str, Any]


def fault(members: Members) -> str | None:
    """Why a sample with these members cannot be used, as far as their names and sizes tell; None if they do not."""
    if (reason := fault_of_picture(members)) is not None:
        return reason
    if "json" not in members and not members.get("txt", (0, 0))[1]:
        return NO_CAPTION
    return None


def fault_of_picture(members: Members) -> str | None:
    """As `fault`, where captions are not needed."""
    return None if any(members.get(name, (0, 0))[1] for name in PICTURES) else "no picture"


def fault_of(caption: str) -> Callable[[Members], str | None]:
    """What `fault` is to be for captions that are chosen so."""
    return fault_of_picture if caption == "none" else fault


def decode(record: Record, caption: str, rng: random.Random) -> Sample:
    """Decode the picture and choose the caption.

    `caption` is "txt" (the .txt, else the json's `caption`, else the first of its `captions`) or "variants" (one of
    the json's `captions`, drawn with `rng`; a sample without any falls back to "txt"), or "none", the empty one. Raises
    BadSample.
    """
    meta = read_meta(record)
    text = choose_caption(record, meta, caption, rng)
    content = next((record.fields[name] for name in PICTURES if record.fields.get(name)), None)
    if content is None:
        raise BadSample("no picture")
    return Sample(decode_picture(content), text, record.key, meta)


def decode_picture(content: bytes) -> Image.Image:
    """Bytes of a webp, png or jpeg -> RGB picture, as pictures.py says. Raises BadSample."""
    try:
        return pictures.rgb(pictures.decode(content))
    except pictures.BadPicture as error:
        raise BadSample(str(error)) from error


def decode_depth(record: Record, member: str) -> Image.Image | None:
    """The grey picture in a sample's `member`, its depth map in 8 bits; None where none is named. Raises BadSample."""
    if not member:
        return None
    if not record.fields.get(member):
        raise BadSample(f"no depth map: it has no member .{member}")
    try:
        return pictures.rgb(pictures.decode(record.fields[member])).convert("L")
    except pictures.BadPicture as error:
        raise BadSample(f"the depth map: {error}") from error


def picture_size(reader: ShardReader, shard: int, number: int) -> tuple[int, int]:
    """Height and width of a sample's picture, upright, from its header. Raises BadSample.

    Of a webp the whole is read, since its orientation stands at the end; of others the first 64 KiB as a rule.
    """
    members = reader.places(shard, number)
    name = next(name for name in PICTURES if members.get(name, (0, 0))[1])
    whole = members[name][1]
    for size in (whole,) if name == "webp" else (HEAD, whole):
        try:
            return pictures.size(reader.head(shard, number, name, size))
        except pictures.BadPicture as error:
            if size == whole:
                raise BadSample(str(error)) from error
    raise AssertionError("the last size is the whole")


def choose_caption(record: Record, meta: dict[str, Any], caption: str, rng: random.Random) -> str:
    """One caption of the sample, stripped and not empty; `caption` as in `decode`. Raises BadSample."""
    draw = rng.random()  # drawn whatever the mode, so that the picture's own draws do not depend on it
    if caption == "none":
        return ""
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
        raise BadSample(NO_CAPTION)
    if not text:
        raise BadSample("the caption is empty")
    if not _is_text(text):
        raise BadSample("the caption is not UTF-8")
    return text


def label(meta: dict[str, Any], field: str, known: Collection[str] = ()) -> str | None:
    """What the sample's json says in `field`, as text; None for an empty `field`.

    `known`: the labels that the network knows; empty: any. Raises BadSample for others, and where there is none.
    """
    if not field:
        return None
    value = meta.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadSample(f"no label: its json has no text or whole number in '{field}'")
    if known and str(value) not in known:
        some = ", ".join(islice(known, SHOWN)) + (", ..." if len(known) > SHOWN else "")
        raise BadSample(f"its {field} is {str(value)[:60]!r}, and the network's labels are {some}")
    return str(value)


def score(meta: dict[str, Any], field: str) -> float | None:
    """The number that the sample's json has in `field`; None for an empty `field`. Raises BadSample for none."""
    if not field:
        return None
    value = meta.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
        raise BadSample(f"no score: its json has no number of at most {MOST:g} in '{field}'")
    return float(value)


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


def read_meta(record: Record) -> dict[str, Any]:
    """The sample's json, {} where it has none. Raises BadSample for anything but an object."""
    if "json" not in record.fields:
        return {}
    try:
        meta = json.loads(record.fields["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample("the json does not parse") from error
    if not isinstance(meta, dict):
        raise BadSample("the json is not an object")
    return meta
