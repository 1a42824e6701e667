"""Which grid suits which sampler: how far each ends from where the probability flow ends, at equal cost.

On Gaussian data of deviation 0.5 the end of the flow is known; the figure is relative, at the grid's last level. On a
model it is that of 300 steps; the figure is the root mean square of the latents' difference, from the same noise. What
draws noise has no such end: its figure, on the Gaussian alone, is how far the output's deviation is off (to 0.005).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import generate
from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError
from ldm.files import atomic_write_text
from ldm.helpers import NONE
from ldm.jobs import Request, Settings, catalogue
from ldm.model import Model
from ldm.sampling import SAMPLERS, BrownianPath, NoiseStream, Sampler, deis, finish, make_grid, start
from ldm.start import Noise
from studies.samplers import COST

VARIANCE = 0.25
COMPARED = (
    *("ddim", "plms", "heun", "dpm_2", "dpm_fast", "dpmpp_2m", "res_multistep", "unipc", "lms", "deis", "ipndm"),
    "gradient_estimation",
)
NOISY = (
    *("ddpm", "euler_a", "dpm_2_a", "dpmpp_2s_a", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde", "restart", "pc"),
    *("langevin", "euler_maruyama"),
)
Measure = Callable[[str, int, str], float]
"""(a sampler as `read` takes it, steps, spacing) -> how far off it ends."""


def run(measures: Mapping[str, Measure], samplers: Sequence[str], spacings: Sequence[str], folder: Path) -> None:
    """Print a Markdown table of `measures`, "name, evaluations" -> measure, and write it."""
    lines = ["| sampler | grid | " + " | ".join(measures) + " |", "|" + " --- |" * (2 + len(measures))]
    print("\n".join(lines))
    for name in samplers:
        for spacing in spacings:
            figures = []
            for title, measure in measures.items():
                steps = int(title.rpartition(" ")[2]) // COST.get(read(name)[0], 1)
                figures.append(f"{measure(name, steps, spacing):.4f}")
            lines.append(f"| {name} | {spacing} | {' | '.join(figures)} |")
            print(lines[-1], flush=True)
    atomic_write_text(folder / "grids.md", "\n".join(lines) + "\n")


def read(word: str) -> tuple[str, dict[str, Any]]:
    """A sampler's name, in any spelling, and its options: "deis:order=3". Raises UserError for one not compared."""
    spelled, _, options = word.partition(":")
    name = catalogue.resolve(spelled)[0]
    if name not in (*COMPARED, *NOISY):
        raise UserError(f"{name} is not compared here; choose of {', '.join((*COMPARED, *NOISY))}")
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    return name, catalogue.check_options(name, {option: value for option, _, value in pairs})


def gaussian(word: str, steps: int, spacing: str) -> float:
    """On data of variance 0.25, on Stable Diffusion's law: of the flow, or of the deviation."""
    (name, options), schedule = read(word), make_schedule(ScheduleConfig())
    sigmas = make_grid(schedule, steps, spacing)
    first, last = (math.sqrt(VARIANCE + float(sigmas[end]) ** 2) for end in (0, -1))
    noise = (BrownianPath if catalogue.SAMPLERS[name].noise == "path" else NoiseStream)([0], (1, 128, 128))
    follows = name in COMPARED
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64) if follows else noise.initial().double()
    sampler = SAMPLERS[name](**options, **({"schedule": schedule} if name == "euler_maruyama" else {}))
    *_, step = sampler(lambda x, sigma: x * VARIANCE / (VARIANCE + sigma**2), first * x, sigmas, noise)
    return abs(float(step.x if follows else step.x.std()) / last - 1)


def on_model(model: Model, prompts: Sequence[str], settings: Settings) -> Measure:
    """On `prompts`, one picture each, picture i from seed i; the reference is drawn at once."""
    requests, plan = (
        [Request(prompt, seed=seed) for seed, prompt in enumerate(prompts)],
        settings.of(model.config.drawing).plan(),
    )
    shape = Noise().shape(model, plan, len(requests))
    denoiser, _ = generate.make_denoiser(model, requests, plan, NONE, shape, None)
    noise = NoiseStream([request.seed for request in requests], shape, model.device)

    def end(sampler: Sampler, steps: int, spacing: str) -> Tensor:
        sigmas = make_grid(model.law.schedule, steps, spacing)
        with torch.no_grad():
            *_, step = sampler(denoiser, start(noise.initial(), model.law.schedule, sigmas), sigmas, noise)
        return finish(step.x, model.law.schedule, sigmas)

    reference = end(deis(3), 300, "karras")

    def measure(word: str, steps: int, spacing: str) -> float:
        name, options = read(word)
        return float((end(SAMPLERS[name](**options), steps, spacing) - reference).square().mean().sqrt())

    return measure
