from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ldm.conditioning.condition import Condition
from ldm.config import UNetConfig
from ldm.errors import UserError
from ldm.unet import UNet
from ldm.unet.unet import Prepared

from .small import SMALL, inputs, relative, small_unet

SD_V1 = UNetConfig()
SD_V2 = UNetConfig(heads=0, head_width=64, linear_projection=True, context_width=1024)


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SD_V1, 859_520_964),
        (SD_V2, 865_910_724),
        (replace(SD_V1, in_channels=9), 859_520_964 + 5 * 9 * 320),  # inpainting
        (replace(SD_V2, in_channels=5), 865_910_724 + 1 * 9 * 320),  # depth
    ],
    ids=["v1", "v2", "v1-inpainting", "v2-depth"],
)
def test_stable_diffusion_is_a_configuration(config: UNetConfig, parameters: int):
    with torch.device("meta"):
        unet = UNet(config)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == 686


def test_a_new_network_predicts_zero():
    assert not UNet(SMALL)(*inputs()).any()


def test_fourier_frequencies_are_saved_and_the_sinusoid_keeps_no_state():
    plain, fourier = set(small_unet().state_dict()), set(small_unet(time_embedding="fourier").state_dict())
    assert fourier - plain == {"time_features.frequencies"} and plain < fourier


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 4, "head_width": 16}, "one of the two"),
        ({"heads": 0, "head_width": 0}, "one of the two"),
        ({"heads": 0, "head_width": 48}, "head_width 48 does not divide"),
        ({"heads": 5, "head_width": 0}, "heads 5 does not divide"),
        ({"time_embedding": "sinus"}, "sinusoid"),
        ({"time_injection": "film"}, "scale_shift"),
        ({"attention_levels": (2,)}, "levels 0 to 1"),
        ({"channels": 33}, "even"),
        ({"blocks": 0}, "blocks"),
    ],
)
def test_what_cannot_be_built_is_said_in_words(change: dict, words: str):
    with pytest.raises(UserError, match=words):
        UNet(replace(SMALL, **change))


# ---------------------------------------------------------------- shapes and invariances


@pytest.mark.parametrize(("height", "width"), [(8, 8), (17, 13), (1, 3), (5, 16)])
@pytest.mark.parametrize("levels", [2, 4])
def test_any_size(height: int, width: int, levels: int):
    unet = small_unet(multipliers=(1,) * levels, in_channels=5, out_channels=3)
    with torch.no_grad():
        out = unet(*inputs(2, 5, height, width))
    assert out.shape == (2, 3, height, width) and out.isfinite().all()


@pytest.mark.parametrize("injection", ["add", "scale_shift"])
def test_a_row_of_the_batch_knows_nothing_of_the_others(injection: str):
    unet = small_unet(time_injection=injection)
    x, t, context = inputs(3)
    with torch.no_grad():
        together = unet(x, t, context)
        alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)])
    assert relative(alone, together) < 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_channels_last_is_kept_and_changes_nothing(linear: bool):
    unet = small_unet(linear_projection=linear, time_injection="scale_shift")
    x, t, context = inputs(2, 4, 10, 6)
    formats = []
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    for module in last.modules():
        module.register_forward_hook(lambda _module, _args, out: formats.append(out) if out.ndim == 4 else None)
    with torch.no_grad():
        expected = unet(x, t, context)
        out = last(x.to(memory_format=torch.channels_last), t, context)
    assert relative(out, expected) < 1e-5
    assert len(formats) > 30
    assert all(features.is_contiguous(memory_format=torch.channels_last) for features in formats)


def test_context_kv_equals_the_context():
    unet = small_unet(transformer_depth=2)
    x, t, context = inputs(3)
    with torch.no_grad():
        kv = unet.project_context(context)
        assert len(kv.layers) == 2 * (1 + 1 + 2)  # one stage down, the middle, two up
        assert torch.equal(unet(x, t, Prepared(kv)), unet(x, t, context))
        assert relative(unet(x[:1], t[:1], Prepared(kv[:1])), unet(x[:1], t[:1], context[:1])) < 1e-6


def test_each_cross_attention_layer_uses_its_own_keys():
    unet = small_unet()
    x, t, context = inputs()
    kv = unet.project_context(context)
    swapped = type(kv)(kv.layers[::-1])
    assert relative(unet(x, t, Prepared(swapped)), unet(x, t, Prepared(kv))) > 1e-3


def test_gradient_checkpointing_gives_the_same_gradients():
    unet = small_unet(dropout=0.2).train()
    x, t, context = inputs()
    gradients = []
    for unet.gradient_checkpointing in (False, True):
        torch.manual_seed(0)  # for the dropout, which the recomputation repeats
        unet.zero_grad()
        unet(x, t, context).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(unet.parameters()))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_gradient_checkpointing_recomputes_in_training_only():
    unet = small_unet().train()
    unet.gradient_checkpointing = True
    calls = []
    unet.middle[0].register_forward_pre_hook(lambda *_: calls.append(1))
    unet(*inputs()).sum().backward()
    assert len(calls) == 2
    unet.eval()
    unet(*inputs()).sum().backward()
    assert len(calls) == 3


def test_dropout_acts_in_training_only():
    unet = small_unet(dropout=0.5)
    x, t, context = inputs()
    with torch.no_grad():
        assert torch.equal(unet(x, t, context), unet(x, t, context))
        assert relative(small_unet()(x, t, context), unet(x, t, context)) == 0
        unet.train()
        assert not torch.equal(unet(x, t, context), unet(x, t, context))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_float32_and_gives_float32(dtype: torch.dtype):
    x, t, context = inputs()
    with torch.no_grad():
        expected = small_unet()(x, t, context)
        out = small_unet().to(dtype)(x, t, context)
    assert out.dtype == torch.float32
    assert relative(out, expected) < 0.1


def test_autocast_agrees_with_float32_and_trains():
    unet = small_unet()
    x, t, context = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x, t, context)
    assert out.dtype == torch.float32
    assert relative(out, unet(x, t, context)) < 0.1
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


# ---------------------------------------------------------------- what it is told


def test_time_and_context_matter():
    unet = small_unet()
    x, t, context = inputs()
    with torch.no_grad():
        out = unet(x, t, context)
        assert relative(unet(x, t + 50, context), out) > 1e-3
        assert relative(unet(x, t, context.flip(0)), out) > 1e-3
        order = unet(x, t, context.flip(1))  # attention sees a set: the order of the words is the text tower's affair
        assert relative(order, out) < 1e-5


@pytest.mark.parametrize("change", [{"time_injection": "scale_shift"}, {"time_embedding": "fourier"}])
def test_other_ways_to_tell_the_time(change: dict):
    unet, other = small_unet(), small_unet(**change)
    x, t, context = inputs()
    with torch.no_grad():
        assert relative(other(x, t, context), unet(x, t, context)) > 1e-2
        assert relative(other(x, t + 50, context), other(x, t, context)) > 1e-3


def test_classes():
    unet = small_unet(classes=10)
    x, t, context = inputs()
    with torch.no_grad():
        out = unet(x, t, Condition(context, label=torch.tensor([3, 4])))
        null = unet(x, t, Condition(context, label=torch.tensor([3, 10])))
    assert torch.equal(out[0], null[0]) and relative(null[1], out[1]) > 1e-3


def test_vector():
    unet = small_unet(vector_width=6)
    x, t, context = inputs()
    with torch.no_grad():
        out = unet(x, t, Condition(context, vector=torch.zeros(2, 6)))
        assert relative(unet(x, t, Condition(context, vector=torch.ones(2, 6))), out) > 1e-3


@pytest.mark.parametrize("levels", [(1,), ()])
def test_without_context(levels: tuple[int, ...]):
    unet = small_unet(context_width=0, attention_levels=levels)
    x, t, _ = inputs()
    with torch.no_grad():
        assert unet(x, t).shape == x.shape
    attends = [name for name, _ in unet.named_modules() if name.endswith("self_attention")]
    assert len(attends) == (4 if levels else 0)


def test_inputs_that_do_not_fit_the_configuration_are_refused():
    x, t, context = inputs()
    unet, bare = small_unet(), small_unet(context_width=0)
    with pytest.raises(ValueError, match="context is missing"):
        unet(x, t)
    with pytest.raises(ValueError, match="context is given"):
        bare(x, t, context)
    with pytest.raises(ValueError, match=r"not \(B, L, 12\)"):
        unet(x, t, context[..., :5])
    with pytest.raises(ValueError, match="vector is given"):
        unet(x, t, Condition(context, vector=torch.zeros(2, 6)))
    with pytest.raises(ValueError, match="label is missing"):
        small_unet(classes=3)(x, t, context)
