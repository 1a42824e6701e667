"""Samplers and grids by name, with a line each. No torch in here, so that a mistake is told at once.

The popular user interfaces write a sampler and its grid in one name, as "DPM++ 2M Karras"; `resolve` reads those too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from ldm.errors import UserError, nearest

Value = float | int | str


@dataclass(frozen=True)
class SamplerInfo:
    """What is known of a sampler without its code.

    `noise`: a path (one Brownian path for each picture, whatever the number of steps: more steps refine the same
    picture), a stream (fresh normals at each call, for what draws several at a level or renews them all), or none.
    `options`: what its factory takes, with the defaults.
    """

    line: str
    noise: Literal["none", "path", "stream"] = "none"
    options: Mapping[str, Value] = field(default_factory=dict)


ETA = {"eta": 1.0, "s_noise": 1.0}

SAMPLERS: dict[str, SamplerInfo] = {
    "ddim": SamplerInfo("DDIM (Song 2021); eta 0 is deterministic, 1 is DDPM; order 1", "path", {"eta": 0.0}),
    "ddpm": SamplerInfo(
        "ancestral sampling (Ho 2020); variance: posterior, beta or learned", "path", {"variance": "posterior"}
    ),
    "plms": SamplerInfo("pseudo linear multistep, Stable Diffusion's first sampler; N + 1 evaluations"),
    "euler": SamplerInfo("Euler's method on the probability flow; equals ddim with eta 0; order 1"),
    "euler_a": SamplerInfo("Euler with ancestral noise; equals ddim with the same eta", "path", ETA),
    "heun": SamplerInfo(
        "EDM's algorithm 2 (Karras 2022), with churn if wanted; order 2, two evaluations a step",
        "stream",
        {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.0},
    ),
    "dpm_2": SamplerInfo("DPM-Solver-2 (Lu 2022), the midpoint in log sigma; order 2, two evaluations a step"),
    "dpmpp_2m": SamplerInfo("DPM-Solver++ 2M (Lu 2022): order 2 at one evaluation a step"),
    "dpmpp_2m_sde": SamplerInfo(
        "DPM-Solver++ 2M on the reverse SDE; solver: midpoint or heun", "path", {**ETA, "solver": "midpoint"}
    ),
    "dpmpp_sde": SamplerInfo("DPM-Solver++ on the reverse SDE, one step at a time; two evaluations each", "path", ETA),
    "dpmpp_3m_sde": SamplerInfo("DPM-Solver++ 3M on the reverse SDE, for many steps", "path", ETA),
    "unipc": SamplerInfo(
        "UniPC (Zhao 2023), predictor and corrector at one evaluation a step; variant: bh1 or bh2",
        options={"order": 2, "variant": "bh2"},
    ),
    "lcm": SamplerInfo("multistep consistency sampling (Song 2023), for consistency models", "stream"),
    "langevin": SamplerInfo(
        "annealed Langevin dynamics (Song & Ermon 2019): moves at each level",
        "stream",
        {"moves": 10, "step_size": 0.1},
    ),
    "pc": SamplerInfo(
        "predictor-corrector (Song 2021): a reverse diffusion step, then Langevin moves",
        "stream",
        {"snr": 0.16, "moves": 1},
    ),
    "euler_maruyama": SamplerInfo("Euler-Maruyama on the reverse SDE in the model's own time, for many steps", "path"),
    "ode": SamplerInfo(
        "the probability flow by an adaptive solver, each picture by itself", options={"rtol": 1e-5, "atol": 1e-5}
    ),
}

GRIDS: dict[str, str] = {
    "trailing": "even in t, from the last level on (Lin 2024)",
    "linspace": "even in t, both ends included",
    "leading": "even in t, starting short of the last level: Stable Diffusion's first",
    "karras": "even in sigma^(1/7) (Karras 2022)",
    "exponential": "even in log sigma, then 0",
    "logsnr": "even in log sigma, ending at the smallest level",
    "uniform": "even in t between the ends, trained or not: Stable Diffusion 3's own",
}

_SPELLINGS = {
    "eulerancestral": "euler_a",
    "kdpm2": "dpm_2",
    "dpm2": "dpm_2",
    "pndm": "plms",
    "odedopri5": "ode",
    "unipcbh2": "unipc",
    "dpmpp2msdeheun": "dpmpp_2m_sde",
}
_SPELLED_OPTIONS: dict[str, dict[str, Value]] = {"dpmpp2msdeheun": {"solver": "heun"}}
_SPELLED_GRIDS = {"karras": "karras", "exponential": "exponential", "sgmuniform": "trailing"}


def resolve(sampler: str) -> tuple[str, str | None, dict[str, Value]]:
    """A sampler's name, and the grid and options that its spelling asks for.

    "DPM++ 2M Karras" -> (dpmpp_2m, karras, {}). Case, spaces, hyphens and underscores do not count. Raises UserError,
    naming the nearest, for an unknown one.
    """
    if sampler in SAMPLERS:
        return sampler, None, {}
    bare, grid = _bare(sampler), None
    for ending, spacing in _SPELLED_GRIDS.items():
        if bare.endswith(ending):
            bare, grid = bare.removesuffix(ending), spacing
    known = {_bare(name): name for name in SAMPLERS} | _SPELLINGS
    if bare not in known:
        near = nearest(bare, known)
        raise UserError(unknown("sampler", sampler, SAMPLERS, known.get(near)))
    return known[bare], grid, _SPELLED_OPTIONS.get(bare, {})


def check_options(sampler: str, options: Mapping[str, Value]) -> dict[str, Value]:
    """`options` in the types that `sampler` takes; raises UserError for one it has not and for a wrong type."""
    known, made = SAMPLERS[sampler].options, {}
    for name, value in options.items():
        if name not in known:
            others = f"it takes {', '.join(known)}" if known else "it has none"
            raise UserError(f"the sampler {sampler} has no option '{name}'; {others}")
        kind = type(known[name])
        try:
            made[name] = kind(value)
        except (ValueError, TypeError, OverflowError):  # options may come from a stranger's picture
            what = {int: "a whole number", float: "a number", str: "a word"}[kind]
            raise UserError(f"the option {name} of {sampler} is '{value}'; it must be {what}") from None
    return made


def check_levels(sigmas: Iterable[float]) -> list[float]:
    """The levels of a grid (N + 1,), which are strictly decreasing, finite, and 0 or more. Raises UserError."""
    levels = list(sigmas)
    if len(levels) < 2:
        raise UserError(f"the grid of sigmas has {len(levels)} levels; one step takes 2, such as 14.6, 0")
    for sigma in levels:
        if not 0 <= sigma < math.inf:
            raise UserError(f"the grid of sigmas has {sigma:g}, which is negative or not finite; choose 0 or more")
    for above, below in pairwise(levels):
        if below >= above:
            raise UserError(f"the grid of sigmas goes from {above:g} to {below:g}; each level must be below the last")
    return levels


def listing() -> str:
    """The samplers and grids, a line each, with their options."""
    width = max(map(len, [*SAMPLERS, *GRIDS]))
    lines = ["samplers"]
    for name, info in SAMPLERS.items():
        options = ", ".join(f"{option}={value}" for option, value in info.options.items())
        lines.append(f"  {name:{width}}  {info.line}" + (f" [{options}]" if options else ""))
    return "\n".join([*lines, "grids", *(f"  {name:{width}}  {line}" for name, line in GRIDS.items())])


def unknown(what: str, name: str, names: Iterable[str], near: str | None = None) -> str:
    """The sentence for a `name` that is not among `names`, of which `near` is meant, or else one that is like it."""
    near = near or nearest(name, names)
    hint = f"did you mean '{near}'? There" if near else "there"
    return f"unknown {what} '{name}'; {hint} are {', '.join(names)}"


def _bare(name: str) -> str:
    """Lower case without anything between the letters and digits: "DPM++ 2M" -> dpmpp2m."""
    return re.sub(r"[\s_\-]", "", name.lower().replace("++", "pp"))
