"""The protocol of prompt accuracy: what is prompted, and who judges the pictures.

Prompts are "{phrase}, {style}", the phrase being how the real pictures' captions name the concept, or with a background
"{phrase} on a {colour} background, {style}", of which the border is judged (colours.py). The judge of all others is
the features of a classifier that saw real pictures only, and prototypes of the same pictures: the mean of a concept's
unit features, scaled to unit length again (Snell et al. 2017 take Euclidean distance; of unit vectors the order is the
same). Pictures in a style that neither the classifier nor the prototypes saw, judged the same way, say what the judge
itself can do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.judge.classifier import Classifier
from ldm.judge.colours import on_background
from ldm.judge.pictures import Pictures
from ldm.metrics.distances import ranks


@dataclass(frozen=True)
class Prompt:
    text: str
    concept: str
    style: str
    colour: str = ""  # of the background; empty: none is named


def make_prompts(
    pictures: Pictures,
    concepts: Sequence[str],
    styles: Sequence[str],
    colours: Sequence[str] = (),
    pairs: Collection[tuple[str, str]] | None = None,
) -> list[Prompt]:
    """One for each style and concept, style by style, on backgrounds of `colours` in turn, where there are any.

    pairs: the (concept, style) to prompt alone. Raises UserError for a concept that has no picture, or for no prompt.
    """
    named = {concept: phrase(pictures.of([concept], sorted(set(pictures.style))), concept) for concept in concepts}
    wanted = [(concept, style) for style in styles for concept in concepts]
    wanted = [pair for pair in wanted if pairs is None or pair in pairs]
    if not wanted:
        raise UserError("--pairs shows none of the concepts in one of the styles; check both, and its shards")
    made = []
    for (concept, style), colour in zip(wanted, cycle(colours or [""]), strict=False):
        behind = on_background(colour) if colour else ""
        made.append(Prompt(f"{named[concept]}{behind}, {style}", concept, style, colour))
    return made


def phrase(pictures: Pictures, concept: str) -> str:
    """The shortest of the captions that end in ", {style}", without that end: "a red heart"."""
    ends = [(caption, f", {style}") for caption, style in zip(pictures.caption, pictures.style, strict=True)]
    found = [caption.removesuffix(end) for caption, end in ends if caption.endswith(end)]
    if not found:
        raise UserError(f"no picture's caption is '..., its style' for the concept '{concept}'; check --shards")
    return min(found, key=lambda text: (len(text), text))


def prototypes(features: Tensor, concepts: Tensor, count: int) -> Tensor:
    """(count, D) of unit length, from unit features (N, D) and the concept 0 <= concepts[i] < count of each, (N,).

    Raises ValueError for a concept without a picture: without its prototype every accuracy would be wrong.
    """
    seen = torch.bincount(concepts, minlength=count)
    if seen.numel() != count or bool((seen == 0).any()):
        raise ValueError(f"pictures for each concept: {seen.tolist()}; each of the {count} needs one at least")
    sums = torch.zeros(count, features.shape[1], dtype=features.dtype).index_add_(0, concepts, features)
    return F.normalize(sums / seen.unsqueeze(1), dim=1)


class Judge:
    """Ranks pictures against the prototypes of `concepts`, which are made of real `pictures`."""

    def __init__(self, classifier: Classifier, pictures: Pictures, concepts: Sequence[str]) -> None:
        """`pictures` are narrowed to the classifier's styles. Raises UserError for a concept that has none."""
        self.classifier, self.concepts = classifier, tuple(concepts)
        seen = pictures.of(concepts, classifier.config.styles)
        missing = [name for name in concepts if name not in set(seen.name)]
        if missing:
            raise UserError(f"--shards has no picture of {', '.join(missing)} in a style that the classifier saw")
        self.pictures = len(seen)
        self.prototypes = prototypes(self.features(seen.image), seen.labels(self.concepts), len(self.concepts))

    @torch.inference_mode()
    def features(self, image: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1], of any size -> (N, D); they are brought to the classifier's size."""
        side = self.classifier.config.size
        if image.shape[-2:] != (side, side):
            image = F.interpolate(image, (side, side), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([self.classifier.features(part) for part in image.split(256)])

    def ranks(self, image: Tensor, concepts: Sequence[str]) -> Tensor:
        """(N,): the place of each picture's own concept among the nearest prototypes, 0 for the nearest."""
        own = torch.tensor([self.concepts.index(name) for name in concepts], dtype=torch.long)
        return ranks(self.features(image), own, self.prototypes)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95 % (z = 1.96) when `hits` of `count` were seen (Wilson 1927)."""
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


@dataclass(frozen=True)
class Score:
    """Hits among `count` pictures: the nearest prototype is the right one (top1), it is among the nearest five."""

    top1: int
    top5: int
    count: int

    @classmethod
    def of(cls, ranks: Tensor) -> Score:
        return cls(int((ranks == 0).sum()), int((ranks < 5).sum()), len(ranks))

    def figures(self) -> dict[str, float | int]:
        """Shares, with the 95 % interval of the first (of `count` independent pictures)."""
        low, high = wilson(self.top1, self.count)
        shares = {"top1": self.top1 / self.count, "low": low, "high": high, "top5": self.top5 / self.count}
        return {"pictures": self.count, **{name: round(share, 4) for name, share in shares.items()}}
