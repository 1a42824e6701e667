from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.unet import attention as room
from ldm.unet.attention import CrossAttention, attention, available_backends

from .small import inputs, relative, small_unet


@pytest.mark.parametrize("keys", [1, 7, room.PLAIN_KEYS, room.PLAIN_KEYS + 1])
def test_attention_is_the_formula(keys: int):
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, 6)
    weights = torch.einsum("bhqd,bhld->bhql", q, k).div(2.0).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bhql,bhld->bhqd", weights, v))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_plain_formula_equals_sdpa(dtype: torch.dtype, tolerance: float):
    q, k, v = torch.randn(3, 2, 4, 64, 32, dtype=dtype)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative(attention(q, k, v).double(), exact) < tolerance


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 2, 4), 1e4)
    assert attention(q, q, torch.ones_like(q)).eq(1).all()


def test_no_backend_is_imported_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    available_backends.cache_clear()
    try:
        assert available_backends() == ("sdpa",)
        q = torch.randn(1, 1, 2, 4)
        with pytest.raises(UserError, match="needs a CUDA device"):
            attention(q, q, q, backend="xformers")
        with pytest.raises(UserError, match="'flash' is not available here"):
            small_unet().set_attention_backend("flash")
    finally:
        available_backends.cache_clear()
    assert "xformers" not in sys.modules


def test_the_backend_of_a_network_is_set_in_every_layer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "available_backends", lambda: ("sdpa", "xformers"))
    unet = small_unet()
    unet.set_attention_backend("xformers")
    backends = [module.attends.keywords["backend"] for module in unet.modules() if hasattr(module, "attends")]
    assert backends == ["xformers"] * 8


def test_heads_that_xformers_does_not_take_are_refused_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch):
    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] == 16:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n`fa2F` is not ...")
        return q

    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    operators = types.ModuleType("xformers.ops")
    operators.memory_efficient_attention = refuses  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    monkeypatch.setattr(room, "available_backends", lambda: ("sdpa", "xformers"))
    unet = small_unet()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **given: zeros(*shape, **given))
    unet.set_attention_backend("xformers")  # in float32, as a training's: by autocast it may run in another
    with pytest.raises(UserError, match="heads 16 wide in float32"), torch.no_grad():
        unet(*inputs())
    unet.to(torch.bfloat16)
    with pytest.raises(UserError, match="heads 16 wide in bfloat16 on this GPU; choose the attention sdpa"):
        unet.set_attention_backend("xformers")
    assert room.attend_by("xformers", 17, torch.bfloat16).keywords["backend"] == "xformers"  # type: ignore[attr-defined]


def test_how_a_layer_attends_can_be_replaced():
    unet, (x, t, context) = small_unet(), inputs()
    usual = unet(x, t, context)
    layers = [module for module in unet.modules() if isinstance(module, CrossAttention)]
    seen: list[tuple[torch.Size, torch.Size]] = []

    def blind(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((q.shape, k.shape))
        return torch.zeros_like(q)

    for layer in layers:
        layer.attends = blind
    unet(x, t, context)
    torch.testing.assert_close(unet(x, t, 2 * context), unet(x, t, context), rtol=0, atol=0)  # the context is unread
    assert set(seen) == {(torch.Size((2, 4, 16, 16)), torch.Size((2, 4, 5, 16)))}
    for layer in layers:
        layer.attends = attention
    torch.testing.assert_close(unet(x, t, context), usual, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "width"), [(4096, 77, 40), (256, 256, 64), (64, 64, 160)])
def test_xformers_equals_sdpa(dtype: torch.dtype, queries: int, keys: int, width: int):
    pytest.importorskip("xformers")
    q = torch.randn(2, 8, queries, width, device="cuda")
    k, v = torch.randn(2, 2, 8, keys, width, device="cuda")
    exact = attention(q, k, v)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    ours, theirs = attention(q, k, v), attention(q, k, v, backend="xformers")
    tolerance = 1e-3 if dtype == torch.float16 else 8e-3  # a unit in the last place of 1: 1e-3 and 8e-3
    assert (ours - theirs).abs().max() / exact.abs().max() < tolerance
