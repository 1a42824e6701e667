"""Faster pictures that are not the same ones: Network -> Network, and nothing of the U-Net changes between evaluations.

    Merge   Token merging for Stable Diffusion (Bolya & Hoffman 2023): self-attention on fewer tokens, at the finest
            level that attends. In each cell of 2 x 2 one token is a target; of the others, those that are most like a
            target of any cell are averaged into it, and what comes out of the layer is copied back to all of them.
    Reuse   DeepCache (Ma et al. 2023): most evaluations run the U-Net's shallow ends alone, between which stands what
            the depths gave in the last whole evaluation.

What is counted or kept belongs to what the network is told, which is prepared once for a trajectory (or for a piece of
its batch), so trajectories do not meet and a picture comes out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.denoiser import Network
from ldm.errors import UserError
from ldm.jobs.plan import Merge, Reuse
from ldm.unet.attention import SelfAttention
from ldm.unet.looking import looked_at
from ldm.unet.unet import Level, UNet, level_depths


def shortened(unet: nn.Module, shortcuts: Sequence[Merge | Reuse]) -> Network:
    """`unet` with the shortcuts. Raises UserError for a network that has no place for them."""
    if not isinstance(unet, UNet):
        raise UserError("this model's network is not a plain U-Net, so merge_tokens and reuse have no place in it")
    if unet._compiled_call_impl is not None or "forward" in vars(unet):
        raise UserError("merge_tokens and reuse do not go with the backends compile, graph and openvino; choose auto")
    if looked_at(unet):
        raise UserError("attention is looked at or edited, so each layer has to run; leave out merge_tokens and reuse")
    network: Network = unet
    for each in shortcuts:
        kind = Merging if isinstance(each, Merge) else Reusing
        network = kind(unet, network, each)  # type: ignore[arg-type]
    return network


class Merging:
    """`network`, with tokens merged in `unet`, which runs inside it."""

    def __init__(self, unet: UNet, network: Network, how: Merge) -> None:
        depths = level_depths(unet.config)
        if not depths:
            raise UserError("this network has no self-attention above its middle, so there are no tokens to merge")
        self.network, self.share, self.level, self.prepare = network, how.share, min(depths), network.prepare
        self.layers = [each for each in unet.modules() if isinstance(each, SelfAttention)]
        self.evaluations: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def __call__(self, x: Tensor, t: Tensor, told: Any) -> Tensor:
        number = self.evaluations[told] = self.evaluations.get(told, -1) + 1
        height, width = (-(-side // 2**self.level) for side in x.shape[2:])
        targets, others = (places.to(x.device) for places in cells(height, width, number))
        places: dict[nn.Module, Tensor] = {}

        def merge(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            if inputs[0].shape[1] != height * width or not len(targets):
                return None
            merged, places[layer] = merged_tokens(inputs[0], targets, others, self.share)
            return (merged,)

        def spread(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return taken(output, places.pop(layer)) if layer in places else output

        hooks = [layer.register_forward_pre_hook(merge) for layer in self.layers]
        hooks += [layer.register_forward_hook(spread) for layer in self.layers]
        try:
            return self.network(x, t, told)
        finally:
            for hook in hooks:
                hook.remove()


def cells(height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """The places (h w / 4,) of one token of each 2 x 2 cell, drawn by `seed`, and of the others, on the CPU."""
    rows, columns = height // 2, width // 2
    drawn = torch.randint(4, (rows, columns), generator=torch.Generator().manual_seed(seed))
    whole = F.one_hot(drawn, 4).view(rows, columns, 2, 2).transpose(1, 2).reshape(2 * rows, 2 * columns)
    chosen = F.pad(whole, (0, width - 2 * columns, 0, height - 2 * rows)).flatten()
    return (chosen == 1).nonzero()[:, 0], (chosen == 0).nonzero()[:, 0]


def merged_tokens(x: Tensor, to: Tensor, others: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """x (B, Q, W) -> (B, Q - r, W), r = `share` Q at most, and where in it each of the Q tokens went (B, Q).

    `to` are the places of the targets among the Q, `others` the rest.
    """
    unit = F.normalize(x.float(), dim=-1)
    likeness, nearest = (unit[:, others] @ unit[:, to].transpose(1, 2)).max(-1)
    order, count = likeness.argsort(dim=-1, descending=True, stable=True), min(len(others), int(share * x.shape[1]))
    gone, stay = order[:, :count], order[:, count:]
    nearest = nearest.gather(1, gone)
    source = x[:, others]
    average = x[:, to].scatter_reduce(1, _wide(nearest, x), taken(source, gone), "mean", include_self=True)
    place = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
    alone = stay.shape[1]
    place[:, to] = alone + torch.arange(len(to), device=x.device)
    place.scatter_(1, others[stay], torch.arange(alone, device=x.device).expand_as(stay))
    place.scatter_(1, others[gone], alone + nearest)
    return torch.cat([taken(source, stay), average], dim=1), place


def taken(x: Tensor, places: Tensor) -> Tensor:
    """x (B, L, W), places (B, Q) -> (B, Q, W)."""
    return x.gather(1, _wide(places, x))


def _wide(places: Tensor, x: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, x.shape[-1])


class Reusing:
    """`network`, whose `unet` rests below its first stages but for each `every`-th evaluation.

    What was kept is old where something else was evaluated twice meanwhile, as inside a guidance interval: that is left
    out. Once is a piece of the batch, or a branch looked at alone.
    """

    def __init__(self, unet: UNet, network: Network, how: Reuse) -> None:
        down, up = modules_of(unet.down), modules_of(unet.up)
        if how.branch > len(down):
            raise UserError(f"reuse_branch is {how.branch}; this U-Net has {len(down)} stages on its way down")
        self.network, self.every, self.prepare = network, how.every, network.prepare
        stages = [place for place, module in enumerate(up) if module not in [level.resample for level in unet.up]]
        first = stages[-1 - how.branch]  # the stage that takes the deepest skip which still is made
        self.resting = [*down[how.branch :], *unet.middle, *up[:first]]
        self.kept: WeakKeyDictionary[Any, tuple[int, Tensor]] = WeakKeyDictionary()
        self.since: WeakKeyDictionary[Any, WeakSet[Any]] = WeakKeyDictionary()  # what else was evaluated, once

    def __call__(self, x: Tensor, t: Tensor, told: Any) -> Tensor:
        for other in [each for each in self.since if each is not told]:
            if told in self.since[other]:
                del self.since[other], self.kept[other]
            else:
                self.since[other].add(told)
        self.since[told] = WeakSet()
        number, features = self.kept.get(told, (0, None))
        if features is not None and number % self.every:
            with standing_in(self.resting, features):
                found = self.network(x, t, told)
        else:
            seen: list[Tensor] = []
            hook = self.resting[-1].register_forward_hook(lambda module, given, out: seen.append(out.detach()))
            try:
                found = self.network(x, t, told)
            finally:
                hook.remove()
            (features,) = seen
        self.kept[told] = number + 1, features
        return found


def modules_of(levels: nn.ModuleList) -> list[nn.Module]:
    """Each stage and change of size, in the order they run in."""
    found: list[nn.Module] = []
    for level in levels:
        assert isinstance(level, Level)
        found += [*level.stages, *([level.resample] if level.resample is not None else [])]
    return found


@contextmanager
def standing_in(modules: Sequence[nn.Module], last: Tensor) -> Iterator[None]:
    """Inside, `modules` hand on what they are given, of no matter what size, and the last of them gives `last`."""
    hand_on: Callable[..., Tensor] = lambda x, *others: x  # noqa: E731
    try:
        for module in modules:
            module.forward = hand_on
        modules[-1].forward = lambda *given: last
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
