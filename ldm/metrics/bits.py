"""Bits per dimension of captioned pictures, with their protocol; likelihood.py has the mathematics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ldm.config import DataConfig
from ldm.data.loader import validation_batches
from ldm.errors import UserError
from ldm.metrics import likelihood, protocol
from ldm.metrics.sources import RESIZE
from ldm.model import Model
from ldm.provenance import surroundings

PARTS = {"flow": ["evaluations"], "bound": ["prior", "steps", "decoder", "error of the draws"]}


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
            found = likelihood.flow(model, image, captions, seeds, method.probes, method.tolerance)
            rows.append(torch.stack([found.bits.value, found.evaluations.double()], dim=1))
        else:
            terms = likelihood.chain(model, image, captions, seeds, method.variance, method.strata, method.draws)
            parts = [terms.total.value, terms.prior, terms.steps.sum(1), terms.decoder, terms.error]
            rows.append(torch.stack(parts, dim=1))
        seen += len(image)
        if seen == count:
            break
    if not rows:
        raise UserError(f"no picture of {shards} can be used")
    table = torch.cat(rows)
    space = likelihood.space_of(model.codec).name
    total = likelihood.BitsPerDim(table[:, 0], space)
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
    total = likelihood.BitsPerDim(torch.tensor(document["each"]), figures["space"])
    return "\n".join(
        [
            f"{figures['pictures']} pictures of {made['size']} px, their captions given, seeds {first} to {last}",
            *(f"{name:20}{figures[name]:10.4f}" for name in PARTS[made["method"]]),
            f"{made['method']}: {total} +- {total.error:.4f} (standard error over pictures)",
        ]
    )
