"""How likely a model finds captioned pictures: what `scripts/evaluate.py likelihood` reports.

A latent model is asked for the density of the autoencoder's latents, sampled from its posterior as in training; a pixel
model (identity codec) for the picture's own 8-bit levels. All of it is conditional on the captions, without guidance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.config import DataConfig
from ldm.data.loader import validation_batches
from ldm.diffusion import Denoiser, LearnedVariance
from ldm.diffusion.likelihood import (
    BitsPerDim,
    Bound,
    bound,
    density_bits,
    draw_probes,
    draw_uniform,
    flow_log_density,
    space_of,
)
from ldm.errors import UserError
from ldm.generate import branches_of
from ldm.jobs import Ask
from ldm.metrics import protocol
from ldm.metrics.sources import RESIZE
from ldm.model import Model
from ldm.provenance import surroundings
from ldm.sampling import NoiseStream, make_grid
from ldm.sampling.step import solver_state

PARTS = {"flow": ["evaluations"], "bound": ["prior", "steps", "decoder", "error of the draws"]}
PROBES, STEPS = 1_000_003, 2_000_003  # added to a picture's seed, so that these draws are not those of its noise


@dataclass(frozen=True, eq=False)
class Flow:
    """`bits` (B,) of the probability flow, and the `evaluations` (B,) that each picture took."""

    bits: BitsPerDim
    evaluations: Tensor


@torch.no_grad()
def flow(
    model: Model,
    image: Tensor,
    captions: Sequence[str],
    seeds: Sequence[int],
    probes: int = 1,
    tolerance: float = 1e-4,
) -> Flow:
    """The exact likelihood of `image` (B, 3, H, W) in [-1, 1], up to Hutchinson's estimate with so many `probes`.

    Each picture is integrated by itself, from the schedule's first level to its last, and depends on its seed alone. A
    pixel model is given pictures dequantised with their own uniform noise. Raises UserError.
    """
    noise = NoiseStream(seeds, _shape(model, image), model.device)
    x0, space = _encode(model, image, noise), space_of(model.codec)
    if space.name == "pixels":
        uniform = draw_uniform([seed + STEPS for seed in seeds], x0[0].numel()).reshape(x0.shape).to(x0)
        x0 = x0 + (2 * uniform - 1) / 255 * space.scale.to(x0)
    schedule = model.law.schedule
    found = flow_log_density(
        [_denoiser(model, [caption])[0] for caption in captions],
        x0,
        schedule.sigma_min,
        schedule.sigma_max,
        float(schedule.start_scale(schedule.sigmas[-1])),
        draw_probes([seed + PROBES for seed in seeds], x0.shape[1:], probes),
        rtol=tolerance,
        atol=tolerance,
    )
    return Flow(density_bits(found.log_density, x0[0].numel(), space), found.evaluations)


@torch.no_grad()
def chain(
    model: Model,
    image: Tensor,
    captions: Sequence[str],
    seeds: Sequence[int],
    variance: str = "posterior",
    strata: int = 50,
    draws: int = 2,
) -> Bound:
    """The variational bound of `image` (B, 3, H, W) in [-1, 1] on all trained levels, term by term.

    `variance`: posterior, beta, or learned, of a model that has it. `strata` and `draws` are those of
    `likelihood.bound`; 0 strata evaluate every step. The decoder of a pixel model is that of 8-bit levels. Raises
    UserError.
    """
    noise = NoiseStream(seeds, _shape(model, image), model.device)
    x0, space = _encode(model, image, noise), space_of(model.codec)
    denoiser, learned = _denoiser(model, captions)
    if variance == "learned" and learned is None:
        raise UserError("this model has no learned variance; choose posterior or beta")
    return bound(
        denoiser,
        x0,
        make_grid(model.law.schedule, model.law.schedule.steps),
        model.law.schedule,
        lambda: noise(0.0, 0.0),
        variance=learned.fraction if variance == "learned" and learned is not None else variance,
        decoder="levels" if space.name == "pixels" else "density",
        space=space,
        uniform=draw_uniform([seed + STEPS for seed in seeds], strata, draws) if strata else None,
        draws=draws,
    )


def _shape(model: Model, image: Tensor) -> tuple[int, int, int]:
    return model.codec.latent_shape(image.shape[2], image.shape[3])


def _encode(model: Model, image: Tensor, noise: NoiseStream) -> Tensor:
    return solver_state(model.codec.encode(image.to(model.device), noise.initial()))


def _denoiser(model: Model, captions: Sequence[str]) -> tuple[Denoiser, LearnedVariance | None]:
    """The conditional model, and the same again if it has a learned variance."""
    branches = branches_of(model, [[Ask(caption) for caption in captions]])
    return lambda x, sigma: branches(x, sigma, 1)[0], branches if isinstance(branches, LearnedVariance) else None


# ---------------------------------------------------------------- the result


@dataclass(frozen=True)
class Method:
    """How the likelihood is found: the probability flow's density, or the variational bound."""

    name: str = "flow"
    probes: int = 1  # flow: of the trace's estimate
    tolerance: float = 1e-4  # flow: of the solver, relative and absolute
    variance: str = "posterior"  # bound
    strata: int = 50  # bound: 0 evaluates every step
    draws: int = 2  # bound: evaluations in each stratum, or of each step

    def protocol(self) -> dict[str, Any]:
        if self.name == "flow":
            return {"method": "flow", "probes": self.probes, "tolerance": self.tolerance}
        return {"method": "bound", "variance": self.variance, "strata": self.strata, "draws": self.draws}


def evaluate_likelihood(
    model: Model,
    shards: str,
    where: Mapping[str, Sequence[str]],
    method: Method,
    count: int = 8,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Any]:
    """The result for the first `count` pictures of `shards`; picture i has the seed `seed + i`. Raises UserError.

    The protocol has a hash of those pictures, as they were given to the model, and of their captions.
    """
    least = {"count": 1, "draws": 1, "probes": 1, "strata": 0, "seed": 0}
    for name, number in {"count": count, "seed": seed, **asdict(method)}.items():
        if name in least and number < least[name]:
            raise UserError(f"--{name} is {number}; it must be at least {least[name]}")
    size = model.config.image_size
    data = DataConfig(validation=shards, size=size, where={name: list(values) for name, values in where.items()})
    rows: list[torch.Tensor] = []
    seen, content = 0, hashlib.sha256()
    for batch in validation_batches(data, batch_size):
        image, captions = batch.image[: count - seen], batch.caption[: count - seen]
        seeds = range(seed + seen, seed + seen + len(image))
        for picture, caption in zip(image, captions, strict=True):
            content.update(picture.add(1).mul(127.5).round().byte().numpy().tobytes())
            content.update(hashlib.sha256(caption.encode()).digest())
        if method.name == "flow":
            found = flow(model, image, captions, seeds, method.probes, method.tolerance)
            rows.append(torch.stack([found.bits.value, found.evaluations.double()], dim=1))
        else:
            terms = chain(model, image, captions, seeds, method.variance, method.strata, method.draws)
            parts = [terms.total.value, terms.prior, terms.steps.sum(1), terms.decoder, terms.error]
            rows.append(torch.stack(parts, dim=1))
        seen += len(image)
        if seen == count:
            break
    if not rows:
        raise UserError(f"no picture of {shards} can be used")
    table = torch.cat(rows)
    space = space_of(model.codec).name
    total = BitsPerDim(table[:, 0], space)
    figures = {"bits_per_dim": round(total.mean, 5), "space": space, "error": round(total.error, 5), "pictures": seen}
    return protocol.result(
        figures | dict(zip(PARTS[method.name], table[:, 1:].mean(0).tolist(), strict=True)),
        protocol.subject_of(model),
        {
            "command": "likelihood",
            "pictures": {"pictures": seen, "hash": content.hexdigest(), "where": data.where},
            "size": size,
            "resize": RESIZE,
            "seeds": [seed, seed + seen - 1],
            "batch_size": batch_size,
            **{name: surroundings(model)[name] for name in ("device", "precision")},
            **method.protocol(),
        },
        sources={"pictures": shards},
        each=table[:, 0].tolist(),
    )


def likelihood_table(document: Mapping[str, Any]) -> str:
    """The figures as lines."""
    figures, made = document["figures"], document["protocol"]
    first, last = made["seeds"]
    total = BitsPerDim(torch.tensor(document["each"]), figures["space"])
    return "\n".join(
        [
            f"{figures['pictures']} pictures of {made['size']} px, their captions given, seeds {first} to {last}",
            *(f"{name:20}{figures[name]:10.4f}" for name in PARTS[made["method"]]),
            f"{made['method']}: {total} +- {total.error:.4f} (standard error over pictures)",
        ]
    )
