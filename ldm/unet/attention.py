"""Attention: one function over two backends, and the two modules that use it.

Shapes are written with these letters:
    B batch    H heads    Q queries    L keys and values    D width of a head    W = H * D, width of the features
    C width of the context

How a layer attends is its attribute `attends`, an `Attend`: whoever wants to see the weights, or other ones, puts a
function of its own there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q (B, H, Q, D), k and v (B, H, L, D), mask (B, L) or None) -> (B, H, Q, D)."""

PLAIN_KEYS = 256  # on a CPU, up to so many keys, softmax and two matrix products beat SDPA's fused kernel


@functools.cache
def available_backends() -> tuple[str, ...]:
    """The backends that work here: "sdpa" (torch's own) always, "xformers" where it is installed beside a CUDA device.

    xformers is not imported to find out: on a CPU it imports with a warning and supports no operator.
    """
    found = torch.cuda.is_available() and importlib.util.find_spec("xformers") is not None
    return ("sdpa", "xformers") if found else ("sdpa",)


def check_backend(backend: str, device: str = "cuda") -> None:
    """Raise UserError if `backend` does not work on this machine, or not on this type of device."""
    if backend not in available_backends() or (backend == "xformers" and device != "cuda"):
        raise UserError(
            f"attention backend '{backend}' is not available here ({', '.join(available_backends())} is); "
            "xformers needs a CUDA device and pip install -e '.[xformers]'"
        )


def attend_by(backend: str, width: int, dtype: torch.dtype) -> Attend:
    """`attention` by a backend that is there. Raises UserError if it takes no heads of this width and dtype.

    Of float32 it is not asked: a training's weights are, and autocast may run them in another.
    """
    if backend == "xformers" and dtype != torch.float32 and torch.cuda.is_available():
        tried = torch.zeros(1, 1, 8, width, dtype=dtype, device="cuda")
        attention(tried, tried, tried, backend=backend)
    return functools.partial(attention, backend=backend)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(D)) v, without dropout; where the mask (B, L) is False a key is not looked at.

    q is (B, H, Q, D), k and v are (B, H, L, D); gives (B, H, Q, D). Raises UserError for a backend that is not there,
    and for a D that it does not take.
    """
    if mask is not None:  # rare, and the same on each backend: contexts of different lengths in one batch
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    if backend == "sdpa":
        if q.device.type == "cpu" and k.shape[-2] <= PLAIN_KEYS:
            # Measured at 64 keys, forward and backward: 1.4 times faster in float32 and 4.4 times in bfloat16.
            return (q @ (k * q.shape[-1] ** -0.5).transpose(-1, -2)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v)
    check_backend(backend)
    operators = importlib.import_module("xformers.ops")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # its order is (B, Q, H, D)
    try:
        return operators.memory_efficient_attention(q, k, v).transpose(1, 2)
    except NotImplementedError as error:  # none of its operators
        raise UserError(
            f"xformers has no attention for heads {q.shape[-1]} wide in {str(q.dtype).removeprefix('torch.')} on this "
            "GPU; choose the attention sdpa"
        ) from error


@dataclass(frozen=True)
class ContextKV:
    """Keys and values (B, H, L, D) of the context for each cross-attention layer, in the order of the layers.

    They depend on the context alone, so a sampler computes them once for a trajectory (`UNet.project_context`).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor | None = None  # (B, L) bool: the places that are looked at; None: all

    def __getitem__(self, rows: slice) -> ContextKV:
        """The same for some rows of the batch: `kv[:2]`."""
        mask = None if self.mask is None else self.mask[rows]
        return ContextKV(tuple((k[rows], v[rows]) for k, v in self.layers), mask)


class _Attention(nn.Module):
    """What self- and cross-attention share: four projections, of which query, key and value have no bias."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attends: Attend = attention
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(context_width, width, bias=False)
        self.value = nn.Linear(context_width, width, bias=False)
        self.out = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b h l d", h=self.heads)

    def _attend(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.attends(self._split(self.query(x)), k, v, mask)
        return self.out(rearrange(y, "b h q d -> b q (h d)"))


class SelfAttention(_Attention):
    """(B, Q, W) -> (B, Q, W), each position looking at all."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, self._split(self.key(x)), self._split(self.value(x)))


class CrossAttention(_Attention):
    """(B, Q, W) -> (B, Q, W), each position looking at the context."""

    layer: int = 0  # its place in ContextKV; the network that owns it counts

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, L, C) -> keys and values (B, H, L, D)."""
        return self._split(self.key(context)), self._split(self.value(context))

    def forward(self, x: Tensor, context: ContextKV) -> Tensor:
        return self._attend(x, *context.layers[self.layer], context.mask)
