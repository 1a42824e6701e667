"""Linear layers and convolutions whose weights oneDNN reorders once, and not, as torch has it, at every call.

On a CPU the fast kernels read a weight in blocks of an order of their own. Where a layer is large and its input small,
as at the bottom of a U-Net, bringing the weight into that order is most of the time.

A packed layer is the plain one with another forward. Its weight takes the packed form when it is first used for
inference, in the plain one's place, so that it is never held twice; whoever meets the parameter itself then meets one
that is opaque to all but oneDNN (`is_mkldnn`), whose `to_dense()` is the plain one exactly. For all else the layer is
what it was: training mode, gradients, autocast, compilation, state dicts, copies and `.to(...)` meet the plain weight.
"""

from __future__ import annotations

import copy
import platform
import weakref
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.backends.heap import give_back

M = TypeVar("M", bound=nn.Module)
OPS: Any = torch.ops.mkldnn
LEAST = 32_768  # weights; below, what a call of oneDNN costs by itself is more than what is saved
DTYPES = (torch.float32, torch.bfloat16)


def packed(network: M) -> M:
    """`network` with its layers packed, itself; as it is where that does not work here, or is not the faster.

    What it computes stays the same to rounding, and so do the names, shapes and numbers of its parameters. Frozen
    networks in evaluation mode gain; others are run as before. Before an optimizer is made: `plain`.
    """
    for layer in network.modules():
        kind = PACKED.get(type(layer))
        if kind is not None and kind.takes(layer) and available(next(layer.parameters()).dtype):
            layer.__class__ = kind
    return network


def plain(network: M) -> M:
    """The inverse of `packed`, exactly: `network` itself, whose layers are torch's own again."""
    for layer in network.modules():
        if isinstance(layer, _Packed):
            layer.unpack()
        if isinstance(layer, _Packed | DirectAttention):
            layer.__class__ = layer.of  # type: ignore[assignment]
    return network


def dense(weight: Tensor) -> Tensor:
    """A parameter's numbers, whether it is packed or not."""
    return weight.detach().to_dense() if weight.is_mkldnn else weight.detach()


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether oneDNN's layers work here in `dtype`: tried once. Elsewhere than on x86 nothing says that they gain."""
    if platform.machine() not in ("x86_64", "AMD64") or dtype not in DTYPES:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[attr-defined]
        return False
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        try:
            for made, size in ((nn.Linear(64, 512), (2, 64)), (nn.Conv2d(64, 64, 3, padding=1), (2, 64, 4, 4))):
                layer, x = made.to(dtype).eval().requires_grad_(False), torch.randn(size, dtype=dtype)
                wanted = layer(x)
                layer.__class__ = PACKED[type(layer)]  # type: ignore[assignment]
                weight = dense(layer.weight).clone()
                error = (layer(x) - wanted).abs().max() / wanted.abs().max()
                if not error < torch.finfo(dtype).eps ** 0.75 or not torch.equal(dense(layer.weight), weight):
                    return False
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
    return True


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's layers give what is asked: numbers of the weights' precision, now, and no gradient."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
    )


class _Packed(nn.Module):
    """What both kinds share."""

    of: type[nn.Module]
    weight: Any  # a Parameter
    bias: Any  # a Parameter, or None

    @staticmethod
    def takes(layer: Any) -> bool:
        """Whether a layer is one to pack."""
        return layer.weight.numel() >= LEAST

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        """The plain weight as oneDNN wants it for inputs like `x`."""
        raise NotImplementedError

    def order(self, x: Tensor) -> tuple[int, ...]:
        """What that order depends on."""
        return ()

    def pack(self, x: Tensor) -> bool:
        """Whether the layer runs packed on `x`; its weight then is."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]  # what attributes would take longer to find
        assert weight is not None
        if self.training or weight.requires_grad or not fits(x, weight, bias):  # an optimizer may hold it
            self.unpack()
            return False
        order = self.order(x)
        if not weight.is_mkldnn or weight.order != order:  # type: ignore[attr-defined]
            made: Any = getattr(weight, "packed", lambda: None)()  # by another network that had the same weight
            if made is None or made.order != order:
                with torch.inference_mode(False), torch.no_grad():
                    made = self._like(self.reorder(dense(weight).contiguous(), x))
                made.order, weight.packed = order, weakref.ref(made)  # type: ignore[attr-defined]
            self.weight = made
            size = weight.numel() * made.element_size()
            del weight  # the plain one, unless others have it
            give_back(size)
        return True

    def unpack(self) -> None:
        """The plain weight in its place."""
        if self.weight.is_mkldnn:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = self._like(self._plain())

    def _plain(self) -> Tensor:
        order = torch.channels_last if self.weight.ndim == 4 else torch.contiguous_format
        return dense(self.weight).contiguous(memory_format=order)

    def _like(self, weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    # ------------------------------------------------------------ where the plain weight is wanted

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:  # .to, .half, .cuda
        self.unpack()
        return super()._apply(*arguments, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = self._plain()

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:  # for pickle
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": self._like(self._plain())}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy has a plain weight of its own, or the one that stands in `memo`."""
        if self.weight.is_mkldnn:
            memo.setdefault(id(self.weight), self._like(self._plain()))
        made = memo[id(self)] = self.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class PackedLinear(_Packed, nn.Linear):
    """(..., in) -> (..., out)."""

    of = nn.Linear

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        return OPS._reorder_linear_weight(weight, None)

    def forward(self, input: Tensor) -> Tensor:
        if not self.pack(input):
            return super().forward(input)
        own = self._parameters
        return OPS._linear_pointwise(input, own["weight"], own["bias"], "none", [], "")


class PackedConv2d(_Packed, nn.Conv2d):
    """(B, in, h, w) -> (B, out, h', w'), in channels_last.

    The order that is best depends on h and w, and that of one size can be twenty times slower on another: the weight is
    packed anew where they change.
    """

    of = nn.Conv2d

    @staticmethod
    def takes(layer: Any) -> bool:
        return _Packed.takes(layer) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def order(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[2:])

    def reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        how = (self.padding, self.stride, self.dilation, self.groups)
        return OPS._reorder_convolution_weight(weight, *how, [1, *x.shape[1:]])

    def forward(self, input: Tensor) -> Tensor:
        if not self.pack(input):
            return super().forward(input)
        own, x = self._parameters, input.contiguous(memory_format=torch.channels_last)
        how = (self.padding, self.stride, self.dilation, self.groups)
        return OPS._convolution_pointwise(x, own["weight"], own["bias"], *how, "none", [], "")


class DirectAttention(nn.MultiheadAttention):
    """Self-attention as text towers have it, by oneDNN with plain weights: others read them past the layer."""

    of = nn.MultiheadAttention

    @staticmethod
    def takes(layer: Any) -> bool:
        plain = layer.batch_first and layer.bias_k is None and not layer.add_zero_attn
        return plain and layer.in_proj_weight is not None and layer.in_proj_bias is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        weight, bias, out = self.in_proj_weight, self.in_proj_bias, self.out_proj
        added = attn_mask is None or (attn_mask.ndim == 2 and attn_mask.is_floating_point())
        alone = query is key is value and query.ndim == 3 and key_padding_mask is None
        if self.training or not (added and alone and fits(query, weight, bias)) or need_weights or is_causal:
            others = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return super().forward(query, key, value, *others)
        made = OPS._linear_pointwise(query, weight, bias, "none", [], "")
        q, k, v = made.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        return OPS._linear_pointwise(y, out.weight, out.bias, "none", [], ""), None


PACKED: dict[type, type[PackedLinear] | type[PackedConv2d] | type[DirectAttention]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    nn.MultiheadAttention: DirectAttention,
}
