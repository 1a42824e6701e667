"""Packed layers compute what plain ones do, hold one weight, and are plain again, to the bit, where that is asked."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoder.test_kl import picture
from autoencoder.test_kl import small as small_autoencoder
from torch import Tensor, nn
from unet.small import inputs, relative, small_unet

import ldm
from ldm.adapters.changes import Factors
from ldm.adapters.lora import Lora, Rows, merged
from ldm.backends import packed
from ldm.checkpoints import native
from ldm.conditioning.clip import TextTower
from ldm.config import TextConfig
from ldm.errors import UserError

CONV = "down.0.stages.0.residual.conv_in"
works = pytest.mark.skipif(not packed.available(torch.float32), reason="packed layers do not work on this machine")


@pytest.fixture(autouse=True)
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST", 1)


def frozen(network: Any) -> Any:
    return network.eval().requires_grad_(False)


def opaque(network: nn.Module) -> int:
    """How many of its layers hold a packed weight at present."""
    return sum(parameter.is_mkldnn for parameter in network.parameters())


def bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ran(**changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A U-Net that has been run packed, and its weights as they were."""
    unet = frozen(small_unet(**changes))
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    packed.packed(unet)(*inputs())
    assert opaque(unet)
    return unet, before


@works
@pytest.mark.parametrize("changes", [{}, {"linear_projection": True, "time_injection": "scale_shift"}])
@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_the_function_is_the_same_in_one_copy_of_the_weights(changes: dict[str, Any], size: tuple[int, int]):
    unet = frozen(small_unet(**changes))
    given = inputs(height=size[0], width=size[1])
    wanted = unet(*given)
    shapes = {name: (value.shape, value.dtype) for name, value in unet.named_parameters()}
    assert packed.packed(unet) is unet and not opaque(unet)  # the form that fits is known when it is first run
    assert relative(unet(*given), wanted) < 1e-5
    layers = [layer for layer in unet.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    keys = {id(layer) for name, layer in unet.named_modules() if name.endswith(("key", "value"))}
    assert all(layer.weight.is_mkldnn for layer in layers if id(layer) not in keys)
    assert {name: (value.shape, value.dtype) for name, value in unet.named_parameters()} == shapes
    assert torch.equal(unet(*given), unet(*given))


@works
def test_bits_do_not_depend_on_what_was_drawn_before():
    first, later = frozen(small_unet()), frozen(small_unet())
    for network in (first, later):
        packed.packed(network)
    later(*inputs(batch=1))
    later(*inputs(height=12, width=20))
    assert torch.equal(later(*inputs()), first(*inputs()))


@works
def test_the_autoencoder_is_the_same_function():
    autoencoder = frozen(small_autoencoder(channels=16))
    image = picture(2, 3, 32, 32)
    wanted = autoencoder.encode(image).mode()
    decoded = autoencoder.decode(wanted)
    packed.packed(autoencoder)
    assert relative(autoencoder.encode(image).mode(), wanted) < 1e-5
    assert relative(autoencoder.decode(wanted), decoded) < 1e-5
    assert opaque(autoencoder)


@works
def test_a_state_dict_a_pickle_and_a_copy_have_the_plain_weights(tmp_path: Path):
    unet, before = ran()
    assert bits(unet.state_dict(), before)
    for copied in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert not opaque(copied) and bits(copied.state_dict(), before)
        assert torch.equal(copied(*inputs()), unet(*inputs()))
    torch.save(unet.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    assert bits(torch.load(saved), before)
    assert native.fingerprint(unet) == native.fingerprint(before)


@works
def test_other_weights_take_the_place_of_packed_ones():
    unet, before = ran()
    halved = {name: value / 2 for name, value in before.items()}
    unet.load_state_dict(halved)
    reference = frozen(small_unet())
    reference.load_state_dict(halved)
    assert relative(unet(*inputs()), reference(*inputs())) < 1e-5


@works
def test_training_a_cast_and_plain_unpack():
    for undo in (lambda unet: unet.train(), lambda unet: unet.to("cpu"), packed.plain):
        unet, before = ran()
        undo(unet)
        assert not opaque(unet) and bits(dict(unet.named_parameters()), before)
    unet, before = ran()
    assert bits(unet.double().state_dict(), {name: value.double() for name, value in before.items()})


@works
def test_what_an_optimizer_may_hold_stays_where_it_is():
    """A picture drawn between two steps of training leaves the parameters themselves, not copies of them."""
    unet = packed.packed(small_unet().eval())
    held = list(unet.parameters())
    with torch.no_grad():
        unet(*inputs())
    assert all(mine is its for mine, its in zip(held, unet.parameters(), strict=True))
    unet.requires_grad_(False)(*inputs())
    assert opaque(unet)


@works
def test_gradients_are_those_of_the_plain_network():
    unet, _ = ran()
    reference = frozen(small_unet())
    found = []
    for network in (unet, reference):
        x, t, context = inputs()
        network(x.requires_grad_(), t, context).square().sum().backward()
        found.append(x.grad)
    assert relative(*found) < 1e-5
    unet.requires_grad_(True)
    unet(*inputs()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


@works
def test_biases_alone_are_trained_too():
    unet = packed.packed(frozen(small_unet()))
    biases = [
        layer.bias for layer in unet.modules() if isinstance(layer, packed.PackedLinear) and layer.bias is not None
    ]
    for bias in biases:
        bias.requires_grad_(True)
    unet(*inputs()).square().sum().backward()
    assert biases and all(bias.grad is not None and bool(bias.grad.any()) for bias in biases)


@works
def test_autocast_and_a_compiled_network_are_run_by_torch():
    unet, _ = ran()
    with torch.autocast("cpu", torch.bfloat16):
        unet(*inputs())
    assert not opaque(unet)
    reference = frozen(small_unet())
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert relative(compiled(*inputs()), reference(*inputs())) < 1e-5


@works
def test_a_lora_is_merged_into_the_plain_weight_and_all_else_is_shared():
    unet, before = ran()
    weight = before[f"{CONV}.weight"]
    down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, 1, 1)
    lora = Lora({"unet": {Rows(f"{CONV}.weight"): Factors(down, up, 2.0)}})
    made = merged({"unet": unet}, [(lora, 0.5)])["unet"]
    plain = frozen(small_unet())
    wanted = merged({"unet": plain}, [(lora, 0.5)])["unet"]
    assert bits(made.state_dict(), wanted.state_dict())
    assert relative(made(*inputs()), wanted(*inputs())) < 1e-5
    own, shared = dict(made.named_parameters()), dict(unet.named_parameters())
    assert {name for name in own if own[name] is not shared[name]} == {f"{CONV}.weight"}
    assert bits(unet.state_dict(), before)


@works
def test_two_networks_of_the_same_weights_pack_them_once():
    unet = packed.packed(frozen(small_unet()))
    other = merged({"unet": unet}, [(Lora({"unet": {Rows("conv_out.bias"): _one(unet)}}), 1.0)])["unet"]
    unet(*inputs())
    other(*inputs())
    own, shared = dict(other.named_parameters()), dict(unet.named_parameters())
    assert {name for name in own if own[name] is not shared[name]} == {"conv_out.bias"}


def _one(unet: Any) -> Any:
    from ldm.adapters.changes import Difference

    return Difference(torch.ones_like(unet.conv_out.bias))


@works
def test_a_loaded_model_is_packed_and_draws_the_same_picture(tiny_checkpoint: Path, tmp_path: Path):
    drawn = {}
    for backend in ("auto", "torch"):
        model = ldm.load(tiny_checkpoint, device="cpu", backend=backend)
        drawn[backend] = model.txt2img("a heart", steps=3, cfg=3)
        assert bool(opaque(model.unet)) == (backend == "auto") == bool(opaque(model.codec.autoencoder))
    assert (drawn["auto"] - drawn["torch"]).abs().max() < 1e-4
    weights = {"autoencoder": model.codec.autoencoder, "text": model.text, "unet": model.unet}
    native.save(tmp_path / "saved", model.config, weights)  # type: ignore[arg-type]
    assert ldm.load(tmp_path / "saved", device="cpu").hash == model.hash


def test_a_backend_that_does_not_exist_is_told(tiny_checkpoint: Path):
    with pytest.raises(UserError, match="no backend 'fast'; choose one of auto"):
        ldm.load(tiny_checkpoint, backend="fast")


@pytest.mark.parametrize("fault", ["missing", "refused", "wrong"])
def test_where_an_operator_is_missing_refuses_or_errs_layers_stay_as_they_are(
    fault: str, monkeypatch: pytest.MonkeyPatch
):
    class Operators:
        def __getattr__(self, name: str) -> Any:
            if fault == "missing":
                raise AttributeError(name)
            if fault == "refused":
                raise RuntimeError("could not create a primitive descriptor")
            real = getattr(torch.ops.mkldnn, name)
            return real if "reorder" in name else lambda *arguments: 1.001 * real(*arguments)

    packed.available.cache_clear()
    monkeypatch.setattr(packed, "OPS", Operators())
    unet = frozen(small_unet())
    wanted = unet(*inputs())
    assert torch.equal(packed.packed(unet)(*inputs()), wanted) and not opaque(unet)
    assert not any(isinstance(layer, packed.PackedConv2d) for layer in unet.modules())
    packed.available.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_precisions_that_it_has_not_stay_as_they_are(dtype: torch.dtype):
    unet = frozen(small_unet()).to(dtype)
    wanted = unet(*inputs())
    assert torch.equal(packed.packed(unet)(*inputs()), wanted) and not opaque(unet)


@works
def test_a_text_towers_attention_is_the_same_and_its_weights_stay_plain():
    torch.manual_seed(0)
    tower = frozen(TextTower(TextConfig(width=64, heads=4, layers=2, embed_dim=0)))
    tokens = torch.randint(1000, 40_000, (2, tower.config.context_length))
    wanted, before = tower(tokens), {name: value.clone() for name, value in tower.state_dict().items()}
    packed.packed(tower)
    with torch.inference_mode():
        assert relative(tower(tokens), wanted) < 1e-5
    attention = next(layer for layer in tower.modules() if isinstance(layer, packed.DirectAttention))
    assert not attention.in_proj_weight.is_mkldnn and not attention.out_proj.weight.is_mkldnn
    assert bits(tower.state_dict(), before)
    assert all(type(layer) is not packed.DirectAttention for layer in packed.plain(tower).modules())


@works
@pytest.mark.parametrize("asked", ["weights", "padding", "other keys", "boolean mask", "causal", "gradients", "flat"])
def test_what_else_attention_can_be_asked_is_torchs_own(asked: str):
    torch.manual_seed(0)
    layer = frozen(nn.MultiheadAttention(32, 4, batch_first=True))
    x, mask = torch.randn(2, 5, 32), torch.ones(5, 5, dtype=torch.bool).triu(1)
    given: dict[str, Any] = {"query": x, "key": x, "value": x, "need_weights": False}
    given |= {"weights": {"need_weights": True}, "boolean mask": {"attn_mask": mask}}.get(asked, {})
    given |= {"padding": {"key_padding_mask": mask[:2]}, "other keys": {"key": x + 1}}.get(asked, {})
    if asked == "causal":
        given |= {"attn_mask": torch.zeros(5, 5).masked_fill(mask, -torch.inf), "is_causal": True}
    if asked == "flat":
        given |= dict.fromkeys(("query", "key", "value"), x[0])
    x.requires_grad_(asked == "gradients")
    wanted, weights = layer(**given)
    found, ours = packed.packed(layer)(**given)
    assert isinstance(layer, packed.DirectAttention) and torch.equal(found, wanted)
    assert (weights is None and ours is None) or torch.equal(ours, weights)


@works
def test_a_mask_of_one_picture_serves_all():
    torch.manual_seed(0)
    layer = frozen(nn.MultiheadAttention(32, 4, batch_first=True))
    x, mask = torch.randn(3, 5, 32), torch.full((5, 5), -torch.inf).triu(1)
    wanted = layer(x, x, x, need_weights=False, attn_mask=mask)[0]
    assert relative(packed.packed(layer)(x, x, x, need_weights=False, attn_mask=mask)[0], wanted) < 1e-5
