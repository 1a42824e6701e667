"""What a client asks for: one flat object, read into the dataclasses that the commands are made of. No torch."""

from __future__ import annotations

import binascii
import secrets
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ldm.config import from_dict
from ldm.errors import UserError, instead
from ldm.jobs import Beginning, Request, Settings, of_prompts

FILES = ("image", "mask")
TEXTS = ("prompt", "negative")
STRENGTH = 0.75  # as img2img.py has it; where a part is drawn, 1, as inpaint.py


@dataclass(frozen=True)
class Asked:
    """What to draw, and with what of that which the server was started with."""

    prompt: str = ""  # what the picture shows
    negative: str = ""  # what it should not show
    label: str | None = None  # of a model with classes
    n: int = 1  # pictures
    seed: int | None = None  # of the first picture, picture i has seed + i; None: by chance, and told
    model: str | None = None  # None: the first that the server was started with
    loras: dict[str, float] = field(default_factory=dict)  # how strongly each acts
    embeddings: tuple[str, ...] = ()  # whose words the prompt may use
    attention: bool = False  # show also where the network looks at each word


@dataclass(frozen=True)
class Job:
    """One request, checked as far as it can be without a model."""

    asked: Asked
    settings: Settings
    begin: Beginning = Beginning()
    image: bytes | None = None  # of a file: the picture to begin from
    mask: bytes | None = None  # white where to draw, black where it stays

    @property
    def requests(self) -> list[Request]:
        asked = self.asked
        return of_prompts(asked.prompt, asked.negative, asked.seed or 0, asked.n, asked.label)


PARTS = (Asked, Settings, Beginning)
FIELDS = {each.name: part for part in PARTS for each in fields(part)}


def read(plain: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> Job:
    """A job from a flat object of settings, each under the name that it has in the dataclasses.

    A seed that is not given is drawn. `files`: pictures by the names in FILES; in the object they are texts in base64.
    Raises UserError for an unknown setting, and for values that make no sense.
    """
    files = files or {}
    said: dict[type, dict[str, Any]] = {part: {} for part in PARTS}
    for name, value in plain.items():
        if name not in FIELDS:
            raise UserError(f"unknown setting '{name[:60]}'{instead(name, FIELDS) or '; /api/schema lists them'}")
        if name in TEXTS and not isinstance(value, str):
            raise UserError(f"{name} must be text, not {str(value)[:40]!r}")
        said[FIELDS[name]][name] = value
    texts = {name: said[Asked].pop(name) for name in TEXTS if name in said[Asked]}
    asked = replace(from_dict(Asked, said[Asked], "the request"), **texts)
    if asked.n < 1:
        raise UserError(f"{asked.n} pictures were asked for; choose at least 1")
    if asked.seed is None:
        asked = replace(asked, seed=secrets.randbelow(2**32))
    chosen = {name: value for name, value in said[Settings].items() if value is not None}
    settings = from_dict(Settings, {"prompt_syntax": "weighted"} | chosen, "the request").check()
    return Job(asked, settings, _beginning(said[Beginning], files), **files)


def _beginning(said: Mapping[str, Any], files: Mapping[str, bytes]) -> Beginning:
    """How the picture is taken up; raises UserError for what needs one that was not sent."""
    given = {name: value for name, value in said.items() if value is not None}
    part = "mask" in files or any(given.get("extend") or ())
    if not any(given.get("extend") or ()):
        given.pop("extend", None)
    usual = STRENGTH if "image" in files and not part else 1.0
    begin = from_dict(Beginning, {"strength": usual} | given, "the request").check()
    if "image" not in files:
        needing = [name for name in ("extend", "feather", "only_masked") if getattr(begin, name) not in (None, 0, ())]
        needing += ["mask"] if "mask" in files else []
        needing += ["strength"] if begin.strength != 1 and begin.enlarge == 1 else []
        if needing:
            raise UserError(f"{needing[0]} is of a picture to begin from, and none was sent; send one as image")
    return begin


def from_base64(text: Any, name: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a picture's file in base64; encode the bytes of a PNG, JPEG or WebP") from error
