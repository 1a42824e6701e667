"""What a U-Net's attention layers look at: read from outside, or changed, while a block of code runs.

A layer attends by its attribute `attends`; inside the block a function stands there that knows the layer. It attends
as before, to the bit, unless it is handed other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.condition import Condition
from ldm.errors import UserError
from ldm.unet.attention import Attend, CrossAttention, SelfAttention
from ldm.unet.unet import Prepared


@dataclass(frozen=True, eq=False)
class Look:
    """One layer in one evaluation of the network."""

    layer: str  # its name in the network
    crosses: bool  # it looks at the context, not at the picture itself
    evaluation: int  # from 0
    t: float  # the network's time, of the first picture
    told: Tensor  # (B, W): a part of what each row is told; `same` compares two
    size: tuple[int, int]  # (h, w) of the features: Q = h w
    weights: Tensor  # (B, H, Q, L), each row of which adds up to 1


See = Callable[[Look], Tensor | None]
"""Other weights (B, H, Q, L) for the layer to attend with; None: as it does."""

Wants = Callable[[bool, int], bool]
"""(whether a layer looks at the context, Q) -> whether it is to be seen; what is not costs nothing."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether rows of a Look's `told` are told the same; those of one batch and another differ by rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 0.02 * b.abs().max())


def part_of(told: Prepared | Condition | Tensor, count: int) -> Tensor:
    """A Look's `told` (B, W) of what a network is told of `count` rows."""
    if isinstance(told, Prepared):
        part = torch.zeros(count, 1) if told.kv is None else told.kv.layers[0][0][:, 0]  # keys of one head
    else:
        part = told if isinstance(told, Tensor) else told.context
    assert part is not None
    return part.flatten(1).float()


class _Evaluation:
    """What the layers of an evaluation have in common."""

    count, t, height, width = -1, 0.0, 0, 0
    told = torch.empty(0)

    def begin(self, unet: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, t, told = inputs[:3]
        self.count, self.t, (self.height, self.width) = self.count + 1, float(t[0]), x.shape[2:]
        self.told = part_of(told, len(x))

    def size(self, queries: int) -> tuple[int, int]:
        """(h, w) of features at one of the levels, each of which halves the one before, rounded up."""
        height, width = self.height, self.width
        while height * width > queries:
            height, width = -(-height // 2), -(-width // 2)
        return height, width


@contextmanager
def looking(unet: nn.Module, see: See, wants: Wants) -> Iterator[None]:
    """Inside, `see` is shown each layer that it `wants`, evaluation by evaluation. Afterwards all is as it was.

    Blocks may be nested. A compiled network runs layer by layer meanwhile. Raises UserError for a network that has no
    such layer.
    """
    layers = {name: each for name, each in unet.named_modules() if isinstance(each, SelfAttention | CrossAttention)}
    if not any(wants(isinstance(layer, CrossAttention), 1) for layer in layers.values()):
        raise UserError("this network has no attention of the kind that is asked for, so there is nothing to see")
    usual = {name: layer.attends for name, layer in layers.items()}
    now = _Evaluation()
    hook = unet.register_forward_pre_hook(now.begin)
    compiled, unet._compiled_call_impl = unet._compiled_call_impl, None  # nobody looks into that
    try:
        for name, layer in layers.items():
            layer.attends = partial(_seen, usual[name], see, wants, now, name, isinstance(layer, CrossAttention))
        yield
    finally:
        hook.remove()
        unet._compiled_call_impl = compiled
        for name, layer in layers.items():
            layer.attends = usual[name]


def looked_at(unet: nn.Module) -> bool:
    """Whether some block of `looking` is about this network now."""
    functions = (getattr(each, "attends", None) for each in unet.modules())
    return any(isinstance(each, partial) and each.func is _seen for each in functions)


def _seen(
    attends: Attend,
    see: See,
    wants: Wants,
    now: _Evaluation,
    name: str,
    crosses: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    queries = q.shape[-2]
    if not wants(crosses, queries):
        return attends(q, k, v, mask)
    scores = q.float() @ (k.float() * q.shape[-1] ** -0.5).transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    look = Look(name, crosses, now.count, now.t, now.told, now.size(queries), scores.softmax(-1))
    weights = see(look)
    return attends(q, k, v, mask) if weights is None else weights.to(v) @ v
