"""An energy E(x): p(x) = exp(-E(x)) / Z, with Z unknown and not needed.

Its score is -grad E, so whatever takes a score takes an energy. By likelihood it is learned from

    grad_theta E_data[-ln p] = E_data[grad_theta E] - E_model[grad_theta E]

where the model's draws are the states of Langevin chains (the notes' form; Neal 2011, section 5.2),

    x <- x + h s(x) + sqrt(2 h) n,

which go on from step to step of the training instead of starting anew (Tieleman 2008, "persistent"). A chain is not
the model's law exactly: on N(0, 1) its own stationary variance is 1 / (1 - h / 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.plane.score_matching import Score

Energy = Callable[[Tensor], Tensor]
"""x (B, ...) -> E (B,), each row of its own row alone."""


def energy_score(energy: Energy) -> Score:
    """s(x) = -grad E(x). Works under `torch.no_grad()`; otherwise its result can be differentiated once more."""

    def score(x: Tensor) -> Tensor:
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x if further and x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(point).sum(), point, create_graph=further)
        return -slope

    return score


def likelihood_loss(energy: Energy, data: Tensor, model: Tensor) -> Tensor:
    """The scalar mean E(data) - mean E(model), whose gradient by E's parameters is that of -ln p, for `data` (B, ...).

    `model` (any count, ...) are draws of the model, taken as constants. The value itself is no likelihood.
    """
    return energy(data).mean() - energy(model.detach()).mean()


def langevin(score: Score, x: Tensor, step: float, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`x` (B, ...) after `count` steps of unadjusted Langevin dynamics of size `step` (h above); `x` is not changed.

    Noise comes from `generator`, on the CPU, for the whole batch. Raises UserError for a step that is not positive.
    """
    if not step > 0:
        raise UserError(f"the Langevin step is {step:g}; it must be more than 0")
    with torch.no_grad():
        for _ in range(count):
            n = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            x = x + step * score(x) + math.sqrt(2 * step) * n
    return x


class Chains:
    """Persistent Langevin chains, the negative phase of the likelihood's gradient.

    `state` (N, ...) is where they are. With `renewal`, each chain is put to a new start with that probability at every
    call, as a modest guard against chains that are stuck (Du & Mordatch 2019 renew 5 %).
    """

    def __init__(self, start: Tensor, step: float, seed: int = 0, renewal: float = 0.0) -> None:
        """`start` (N, ...): where chains begin, and where renewed ones begin again, a row of it chosen at random."""
        if not 0 <= renewal < 1:
            raise UserError(f"the renewal of chains is {renewal:g}; choose from 0 up to, not including, 1")
        self.state = start.clone()
        self._start, self._step, self._renewal = start.clone(), step, renewal
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def advance(self, score: Score, count: int) -> Tensor:
        """Walk `count` steps by `score`, now the model's; returns the new state (N, ...)."""
        if self._renewal:
            N = len(self.state)
            anew = torch.rand(N, generator=self._generator) < self._renewal
            rows = torch.randint(N, (N,), generator=self._generator)
            mask = anew.to(self.state.device).reshape(N, *(1,) * (self.state.ndim - 1))
            self.state = torch.where(mask, self._start[rows.to(self.state.device)], self.state)
        self.state = langevin(score, self.state, self._step, count, self._generator)
        return self.state
