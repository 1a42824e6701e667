"""What makes a training step on a CPU faster: linear layers by oneDNN in float32.

torch leaves a linear layer's three products, one forward and two backward, to MKL, which on other processors than
Intel's reaches half of what they can do: measured 100 GFLOP/s beside oneDNN's 240 (AMD, AVX-512, one thread). What a
layer computes stays the same to rounding, and its parameters stay what they are; under autocast, in other precisions,
on other devices and compiled it is torch's own layer.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.backends import packed

M = TypeVar("M", bound=nn.Module)


def trained(network: M) -> M:
    """`network` itself, as it is to be trained here: of its layers those that gain have oneDNN's products."""
    for layer in network.modules():
        if type(layer) is nn.Linear and layer.weight.numel() >= packed.LEAST and packed.available(torch.float32):
            layer.__class__ = TrainedLinear
    return network


class TrainedLinear(nn.Linear):
    """(..., in) -> (..., out)."""

    def forward(self, input: Tensor) -> Tensor:
        given = (input, self.weight)
        if (
            torch.compiler.is_compiling()
            or any(value.device.type != "cpu" or value.dtype != torch.float32 for value in given)
            or torch.is_autocast_enabled("cpu")
            or not input.numel()
        ):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """y = x w^T + b: dx = dy w, dw = dy^T x, db = the rows of dy added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return _product(x, w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        asked_x, asked_w, asked_b = ctx.needs_input_grad
        product = torch.nn.functional.linear if torch.is_grad_enabled() else _product  # to be differentiated once more
        rows = dy.reshape(-1, len(w)).contiguous()
        return (
            product(rows, w.t()).view_as(x) if asked_x else None,
            product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if asked_w else None,
            rows.sum(0) if asked_b else None,
        )


def _product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return packed.OPS._linear_pointwise(x, w, b, "none", [], "")
