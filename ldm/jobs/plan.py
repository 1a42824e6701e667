"""Plan: settings that have been checked, taken apart into what is compared (a guide) and what acts on that (wraps)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.errors import UserError
from ldm.jobs.request import Ask, Sizes

Interval = tuple[float, float] | None
"""(low, high] in sigma: guided there only."""


@dataclass(frozen=True)
class Cfg:
    """Classifier-free guidance: u + scale (c - u), with u on what is not to be drawn (Ho & Salimans 2022)."""

    scale: float = 7.5
    rescale: float = 0.0
    interval: Interval = None
    plus: bool = False  # CFG++: the sampler looks at u too

    def asks(self, clauses: Sequence[Sequence[Ask]], others: Sequence[Ask]) -> list[Sequence[Ask]]:
        """What the model is told, branch by branch; `clauses` are those of prompts that AND joins, else one list.

        At scale 1 nothing looks at the others, unless prompts are joined, which goes from where the others are, and but
        in CFG++.
        """
        first, *more = clauses
        return [first] if self.scale == 1 and not (more or self.plus) else [first, others, *more]


@dataclass(frozen=True)
class PerpNegative:
    """Guidance away from nothing, and from the negative prompt across the prompt only (Armandpour et al. 2023)."""

    weight: float
    scale: float = 7.5
    rescale: float = 0.0
    interval: Interval = None

    def asks(self, clauses: Sequence[Sequence[Ask]], others: Sequence[Ask]) -> list[Sequence[Ask]]:
        return [clauses[0], [replace(other, text="", told=None) for other in others], others, *clauses[1:]]


@dataclass(frozen=True)
class Auto:
    """Autoguidance: a worse model stands in u's place (Karras et al. 2024). `model` is its name or path."""

    model: str
    scale: float = 7.5
    rescale: float = 0.0
    interval: Interval = None

    def asks(self, clauses: Sequence[Sequence[Ask]], others: Sequence[Ask]) -> list[Sequence[Ask]]:
        if len(clauses) > 1:
            raise UserError("prompts joined by AND do not go with a guide model; leave one of the two out")
        if any(other.text or other.told is not None for other in others):
            raise UserError("a guide model is used in place of the negative prompt; leave one of the two out")
        return [clauses[0]]


@dataclass(frozen=True)
class Classifier:
    """Guidance by the gradient of a noise-aware classifier (Dhariwal & Nichol 2021) in `folder`, to `label`."""

    folder: str
    label: str
    scale: float = 1.0


@dataclass(frozen=True)
class Threshold:
    """Keep x0 in the data's range: static or dynamic (Saharia et al. 2022). `bound`: None leaves it to the model."""

    kind: str
    bound: float | None = None


@dataclass(frozen=True)
class Refine:
    """Another model on the same latents takes over where less noise is left (Podell et al. 2023, section 2.5).

    At a sigma below `sigma`, or where that is None at the lowest `share` of the trained levels. No noise is added.
    """

    model: str
    sigma: float | None = None
    share: float = 0.2


@dataclass(frozen=True)
class Merge:
    """Token merging (Bolya & Hoffman 2023): at most that share of the tokens is merged, up to 0.75."""

    share: float = 0.5


@dataclass(frozen=True)
class Reuse:
    """DeepCache (Ma et al. 2023): the U-Net runs whole at each `every`-th evaluation; at the others `branch` stages of
    its way down, and as many and one of its way up."""

    every: int = 3
    branch: int = 0


Guide = Cfg | PerpNegative | Auto
Wrap = Refine | Classifier | Threshold


def told_scale(guide: Guide, joined: bool, name: str) -> float:
    """The scale that a network is told which makes one prediction, guided already; `joined`: whether prompts are, by
    AND. Raises UserError, with the model's `name`, for a guide that compares several predictions."""
    asked = {
        "AND": joined,
        "a guide model": isinstance(guide, Auto),
        "perp_negative": isinstance(guide, PerpNegative),
        "a sampler of CFG++": isinstance(guide, Cfg) and guide.plus,
        "cfg_rescale": guide.rescale > 0,
        "cfg_interval": guide.interval is not None,
    }
    for word, given in asked.items():
        if given:
            raise UserError(
                f"{word} compares several predictions, and {name} makes one, which is guided by the scale that it is "
                "told; leave it out"
            )
    return guide.scale


@dataclass(frozen=True)
class Plan:
    """What is to be done, in the library's names. Made by `Settings.plan`, which has checked it: nobody does again.

    Where a name stands, a caller of the library may put what it names: see the types.
    """

    sampler: str | Callable[..., Any] = "dpmpp_2m"  # sampling.Sampler
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing: str | Callable[..., Any] | None = None  # sampling.Grid: (schedule, steps) -> (steps + 1,); None: own_grid
    rho: float | None = None
    steps: int = 20
    sigmas: tuple[float, ...] = ()
    width: int | None = None
    height: int | None = None
    tile: int | None = None
    weighted: bool = False  # how prompts are read: an Ask's
    guide: Guide | Callable[..., Any] = Cfg()  # Branches of prompt and negative prompt -> Denoiser
    wraps: tuple[Wrap, ...] = ()
    shortcuts: tuple[Merge | Reuse, ...] = ()  # of the model's own network, and of a refiner's
    noise: Callable[..., Any] | None = None  # (seeds, shape, device) -> start.Draws; None: the sampler's kind
    network: Callable[..., Any] | None = None  # diffusion.Network, or (x, t, told) -> F, in the model's own place
    sizes: Sizes = Sizes()

    @property
    def guide_model(self) -> str | None:
        """The model beside the one that draws."""
        return self.guide.model if isinstance(self.guide, Auto) else None

    @property
    def refiners(self) -> list[Refine]:
        """One or none."""
        return [wrap for wrap in self.wraps if isinstance(wrap, Refine)]

    @property
    def classifiers(self) -> list[Classifier]:
        return [wrap for wrap in self.wraps if isinstance(wrap, Classifier)]
