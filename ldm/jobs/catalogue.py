"""Samplers and grids by name, with a line each. No torch in here, so that a mistake is told at once.

The popular user interfaces write a sampler and its grid in one name, as "DPM++ 2M Karras"; `resolve` reads those too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from ldm.errors import UserError, nearest

Value = float | int | str
QUOTED = 60  # letters of a stranger's word that a sentence says


@dataclass(frozen=True)
class SamplerInfo:
    """What is known of a sampler without its code.

    `noise`: a path (one Brownian path for each picture, whatever the number of steps: more steps refine the same
    picture), a stream (fresh normals at each call, for what draws several at a level or renews them all), or none.
    `options`: what its factory takes, with the defaults.
    `grid`: the spacing that is taken where none is said, by measurement (docs/samplers.md); `own_grid` has a flow's.
    `unguided`: it looks at the prediction without the prompt too (CFG++).
    """

    line: str
    noise: Literal["none", "path", "stream"] = "none"
    options: Mapping[str, Value] = field(default_factory=dict)
    grid: str = "karras"
    unguided: bool = False


ETA = {"eta": 1.0, "s_noise": 1.0}
PID = {
    **{"order": 3, "rtol": 0.05, "atol": 0.0078, "h_init": 0.05},
    **{"pcoeff": 0.0, "icoeff": 1.0, "dcoeff": 0.0, "accept_safety": 0.81},
}

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
    "dpm_2_a": SamplerInfo("DPM-Solver-2 with ancestral noise; two evaluations a step", "path", ETA),
    "dpm_fast": SamplerInfo("DPM-Solver-3 (Lu 2022), three steps of the grid at a time; order 3", grid="logsnr"),
    "dpm_adaptive": SamplerInfo(
        "DPM-Solver with steps of its own (Lu 2022), each picture by itself; order 2 or 3; the steps asked are looks",
        options=PID,
        grid="logsnr",
    ),
    "dpmpp_2s_a": SamplerInfo("DPM-Solver++ 2S with ancestral noise; two evaluations a step", "path", ETA),
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
    "lms": SamplerInfo("linear multistep: Adams and Bashforth in sigma; order 1 to 4", options={"order": 4}),
    "deis": SamplerInfo("DEIS (Zhang & Chen 2023): a multistep in log sigma; order 1 to 4", options={"order": 2}),
    "ipndm": SamplerInfo("PNDM without a start of its own (Zhang & Chen 2023); order 1 to 4", options={"order": 4}),
    "res_multistep": SamplerInfo(
        "RES (Zhang 2023): an exponential multistep of x0; order 1 to 4", options={"order": 2}
    ),
    "gradient_estimation": SamplerInfo("Euler beyond the newest slope (Permenter & Yuan 2024)", options={"gamma": 2.0}),
    "ddim_cfg_pp": SamplerInfo(
        "CFG++ (Chung 2024): DDIM that puts back unguided noise; cfg 0 to 1", "path", {"eta": 0.0}, unguided=True
    ),
    "euler_cfg_pp": SamplerInfo("CFG++ without fresh noise; cfg 0 to 1", unguided=True),
    "euler_a_cfg_pp": SamplerInfo("CFG++ with ancestral noise; cfg 0 to 1", "path", ETA, unguided=True),
    "restart": SamplerInfo(
        "Restart (Xu 2023): Heun, walking again from low to high; two evaluations a step",
        "stream",
        {"times": 1, "low": 0.1, "high": 2.0},
    ),
    "lcm": SamplerInfo("multistep consistency sampling (Song 2023), for consistency models", "stream", grid="lcm"),
    "langevin": SamplerInfo(
        "annealed Langevin dynamics (Song & Ermon 2019): moves at each level",
        "stream",
        {"moves": 10, "step_size": 0.1},
        "trailing",
    ),
    "pc": SamplerInfo(
        "predictor-corrector (Song 2021): a reverse diffusion step, then Langevin moves",
        "stream",
        {"snr": 0.16, "moves": 1},
        "trailing",
    ),
    "euler_maruyama": SamplerInfo(
        "Euler-Maruyama on the reverse SDE in the model's own time, for many steps", "path", grid="trailing"
    ),
    "ode": SamplerInfo(
        "the probability flow by an adaptive solver, each picture by itself", options={"rtol": 1e-5, "atol": 1e-5}
    ),
}

ADAPTIVE = ("ode", "dpm_adaptive")  # they choose their steps by an error that they measure

GRIDS: dict[str, str] = {
    "trailing": "even in t, from the last level on (Lin 2024)",
    "linspace": "even in t, both ends included",
    "leading": "even in t, starting short of the last level: Stable Diffusion's first",
    "karras": "even in sigma^(1/7) (Karras 2022); --rho for another root",
    "exponential": "even in log sigma, then 0",
    "polyexponential": "the --rho-th power of an even ramp in log sigma, then 0",
    "logsnr": "even in log sigma, ending at the smallest level",
    "uniform": "even in t between the ends, trained or not: Stable Diffusion 3's own",
    "kl_optimal": "even in arctan sigma, then 0 (Sabour 2024)",
    "normal": "even in t, unrounded, both ends included",
    "sgm_uniform": "even in t, unrounded, from the last level on",
    "simple": "even in t, from the last level on, rounded the other way",
    "ddim_uniform": "the levels of leading, then 0",
    "dpm_leading": "leading as DPM-Solver++ has it in diffusers",
    "beta": "t at the quantiles of Beta(0.6, 0.6) (Lee 2024)",
    "lcm": "of the 50 levels that latent consistency models know",
    "ays_sd15": "align your steps (Sabour 2024), for Stable Diffusion 1.5",
    "ays_sdxl": "the same for SDXL",
    "ays_svd": "the same for Stable Video Diffusion",
}
RHO = ("karras", "polyexponential")

_SPELLINGS = {
    "eulerancestral": "euler_a",
    "eulerancestralcfgpp": "euler_a_cfg_pp",
    "kdpm2": "dpm_2",
    "dpm2": "dpm_2",
    "kdpm2ancestral": "dpm_2_a",
    "dpm2ancestral": "dpm_2_a",
    "dpmpp2sancestral": "dpmpp_2s_a",
    "pndm": "plms",
    "odedopri5": "ode",
    "unipcbh2": "unipc",
    "dpmpp2msdeheun": "dpmpp_2m_sde",
}
_SPELLED_OPTIONS: dict[str, dict[str, Value]] = {"dpmpp2msdeheun": {"solver": "heun"}}
_SPELLED_GRIDS = {
    "alignyoursteps": "ays_sd15",
    "alignyourstepssdxl": "ays_sdxl",
    "alignyourstepssvd": "ays_svd",
    "ays": "ays_sd15",
}


def resolve(sampler: str) -> tuple[str, str | None, dict[str, Value]]:
    """A sampler's name, and the grid and options that its spelling asks for.

    "DPM++ 2M Karras" -> (dpmpp_2m, karras, {}). Case, spaces, hyphens and underscores do not count. Raises UserError,
    naming the nearest, for an unknown one.
    """
    if sampler in SAMPLERS:
        return sampler, None, {}
    bare = _bare(sampler)
    known = {_bare(name): name for name in SAMPLERS} | _SPELLINGS
    for ending, grid in {"": None, **_grids()}.items():
        name = bare.removesuffix(ending)
        if bare.endswith(ending) and name in known:
            return known[name], grid, _SPELLED_OPTIONS.get(name, {})
    for ending in _grids():
        bare = bare.removesuffix(ending) or bare
    raise UserError(unknown("sampler", sampler, SAMPLERS, known.get(nearest(bare, known))))


def own_grid(sampler: str | Callable[..., Any], flow: bool) -> str:
    """The grid that is taken where none is said: a flow's is even in t, so that its shift is in it.

    `sampler`: a name, or one that a caller of the library wrote, who should say a grid.
    """
    grid = SAMPLERS[sampler].grid if isinstance(sampler, str) else SamplerInfo.grid
    return "trailing" if flow and grid in ("karras", "logsnr") else grid


def resolve_grid(spacing: str) -> str:
    """A grid's name of its spelling, as "SGM Uniform". Raises UserError, naming the nearest, for an unknown one."""
    known = _grids()
    if _bare(spacing) not in known:
        raise UserError(unknown("grid spacing", spacing, GRIDS))
    return known[_bare(spacing)]


def _grids() -> dict[str, str]:
    return {_bare(name): name for name in GRIDS} | _SPELLED_GRIDS


def check_options(sampler: str, options: Mapping[str, Value]) -> dict[str, Value]:
    """`options` in the types that `sampler` takes; raises UserError for one it has not and for a wrong type."""
    known, made = SAMPLERS[sampler].options, {}
    for name, value in options.items():
        if name not in known:
            others = f"it takes {', '.join(known)}" if known else "it has none"
            raise UserError(f"the sampler {sampler} has no option '{name[:QUOTED]}'; {others}")
        kind = type(known[name])
        try:
            if kind is int and isinstance(value, float) and not value.is_integer():
                raise ValueError
            made[name] = kind(value)
        except (ValueError, TypeError, OverflowError):  # options may come from a stranger's picture
            what = {int: "a whole number", float: "a number", str: "a word"}[kind]
            raise UserError(f"the option {name} of {sampler} is '{str(value)[:QUOTED]}'; it must be {what}") from None
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
    """The samplers and grids, a line each, with their options, and the grid that a sampler has unless one is said."""
    width = max(map(len, [*SAMPLERS, *GRIDS]))
    lines = ["samplers [options and their defaults] (grid)"]
    for name, info in SAMPLERS.items():
        options = ", ".join(f"{option}={value}" for option, value in info.options.items())
        lines.append(f"  {name:{width}}  {info.line}" + (f" [{options}]" if options else "") + f" ({info.grid})")
    return "\n".join([*lines, "grids", *(f"  {name:{width}}  {line}" for name, line in GRIDS.items())])


def unknown(what: str, name: str, names: Iterable[str], near: str | None = None) -> str:
    """The sentence for a `name` that is not among `names`, of which `near` is meant, or else one that is like it."""
    near = near or nearest(name, names)
    hint = f"did you mean '{near}'? There" if near else "there"
    return f"unknown {what} '{name[:QUOTED]}'; {hint} are {', '.join(names)}"


def _bare(name: str) -> str:
    """Lower case without anything between the letters and digits: "DPM++ 2M" -> dpmpp2m."""
    return re.sub(r"[\s_\-]", "", name.lower().replace("++", "pp"))
