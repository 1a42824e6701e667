"""What a network is taught that is to draw in fewer steps: targets made of a teacher's, on its probability flow.

In the coordinates of this folder, x = x0 + sigma n, a step of DDIM from level s to r is one line,

    x_r = D + (r / s) (x_s - D),

so the x0 that a student would have to say to reach some x_r in a single step is the same line read backwards. This is
progressive distillation's target (Salimans and Ho 2022, algorithm 2), whose alphas and sigmas all drop out of it.

A consistency function f(x, s) is the end at sigma 0 of the flow through x (Song et al. 2023). It is a denoiser too, of
another meaning, and f(x, 0) = x holds by itself in each parameterization in which D(x, 0) = x: all but x0. So no
c_skip and c_out of their own are needed, which make a function of sigma_min do what is true here of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import per_picture

Advance = Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]
"""(denoiser, x (B, C, h, w), s (B,), r (B,) with s > r >= 0) -> x at r on the flow through x at s."""


def ddim_step(denoiser: Denoiser, x: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """Euler's step of the flow, which is DDIM's: exact where D does not depend on sigma along it. Order 1."""
    d = denoiser(x, s)
    return d + per_picture(r / s, x) * (x - d)


def heun_step(denoiser: Denoiser, x: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """Heun's step (Karras et al. 2022, algorithm 1), Euler's where r is 0. Order 2, two evaluations."""
    slope = (x - denoiser(x, s)) / per_picture(s, x)
    ahead = x + per_picture(r - s, x) * slope
    low = r.clamp(min=torch.finfo(torch.float32).tiny)  # where r is 0 the second slope is not used
    second = (ahead - denoiser(ahead, low)) / per_picture(low, x)
    both = x + per_picture(r - s, x) * (slope + second) / 2
    return torch.where(per_picture(r, x) > 0, both, ahead)


def merged(teacher: Denoiser, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """The x0 (B, C, h, w) with which one step of DDIM from the first of `levels` to the last ends where the teacher's
    steps from each to the next do: two of them are halved.

    x (B, C, h, w) at levels[0] (B,); they decrease, and the last may be 0. Then the target is the teacher's own last
    word exactly, without a difference of nearly equal numbers; of a single step it is the teacher's word.
    """
    end = x
    for s, r in pairwise(levels):
        end = ddim_step(teacher, end, s, r)
    ratio = per_picture(levels[-1] / levels[0], x)
    return (end - ratio * x) / (1 - ratio)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(|e|^2 + c^2) - c (B,) over the whole picture, e (B, ...) (Song and Dhariwal 2023, equation 10)."""
    return (error.square().flatten(1).sum(1) + c**2).sqrt() - c


def huber_width(values: int) -> float:
    """c of `pseudo_huber` for pictures of so many values: 0.00054 sqrt(d) (Song and Dhariwal 2023, section 3.3)."""
    return 0.00054 * math.sqrt(values)


def improved_levels(progress: float, first: int = 10, last: int = 1280) -> int:
    """How many steps the flow is cut into at `progress` in [0, 1] of a consistency training.

    It is doubled at equal distances from `first` to `last` (Song and Dhariwal 2023, equation 11).
    """
    doublings = math.floor(math.log2(last / first))
    return min(first * 2 ** math.floor(progress * (doublings + 1)), last)


def improved_index(uniform: Tensor, sigmas: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Which step of the decreasing grid `sigmas` (N + 1,) each sample trains: (B,) long, of uniform numbers (B,).

    Step i, from sigmas[i] to sigmas[i + 1], has the weight of a normal law of ln sigma between the two (Song and
    Dhariwal 2023, equation 10 and table 1).
    """
    below = torch.special.ndtr((sigmas.log() - mean) / std)  # of sigma 0 it is 0
    share = (below[:-1] - below[1:]).clamp(min=0)
    cumulated = share.cumsum(0) / share.sum()
    return torch.searchsorted(cumulated, uniform.to(sigmas)).clamp(max=len(share) - 1)
