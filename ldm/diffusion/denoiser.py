"""The one type between the network and the sampler; binding.py makes it of a network.

    Denoiser: (x, sigma) -> x0        x (B, C, h, w) = x0 + sigma n,  sigma () or (B,)

A network's law (law.py) says what it is given and what its output means. The network runs in float32 or whatever
precision it has inside; x may be float64, and D is in x's dtype. A network with a learned variance has twice as many
channels; D is made of the first half, and only learned_variance.py looks at the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ldm.conditioning.condition import Condition

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), sigma () or (B,)) -> the expected x0 (B, C, h, w)."""


class Network(Protocol):
    """What is trained, and whatever stands in its place: compiled, prepared, captured in a graph."""

    def prepare(self, told: Condition) -> Any:
        """What of the conditions does not depend on x and t, as keys and values: made once for a trajectory."""
        ...

    def __call__(self, x: Tensor, t: Tensor, told: Any) -> Tensor:
        """x_in (B, C, h, w) float32, t (B,) float32, what `prepare` made for B pictures -> F (B, C or 2 C, h, w)."""
        ...


Outputs = Callable[[Tensor, Tensor, int], Tensor]
"""(x (B, C, h, w), sigma () or (B,), k) -> what the network puts out for the first k conditions (k, B, ...)."""


class Branches(Protocol):
    """A network bound to K conditions: index 0 the prompt's, 1 the unconditional or negative one, then any more."""

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        """(B, C, h, w), () or (B,) -> (K, B, C, h, w): each one's x0. `count` evaluates only the first `count`."""
        ...
