"""Training a LoRA: the U-Net stays frozen and each chosen layer's output gains (alpha / r) up(down(x)).

The factors live beside the network, not in it: what is trained, averaged and saved is theirs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.changes import Factors
from ldm.adapters.lora import Lora, Rows
from ldm.errors import UserError
from ldm.mmdit.blocks import Projections
from ldm.networks import AnyNetwork
from ldm.unet.attention import CrossAttention, SelfAttention

LAYERS = ("attention", "transformer", "all")


class LowRank(nn.Module):
    """x -> (alpha / r) up(down(x)) beside a linear layer or convolution. up begins at zero: no change at first."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        out, *rest = layer.weight.shape
        self.scale = alpha / rank
        self.stride = layer.stride if isinstance(layer, nn.Conv2d) else None
        self.padding = layer.padding if isinstance(layer, nn.Conv2d) else None
        device = layer.weight.device
        self.down = nn.Parameter(torch.empty(rank, *rest, device=device))
        self.up = nn.Parameter(torch.zeros(out, rank, *(1 for _ in rest[1:]), device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as peft's and kohya's

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.down.dtype)
        if self.stride is None or self.padding is None:
            return self.scale * F.linear(F.linear(x, self.down), self.up)
        return self.scale * F.conv2d(F.conv2d(x, self.down, None, self.stride, self.padding), self.up)


class AdaptedUNet(nn.Module):
    """`unet` with low-rank changes to train. Its parameters are the changes'; the U-Net keeps its own, frozen.

    Whoever calls `unet` meanwhile meets the changes too. Raises UserError for an unknown choice of layers or a rank
    below 1.
    """

    def __init__(self, unet: AnyNetwork, rank: int, alpha: float, layers: str):
        super().__init__()
        if layers not in LAYERS:
            raise UserError(f"lora.layers is '{layers}'; choose one of {', '.join(LAYERS)}")
        if rank < 1 or not 0 < alpha < math.inf:
            raise UserError(f"lora.rank is {rank} and lora.alpha {alpha:g}; choose both positive")
        unet.requires_grad_(False)
        self._unet = [unet]  # in a list: not a submodule, so its weights are in no state dict and under no optimizer
        self.names: list[str] = []
        self.changes = nn.ModuleList()
        for name, layer in _chosen(unet, layers):
            change = LowRank(layer, rank, alpha)
            layer.register_forward_hook(_adding(change))
            self.names.append(name)
            self.changes.append(change)
        if not self.names:
            raise UserError(f"this U-Net has no layers of the kind lora.layers={layers}; choose all")
        self.alpha = alpha

    def forward(self, *inputs: Any) -> Tensor:
        """What the U-Net gives."""
        return self._unet[0](*inputs)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode, of the U-Net too."""
        self._unet[0].train(mode)
        return super().train(mode)

    def lora(self) -> Lora:
        """The changes as they are now, ready to be saved or merged elsewhere."""
        changes = {}
        for name, change in zip(self.names, self.changes, strict=True):
            assert isinstance(change, LowRank)
            factors = Factors(change.down.detach().float(), change.up.detach().float(), self.alpha)
            changes[Rows(f"{name}.weight")] = factors
        return Lora({"unet": changes}, "the LoRA in training")


def _adding(change: LowRank) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + change(inputs[0]).to(output.dtype)

    return hook


def _chosen(unet: AnyNetwork, layers: str) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """attention: the projections of each attention; transformer: all in the spatial transformers; all: all."""
    kinds = SelfAttention | CrossAttention | Projections
    attentions = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        in_attention = name.rpartition(".")[0] in attentions
        in_transformer = ".transformer." in name or name.startswith("blocks.")
        if layers == "all" or in_attention or (layers == "transformer" and in_transformer):
            yield name, module
