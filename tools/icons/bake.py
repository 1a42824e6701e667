"""Masters -> baked RGB samples: each sprite plain on white (silhouettes tinted), object sprites also on coloured
backgrounds and in pairs, as compose.py draws them.

What is drawn for a sample depends on that sample alone: its generator is seeded with the sprite's source and id, the
kind and the number of the draw. In training shards some combinations never occur, so that they can be asked for in
tests: 4 % of (object, background colour) and of (object, relation, object), by a hash of the concepts.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from .captions import with_article
from .compose import BACKGROUNDS, RELATIONS, Composition, Sprite, a, on_background, pair, plain, tint
from .filters import concept
from .masters import Master
from .rasterise import lossless_webp

Fields = dict[str, bytes]

_HELD_OUT = 40  # of 1000 combinations
_TRIES = 20  # draws of a partner before a pair is given up


@dataclass(frozen=True)
class Job:
    """One baked sample: a sprite, what to do with it, which draw of it this is, and the pair's second sprite."""

    master: Master
    kind: str  # plain, tint, background, pair
    draw: int = 0
    partner: Master | None = None

    @property
    def seed(self) -> str:
        return f"{self.master.source}/{self.master.id}/{self.kind}/{self.draw}"


def plan(masters: Sequence[Master], draws: int) -> list[Job]:
    """The samples of one split, mixed: each sprite once, object sprites `draws` times on a background and in a pair.

    Silhouettes are tinted `draws` times and never drawn plain. Partners come from the same split and style.
    """
    shelves: dict[str, list[Master]] = {}
    for one in masters:
        if one.object and not one.mono:
            shelves.setdefault(one.style, []).append(one)
    jobs: list[Job] = []
    for one in masters:
        if not one.mono:
            jobs.append(Job(one, "plain"))
        for draw in range(draws):
            if one.mono:
                jobs.append(Job(one, "tint", draw))
            elif one.object:
                jobs.append(Job(one, "background", draw))
                partner = _partner(one, draw, shelves[one.style])
                if partner is not None:
                    jobs.append(Job(one, "pair", draw, partner))
    return sorted(jobs, key=lambda job: hashlib.md5(job.seed.encode()).digest())


def bake(job: Job) -> Fields | None:
    """The members of one sample (webp, txt, json); None if no background suits the object."""
    composition = compose(job)
    if composition is None:
        return None
    return sample(composition, job.master)


def compose(job: Job) -> Composition | None:
    """The picture and its caption."""
    one, rng = job.master, random.Random(job.seed)
    training = one.split == "train"
    if job.kind == "plain":
        return plain(_sprite(one))
    if job.kind == "tint":
        return tint(_sprite(one), rng)
    if job.kind == "background":
        return on_background(_sprite(one), rng, [c for c in BACKGROUNDS if not (training and held_out(one.name, c))])
    assert job.partner is not None
    allowed = [r for r in RELATIONS if not (training and held_out(one.name, r, job.partner.name))]
    return pair(_sprite(one), _sprite(job.partner), rng, allowed)


def sample(composition: Composition, one: Master) -> Fields:
    """A composition as a sample: lossless webp, its caption, and the sprite's json with what was drawn.

    The json's captions fit the picture: those of the sprite for a plain one, paraphrases for the others.
    """
    said = (
        list(one.captions) if composition.settings["kind"] == "plain" else _paraphrases(composition.caption, one.style)
    )
    meta = {**one.meta(), **composition.settings, "captions": said}
    return {"webp": lossless_webp(composition.picture), "txt": said[0].encode(), "json": _json(meta)}


def master_sample(one: Master) -> Fields:
    """The members of a master's sample."""
    return {"webp": one.webp, "txt": one.captions[0].encode(), "json": _json(one.meta())}


def held_out(*parts: str) -> bool:
    """Whether a combination is kept for tests; sprites count by their concept, so by all their styles alike."""
    text = "/".join(concept(part) for part in parts)
    return int(hashlib.md5(f"h{text}".encode()).hexdigest()[:8], 16) % 1000 < _HELD_OUT


def held_out_prompts(masters: Iterable[Master], count: int) -> list[str]:
    """Up to `count` captions that no training sample has: objects of training on backgrounds and in pairs held out."""
    things = {(one.style, one.name): one for one in masters if one.object and one.split == "train"}
    prompts = {
        f"{with_article(one.name)} on {a(colour)} background, {one.style}"
        for one in things.values()
        for colour in BACKGROUNDS
        if held_out(one.name, colour)
    }
    for one in things.values():
        rng = random.Random(f"{one.style}/{one.name}")
        other = rng.choice(sorted({name for style, name in things if style == one.style}))
        relation = rng.choice(list(RELATIONS))
        if concept(other) != concept(one.name) and held_out(one.name, relation, other):
            prompts.add(f"{with_article(one.name)} {relation} {with_article(other)}, {one.style}")
    return sorted(sorted(prompts, key=lambda prompt: hashlib.md5(prompt.encode()).digest())[:count])


def _partner(one: Master, draw: int, shelf: Sequence[Master]) -> Master | None:
    """Another thing of the same style, whatever the relation will be."""
    rng = random.Random(f"{one.source}/{one.id}/partner/{draw}")
    for _ in range(_TRIES):
        other = shelf[int(rng.random() * len(shelf))]
        relations = [r for r in RELATIONS if not (one.split == "train" and held_out(one.name, r, other.name))]
        if concept(other.name) != concept(one.name) and relations:
            return other
    return None


def _sprite(one: Master) -> Sprite:
    picture = Image.open(io.BytesIO(one.webp)).convert("RGBA")
    return Sprite(picture, one.name, with_article(one.name), one.style)


def _paraphrases(caption: str, style: str) -> list[str]:
    scene = caption.removesuffix(f", {style}")
    return [caption] if scene == caption else [caption, f"{style} of {scene}", scene]


def _json(meta: dict[str, object]) -> bytes:
    return json.dumps(meta, ensure_ascii=False).encode()
