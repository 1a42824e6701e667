"""The figures of a set of pictures: which there are, what each is called, and what it takes to be told.

A figure's name carries its space, and names that a reader knows from elsewhere are kept for what they mean there:
FID, KID and IS in the Inception space only, FD and KD (Frechet and kernel distance) in every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.errors import UserError
from ldm.metrics.distances import (
    CMMD_SIGMA,
    KERNEL_SEED,
    SCORE_SEED,
    check_neighbours,
    check_splits,
    check_subset,
    clip_score,
    cmmd,
    density_coverage,
    frechet_of,
    inception_score,
    kernel,
    precision_recall,
    retrieval,
)
from ldm.metrics.extraction import Features
from ldm.metrics.features import FeatureSpace
from ldm.metrics.sources import Source

KINDS = ("frechet", "kernel", "neighbours", "score", "captions")
HELD_OUT = " held-out"  # behind the names of figures against the held-out pictures


@dataclass(frozen=True)
class Measures:
    """Which figures, and the numbers in their definitions."""

    kinds: tuple[str, ...] = KINDS
    subset: int = 1000  # pictures in each of KID's random subsets
    subsets: int = 100
    neighbours: int = 3  # of precision and recall
    ball: int = 5  # neighbours of density and coverage
    splits: int = 10  # of the Inception Score
    allow_few: bool = False  # a Frechet distance of no more pictures than dimensions

    def check(self) -> Measures:
        """The same; raises UserError for invalid numbers and unknown kinds."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"unknown kind of figures '{kind}'; choose from {', '.join(KINDS)}")
        for name in ("subset", "subsets", "neighbours", "ball", "splits"):
            if getattr(self, name) < (2 if name == "subset" else 1):
                raise UserError(f"--{name} is {getattr(self, name)}; choose a larger number")
        return self

    def protocol(self, spaces: Sequence[FeatureSpace]) -> dict[str, Any]:
        """The kinds, and the numbers that their figures in these spaces depend on."""
        sigma = {"cmmd_sigma": CMMD_SIGMA} if any(space.text for space in spaces) else {}
        score = {"splits": self.splits, "score_seed": SCORE_SEED} if any(space.logits for space in spaces) else {}
        numbers = {
            "kernel": {"subset": self.subset, "subsets": self.subsets, "kernel_seed": KERNEL_SEED, **sigma},
            "neighbours": {"neighbours": self.neighbours, "ball": self.ball},
            "score": score,
        }
        kinds = [kind for kind in KINDS if kind in self.kinds]
        return {"kinds": kinds} | {name: value for kind in kinds for name, value in numbers.get(kind, {}).items()}

    def check_spaces(self, spaces: Sequence[FeatureSpace], captioned: bool) -> None:
        """Raises UserError if what was asked for by name, or all of it, has no figure in any of the spaces."""
        joint, logits = any(space.text for space in spaces), any(space.logits for space in spaces)
        lacks = {
            "score": "" if logits else "the Inception Score needs a space with class logits, as inception=FILE",
            "captions": "" if joint else "captions need a space that they share with pictures, as clip=FOLDER",
        }
        if joint and not captioned:
            lacks["captions"] = "captions were asked about, and there are pictures without one"
        missing = [lacks[kind] for kind in self.kinds if lacks.get(kind)]
        if missing and (set(self.kinds) != set(KINDS) or len(missing) == len(self.kinds)):
            raise UserError(f"{missing[0]}; leave that out of --figures")

    def check_counts(self, space: FeatureSpace, drawn: int, real: int, held_out: bool = False) -> None:
        """Raises UserError for figures that are undefined, or say nothing, for so few pictures."""
        if "frechet" in self.kinds and not held_out and min(drawn, real) <= space.width and not self.allow_few:
            raise UserError(
                f"{frechet_name(space)} fits covariances of {space.width} dimensions to {drawn} and {real} pictures, "
                "so the result depends more on their number than on the model; give more, leave frechet out of "
                "--figures, or insist with --allow-few"
            )
        if "kernel" in self.kinds:
            check_subset(drawn, real, self.subset)
        if "neighbours" in self.kinds:
            check_neighbours(drawn, real, max(self.neighbours, self.ball))
        if "score" in self.kinds and space.logits:
            check_splits(drawn, self.splits)


def frechet_name(space: FeatureSpace) -> str:
    return f"{'FID' if official(space) else 'FD'}[{space.name}]"


def official(space: FeatureSpace) -> bool:
    """Whether this is the space in which FID, KID and IS are defined."""
    return space.name.startswith("inception")


def between(drawn: Features, real: Features, measures: Measures, held_out: bool = False) -> dict[str, float]:
    """Figures of two sets in one space. Against held-out pictures, which are few, no Frechet distance is told.

    Raises UserError for sets that are too small for what is asked.
    """
    space, found = drawn.space, {}
    measures.check_counts(space, len(drawn), len(real), held_out)
    wanted = [kind for kind in measures.kinds if not (held_out and kind == "frechet")]
    tail = f"[{space.name}]{HELD_OUT if held_out else ''}"
    if "frechet" in wanted:
        found[frechet_name(space)] = frechet_of(drawn.moments(), real.moments())
    if "kernel" in wanted:
        name = ("KID" if official(space) else "KD") + tail
        found[name], found[f"{name} deviation"] = kernel(drawn.all(), real.all(), measures.subsets, measures.subset)
        if space.text is not None:
            found[f"CMMD{tail}"] = cmmd(drawn.all(), real.all())
    if "neighbours" in wanted:
        a, b = drawn.all(), real.all()
        found[f"precision{tail}"], found[f"recall{tail}"] = precision_recall(a, b, measures.neighbours)
        found[f"density{tail}"], found[f"coverage{tail}"] = density_coverage(a, b, measures.ball)
    return found


def alone(drawn: Features, source: Source, measures: Measures) -> dict[str, float]:
    """Figures that need no real pictures: the Inception Score where there are logits; of captioned pictures in a joint
    space, how well they fit their captions and how often their caption is found among all different ones."""
    space, found = drawn.space, {}
    if "score" in measures.kinds and space.logits:
        name = f"IS[{space.name}]"
        found[name], found[f"{name} deviation"] = inception_score(drawn.logits(), measures.splits)
    if "captions" in measures.kinds and space.text is not None and source.captioned:
        captions = [source.items[row].caption for row in drawn.rows]
        different = sorted(set(captions))
        place = {caption: i for i, caption in enumerate(different)}
        own = torch.tensor([place[caption] for caption in captions])
        texts, images = space.text(different), drawn.all()
        found[f"CLIP score[{space.name}]"] = clip_score(images, texts[own])
        among = f"of {len(different)} [{space.name}]"
        found[f"caption first {among}"], found[f"caption in five {among}"] = retrieval(images, texts, own)
    return found
