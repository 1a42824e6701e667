"""Prompt accuracy, measured: is the picture of a prompt nearest to its own concept? See prompts.py for the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoints import native
from ldm.errors import UserError
from ldm.generate import draw
from ldm.helpers import open_helpers
from ldm.jobs import Settings, batches
from ldm.judge.classifier import Classifier
from ldm.judge.colours import UNASKED, Colours, colour_ranks
from ldm.judge.pictures import read_pictures
from ldm.judge.prompts import Judge, Score, make_prompts
from ldm.metrics import protocol
from ldm.metrics.drawing import Drawing
from ldm.metrics.sources import open_source
from ldm.metrics.tables import columns
from ldm.model import Model
from ldm.provenance import surroundings


def evaluate_prompts(
    model: Model,
    classifier: Classifier,
    settings: Settings,
    *,
    concepts: Sequence[str],
    styles: Sequence[str],
    left_out: str,
    shards: str,
    where: Mapping[str, Sequence[str]],
    pairs: str = "",
    colours: Colours | None = None,
    n: int = 2,
    seed: int = 0,
    batch_size: int = 16,
    bar: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """The result by style, and of real pictures of the style `left_out`; with it, the pictures (N, 3, H, W).

    Picture i of all has the seed `seed + i`. pairs: shards whose (concept, style) pairs are prompted alone, such as
    those that were held out. colours: prompts name one of them in turn as the background, and that is judged, by the
    border, in place of the concept, whose prototypes stand on white. Raises UserError for concepts without pictures and
    for a style that was not left out.
    """
    if left_out in classifier.config.styles:
        raise UserError(
            f"the classifier was trained on the style '{left_out}'; --left-out takes a style that it was not trained on"
        )
    where = {"name": list(concepts), **where}
    pictures, real = read_pictures(shards, where, classifier.config.size), open_source(shards, "--shards", where)
    real = real.only(real.images(0, len(real), size=1)[0])
    judge = Judge(classifier, pictures, concepts)
    shown = read_pictures(pairs, where, 1) if pairs else None
    only = None if shown is None else set(zip(shown.name, shown.style, strict=True))
    prompts = make_prompts(pictures, concepts, styles, [name for name in colours or () if name != UNASKED], only)
    asked = [prompt for prompt in prompts for _ in range(n)]
    drawing = Drawing(tuple(prompt.text for prompt in asked), settings, len(asked), seed, batch_size).check()

    parts, plan = list(batches(drawing.requests(0, len(asked)), batch_size)), drawing.plan(model)
    helpers, bar_of = open_helpers(model, plan), tqdm(parts, unit="batch", disable=not bar)
    drawn = torch.cat([draw(model, part, plan, helpers, len(part)) for part in bar_of])
    if colours:
        places = colour_ranks(drawn, [prompt.colour for prompt in asked], colours)
    else:
        places = judge.ranks(drawn, [prompt.concept for prompt in asked])

    def score(name: str, of: str) -> Score:
        return Score.of(places[torch.tensor([getattr(prompt, of) == name for prompt in asked])])

    there = dict.fromkeys(prompt.style for prompt in prompts)
    rows = {f"drawn, {style}": score(style, "style") for style in there}
    rows["drawn, all"] = Score.of(places)
    unseen = pictures.of(concepts, [left_out])
    if len(unseen) and not colours:
        rows[f"real, {left_out} (never seen)"] = Score.of(judge.ranks(unseen.image, unseen.name))
    document = protocol.result(
        {name: row.figures() for name, row in rows.items()},
        protocol.subject_of(model),
        {
            "command": "prompts",
            "prompts": [prompt.text for prompt in prompts],
            "pictures_of_each": n,
            "seeds": [seed, seed + len(asked) - 1],
            "drawing": drawing.protocol(model),
            **({"colours": {name: list(colour) for name, colour in colours.items()}} if colours else {}),
            "chance": 1 / len(colours or concepts),
            "classifier": {
                "fingerprint": native.fingerprint(classifier),
                "classes": len(classifier.config.classes),
                "styles": list(classifier.config.styles),
                "size": classifier.config.size,
            },
            "prototypes": {"concepts": len(concepts), "pictures": judge.pictures},
            "reference": real.protocol(),
        },
        sources={"reference": shards},
        concepts={
            name: {"right": found.top1, "pictures": found.count}
            for name in dict.fromkeys(prompt.concept for prompt in prompts)
            for found in [score(name, "concept")]
        },
        surroundings=surroundings(model),
    )
    return document, drawn


def prompt_table(document: Mapping[str, Any]) -> str:
    """The figures as lines, and which concepts were right or wrong each time."""
    figures, hits = document["figures"], document["concepts"]
    told = document["protocol"]
    what = f"{told['prototypes']['concepts']} concept prototypes"
    if "colours" in told:
        what = f"{len(told['colours'])} background colours"
    rows = [["", "pictures", "top-1", "95 % interval", "top-5"]]
    for name, f in figures.items():
        shares = f"{f['top1']:.1%}", f"{f['low']:.1%} - {f['high']:.1%}", f"{f['top5']:.1%}"
        rows.append([name, str(f["pictures"]), *shares])
    always = [name for name, found in hits.items() if found["right"] == found["pictures"]]
    never = [name for name, found in hits.items() if found["right"] == 0]
    return "\n".join(
        [
            f"nearest of {what} (chance {told['chance']:.1%})",
            *columns(rows),
            f"always right: {', '.join(always) or 'none'}",
            f"never right: {', '.join(never) or 'none'}",
        ]
    )
