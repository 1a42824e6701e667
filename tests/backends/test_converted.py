"""The U-Net as OpenVINO compiles it gives what the U-Net gives; where it cannot be, the U-Net itself is run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from unet.small import inputs, relative, small_unet

import ldm
from ldm import backends
from ldm.adapters.lora import sharing
from ldm.backends import run_by
from ldm.conditioning.condition import Condition
from ldm.errors import UserError


def test_a_step_is_the_same_and_each_size_is_converted_once(monkeypatch: pytest.MonkeyPatch):
    openvino = pytest.importorskip("openvino")
    real, compiled = openvino.compile_model, []
    monkeypatch.setattr(openvino, "compile_model", lambda *given: compiled.append(given) or real(*given))
    plain, unet = (small_unet().requires_grad_(False) for _ in range(2))
    run_by("openvino", unet, main=True)
    with torch.inference_mode():
        for size in (8, 12, 8):
            x, t, context = inputs(height=size)
            for scale in (1.0, 0.5):
                told = plain.prepare(Condition(scale * context))
                first = unet(x, t, told)
                assert relative(first, plain(x, t, told)) < 1e-5
            kept = first.clone()
            unet(x + 1, t, told)
            assert torch.equal(first, kept)  # what was given is not written to again
        assert len(compiled) == 2
        doubled = {f"conv_out.{name}": 2 * value for name, value in unet.conv_out.named_parameters()}
        changed = sharing(unet, doubled)  # a network with other weights is another network
        assert relative(changed(x, t, told), 2 * plain(x, t, told)) < 1e-5 and len(compiled) == 3
    x, t, context = inputs()
    unet(x.requires_grad_(), t, context).sum().backward()
    assert x.grad is not None and len(compiled) == 3


def test_a_model_draws_the_same_picture_and_its_attention_is_seen(tiny_checkpoint: Path):
    pytest.importorskip("openvino")
    drawn = {}
    for backend in ("torch", "openvino"):
        model = ldm.load(tiny_checkpoint, device="cpu", backend=backend)
        drawn[backend] = model.txt2img("a heart", steps=3, cfg=3)
        with model.attention_maps() as maps:
            model.txt2img("a heart", steps=2, cfg=3)
        assert maps.kept
    assert (drawn["openvino"] - drawn["torch"]).abs().max() < 1e-3


def test_what_it_cannot_do_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if name == "openvino" else found(name))
    with pytest.raises(UserError, match="computes on the CPU in fp32"):
        run_by("openvino", small_unet().bfloat16(), main=True)
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(UserError, match=r"needs OpenVINO, which is not installed; pip install -e '\.\[openvino\]'"):
        ldm.load("icons", backend="openvino")
