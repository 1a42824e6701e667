"""DPM-Solver with steps of its own size ("DPM adaptive"; Lu et al. 2022, appendix C), controlled as in k-diffusion.

Time is -log sigma and eps = (x - D) / sigma. Along the flow, from s = sigma to r at h = log(s / r),

    x(r) = x(s) + integral_s^r eps dsigma.

A step of order p evaluates eps at its beginning, at h / p, and for p = 3 at 2 h / 3. The result of order p - 1, which
costs nothing more, says how far off that of order p may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.sampling.step import Noise, Sampler, Step, level, trajectory

NEAR = 1e-5  # of two times that are one
SHORTEST = 1e-8  # of steps in log sigma


def dpm_adaptive(
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
) -> Sampler:
    """DPM-Solver-12 or -23, by `order` 2 or 3, each picture with steps of its own.

    The grid's ends alone say where it goes. At the levels between it is looked at: the state there is what the step
    that passes them continues, costs no evaluation and changes nothing. So a picture is the same whatever the number
    of steps, a strength begins where it does for other samplers, and the cost, `order` evaluations an attempt, depends
    on the picture; a batch is evaluated until its slowest picture is there. A step to 0 is Euler's.

    `rtol`, `atol`: the error allowed in one step, relative and absolute, root mean square over a picture in x.
    `h_init`: the first step tried, in log sigma; `pcoeff`, `icoeff`, `dcoeff`: of the controller that chooses the next;
    `accept_safety`: a step is taken unless the next one should be shorter than that share of it.

    Raises UserError for options that make no sense, and where the solver cannot go on.
    """
    if order not in (2, 3):
        raise UserError(f"the order of dpm_adaptive is {order}; choose 2 or 3")
    for name, value in (("rtol", rtol), ("atol", atol), ("h_init", h_init)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} of dpm_adaptive is {value:g}; choose a small positive number, such as 0.01")
    for name, value in (("pcoeff", pcoeff), ("icoeff", icoeff), ("dcoeff", dcoeff)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} of dpm_adaptive is {value:g}; choose 0 to 1")
    if not 0 < accept_safety <= 1:
        raise UserError(f"accept_safety of dpm_adaptive is {accept_safety:g}; choose it above 0 and at most 1")
    powers = (pcoeff + icoeff + dcoeff) / order, -(pcoeff + 2 * dcoeff) / order, dcoeff / order

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        times = [-math.log(each) for each in map(float, sigmas) if each > 0]
        pictures = [_Picture(time, h_init) for time in times[:1] for _ in x]
        looks: Iterator[tuple[Tensor, Tensor]] | None = None

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            nonlocal looks
            if sigma_next == 0:
                x0 = denoiser(x, level(sigma))
                return x0, x0
            looks = looks or _looks(denoiser, x, times[1:], pictures, order, (rtol, atol), powers, accept_safety)
            return next(looks)

        return trajectory(x, sigmas, advance)

    return sample


@dataclass
class _Picture:
    """Where one is, and its controller: of Gustafsson's kind, PID in the logarithm of the error."""

    time: float
    h: float  # the next step
    errors: list[float] = field(default_factory=list)  # inverse: of this attempt, and of the last two that were taken

    def takes(self, error: float, powers: Sequence[float], safety: float) -> bool:
        """Whether a step of that error is taken; `h` becomes what is tried next."""
        now = 1 / (min(error, 1e99) + 1e-8)  # of an infinite one 0 has no negative power
        self.errors = [now, *(self.errors[1:] or [now, now])]
        factor = 1 + math.atan(math.prod(e**power for e, power in zip(self.errors, powers, strict=True)) - 1)
        self.h *= factor
        if not self.h > SHORTEST:  # or the error is not a number
            raise UserError(
                f"dpm_adaptive cannot go on at sigma {math.exp(-self.time):g}; choose larger tolerances, or another "
                "sampler if it is the model's prediction that is not finite"
            )
        if factor >= safety:
            self.errors = [now, now, self.errors[1]]
        return factor >= safety


@dataclass(frozen=True, eq=False)
class _Stretch:
    """From `x` at `sigma` (B,) on, by eps there and how it has changed at `node`, in log sigma from here."""

    x: Tensor
    sigma: Tensor
    eps: Tensor
    change: Tensor | None = None
    node: Tensor | None = None

    def to(self, h: Tensor, linear: bool = True) -> Tensor:
        """The state after `h` (B,): eps continued linearly in log sigma, or (DPM-Solver-2's rule) as at h / 2."""
        s, r = (per_picture(each, self.x) for each in (self.sigma, self.sigma * (-h).exp()))
        moved = self.x + (r - s) * self.eps
        if self.change is None or self.node is None:
            return moved
        span, node = per_picture(h, self.x), per_picture(self.node, self.x)
        weight = (r - s + r * span) / node if linear else (r - s) * span / (2 * node)
        return moved + weight * self.change


def _looks(
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    pictures: Sequence[_Picture],
    order: int,
    tolerance: tuple[float, float],
    powers: Sequence[float],
    safety: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(state, x0) at each of `times`, as soon as all pictures have passed it."""
    (rtol, atol), before, seen = tolerance, x, [[time, x, x] for time in times]
    while seen:
        began = [picture.time for picture in pictures]
        # One that has arrived takes no step; something, not 0, keeps what is made of it finite.
        spans = [max(min(each.h, times[-1] - each.time), 1e-12) for each in pictures]
        begin, h = (torch.tensor(values, dtype=x.dtype, device=x.device) for values in (began, spans))
        stretch, x0, lower = _attempt(denoiser, x, (-begin).exp(), h, order)
        higher = stretch.to(h, order == 3)
        allowed = (rtol * torch.maximum(lower.abs(), before.abs())).clamp(min=atol)
        errors = ((lower - higher) / allowed).flatten(1).square().mean(1).sqrt().tolist()
        taken = [
            picture.time < times[-1] - NEAR and picture.takes(error, powers, safety)
            for picture, error in zip(pictures, errors, strict=True)
        ]
        for picture, span, takes in zip(pictures, spans, taken, strict=True):
            picture.time += span if takes else 0.0
        for look in seen:
            passes = [a < look[0] - NEAR <= picture.time for a, picture in zip(began, pictures, strict=True)]
            if any(passes):
                state = stretch.to(look[0] - begin, order == 3)
                look[1:] = (_chosen(passes, new, old) for new, old in zip((state, x0), look[1:], strict=True))
        x, before = _chosen(taken, higher, x), _chosen(taken, lower, before)
        while seen and seen[0][0] - NEAR <= min(picture.time for picture in pictures):
            _, state, x0 = seen.pop(0)
            yield state, x0


def _attempt(denoiser: Denoiser, x: Tensor, sigma: Tensor, h: Tensor, order: int) -> tuple[_Stretch, Tensor, Tensor]:
    """A step of `h` (B,) from `x` at `sigma` (B,): what carries it, the first x0, and the state of one order less."""

    def eps(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x0 = denoiser(x, sigma)
        return (x - x0) / per_picture(sigma, x), x0

    (first, x0), part = eps(x, sigma), h / order
    begun = _Stretch(x, sigma, first)
    second, _ = eps(begun.to(part), sigma * (-part).exp())
    once = _Stretch(x, sigma, first, second - first, part)
    if order == 2:
        return once, x0, begun.to(h)
    third, _ = eps(once.to(2 * part), sigma * (-2 * part).exp())
    return _Stretch(x, sigma, first, third - first, 2 * part), x0, once.to(h, linear=False)


def _chosen(rows: Sequence[bool], yes: Tensor, no: Tensor) -> Tensor:
    where = torch.tensor(rows, device=yes.device).view(-1, *[1] * (yes.ndim - 1))
    return torch.where(where, yes, no)
