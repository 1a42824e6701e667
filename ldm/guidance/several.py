"""What takes more than two conditionings: perpendicular negative prompts, and the conjunction of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Branches, Denoiser
from ldm.errors import UserError
from ldm.guidance.rule import Interval, guided, inner


def perpendicular_negative(
    branches: Branches,
    negative_scale: float,
    scale: float,
    rescale: float = 0.0,
    interval: Interval | None = None,
) -> Denoiser:
    """u + scale (d - negative_scale n'), n' being the part of n perpendicular to d (Armandpour et al. 2023, Perp-Neg).

    Branches 0, 1 and 2 are the prompt's c, the unconditional u and the negative prompt's; d = c - u, n = negative - u,
    and the inner product is each picture's own, over C, h, w. A plain negative prompt, which pushes along -n, takes
    away from the prompt what the two share ("a red apple", negative "an apple"); this one never does: the guided
    prediction has the component along d that cfg gives it.

    `negative_scale` 0 is `cfg`. Differences of x0 are those of the network's outputs times a factor of sigma alone, and
    n' keeps such a factor, so guiding x0 is guiding eps or v. `rescale`, `interval`: see `rule.guided`.

    Raises UserError for a rescale outside [0, 1] and an interval without low < high.
    """

    def rule(predictions: Tensor) -> Tensor:
        conditional, unconditional, negative = predictions
        d, n = conditional - unconditional, negative - unconditional
        along = inner(n, d) / inner(d, d).clamp(min=torch.finfo(d.dtype).tiny)
        return unconditional + scale * (d - negative_scale * (n - along * d))

    if negative_scale == 0:
        return guided(branches, 2, lambda both: both[1] + scale * (both[0] - both[1]), rescale, interval)
    return guided(branches, 3, rule, rescale, interval)


def conjunction(branches: Branches, scales: Sequence[float]) -> Denoiser:
    """u + sum_i scales[i] (c_i - u): what all prompts ask for (Liu et al. 2022, "Compositional visual generation").

    At each level this is the score of u times the product of (c_i / u)^scales[i]. Branch 1 is u; the prompts are
    branches 0, 2, 3, ..., in the order of `scales`. A negative scale is their NOT; one prompt alone is `cfg`.

    Raises UserError if `scales` is empty.
    """
    both = together(branches, [(scale,) for scale in scales])
    return lambda x, sigma: both(x, sigma, 1)[0]


def together(branches: Branches, weights: Sequence[Sequence[float]], kept: int = 2) -> Branches:
    """`kept` branches, whose first is a conjunction: u + sum_k weights[k] (c_k - u), and u the second.

    So a rule of guidance acts on it as on one prompt: `cfg` of it is u + scale sum_k weights[k] (c_k - u). The prompts
    are branch 0 and those from `kept` on; between them is what else a rule looks at.

    `weights`: K rows, of one number or of one for each of B pictures. Raises UserError for no row.
    """
    if not weights:
        raise UserError("a conjunction needs a guidance scale for each prompt; give at least one prompt")

    def joined(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        found = branches(x, sigma, kept + len(weights) - 1)
        prompts, others = torch.cat([found[:1], found[kept:]]), found[1:kept]
        shares = torch.tensor(weights).to(found)[..., None, None, None]
        first = others[0] + (shares * (prompts - others[0])).sum(dim=0)
        return torch.cat([first[None], others])[:count]

    return joined
