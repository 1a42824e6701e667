"""Score matching: how a field s(x) is taught to be grad ln p(x) from draws of p alone.

The explicit objective E |s - grad ln p|^2 / 2 needs what is looked for. These differ from it by a constant of the data
or have the same minimiser:

    denoising   E |s(x0 + sigma n) + n / sigma|^2 / 2       of p with noise sigma on it (Vincent 2011)
    implicit    E [tr ds/dx + |s|^2 / 2]                    of p itself (Hyvarinen 2005, by parts)
    sliced      E [v^T ds/dx v + (v^T s)^2 / 2]             along random v (Song et al. 2019)
                E [v^T ds/dx v + |s|^2 / 2]                 with v's mean already taken in the second term

The sliced form with (v^T s)^2 has, for E[v v^T] = I, the expectation of the one with |s|^2: both are the implicit
objective's. All are nats, summed over a row's values, one number for each row; the mean is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.diffusion.trace import field_and_trace

Score = Callable[[Tensor], Tensor]
"""x (B, ...) -> the estimate of grad ln p(x) (B, ...), each row of its own row alone. A noise level is closed over."""


def denoising_score_matching(score: Score, x0: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
    """(B,) for data `x0` and noise `n` (B, ...) at `sigma` () or (B,) > 0; `score` is that of the noisy law.

    Its gradient is that of |s - grad ln p_sigma|^2 / 2. Multiplied by 2 sigma^2 it is |eps - n|^2, DDPM's simple loss.
    """
    level = per_picture(sigma, x0)
    return 0.5 * (score(x0 + level * n) + n / level).square().flatten(1).sum(1)


def implicit_score_matching(score: Score, x: Tensor) -> Tensor:
    """(B,) for data `x` (B, ...), with the exact trace: d derivatives of a row of d values, so for low dimension."""
    s, trace = field_and_trace(score, x, create_graph=True)
    return trace + 0.5 * s.square().flatten(1).sum(1)


def sliced_score_matching(score: Score, x: Tensor, probes: Tensor, reduced: bool = True) -> Tensor:
    """(B,) for data `x` (B, ...) along `probes` (B, P, ...), their mean; one derivative for each probe.

    The probes' law must have E[v v^T] = I: normals or signs, drawn anew at each step. `reduced`: |s|^2 in the place of
    (v^T s)^2, which the authors call variance-reduced: the probes' randomness is out of that term, though not of the
    sum wherever the two terms' would have cancelled.
    """
    s, trace = field_and_trace(score, x, probes, create_graph=True)
    if reduced:
        return trace + 0.5 * s.square().flatten(1).sum(1)
    along = (s.unsqueeze(1) * probes).flatten(2).sum(2)
    return trace + 0.5 * along.square().mean(1)


def denoiser_of(score: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """D = x + sigma^2 s(x, sigma) (Tweedie; Efron 2011): a score of every noise level, as the samplers take it."""
    return lambda x, sigma: x + per_picture(sigma**2, x) * score(x, sigma)


def score_of(denoiser: Denoiser, sigma: Tensor) -> Score:
    """s = (D - x) / sigma^2, the score of the law with noise `sigma` on it, () or (B,) > 0."""
    return lambda x: (denoiser(x, sigma) - x) / per_picture(sigma**2, x)
