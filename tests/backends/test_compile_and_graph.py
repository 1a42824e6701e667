"""torch.compile takes the U-Net whole; a graph gives what the network gives; the loop never waits for the device."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from unet.small import inputs, relative, small_unet

import ldm
from ldm.backends import BACKENDS, run_by
from ldm.backends.graph import graphed
from ldm.conditioning.condition import Condition
from ldm.errors import UserError

ATTENTION = "middle.0.transformer.blocks.0.self_attention"
SIZES = ((8, 8), (12, 16), (20, 12))


@pytest.mark.slow
def test_one_graph_without_a_break_and_one_recompilation_over_three_sizes():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    unet, plain = (small_unet().requires_grad_(False) for _ in range(2))
    unet.compile(fullgraph=True, backend="eager")  # a break in the graph is an error
    with torch.no_grad():
        for height, width in SIZES:
            x, t, context = inputs(height=height, width=width)
            told = unet.prepare(Condition(context))
            assert torch.equal(unet(x, t, told), plain(x, t, told))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first size's, and one for all sizes


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True])
def test_what_inductor_makes_of_each_size_draws_the_same(linear: bool):
    torch._dynamo.reset()
    made = small_unet(linear_projection=linear).requires_grad_(False)
    compiled, plain = run_by("compile", made, main=True), small_unet(linear_projection=linear)
    with torch.no_grad():
        for height, width in SIZES[:2]:
            x, t, context = inputs(height=height, width=width)
            told = plain.prepare(Condition(context))
            assert relative(compiled(x, t, told), plain(x, t, told)) < 1e-5


class Replayed:
    """Stands in for a CUDA graph: it sees, and may use, its own tensors alone."""

    made: list[Replayed] = []  # noqa: RUF012

    def __init__(self, call: Any, given: tuple[Any, ...]) -> None:
        from ldm.backends.graph import same_with, tensors

        self.call, self.own, self.tensors = call, same_with(given, torch.clone), tensors
        Replayed.made.append(self)

    def __call__(self, given: tuple[Any, ...]) -> Tensor:
        for here, there in zip(self.tensors(self.own), self.tensors(given), strict=True):
            here.copy_(there)
        return self.call(*self.own)


def test_graphs_are_kept_by_shape_and_told_anew():
    Replayed.made.clear()
    unet, plain = graphed(small_unet().requires_grad_(False), Replayed), small_unet()
    with torch.no_grad():
        for size in (8, 12, 8, 16, 12):
            x, t, context = inputs(height=size)
            for scale in (1.0, 0.5):
                told = plain.prepare(Condition(scale * context))
                assert torch.equal(unet(x, t, told), plain(x, t, told))
    assert len(Replayed.made) == 4  # 12 was let go when 16 came
    x, t, context = inputs()
    unet(x.requires_grad_(), t, context).sum().backward()  # not through a graph
    assert x.grad is not None and len(Replayed.made) == 4


def test_hooks_stand_ins_and_other_attention_are_met_by_the_layers_themselves():
    Replayed.made.clear()
    unet, plain = graphed(small_unet().requires_grad_(False), Replayed), small_unet()
    x, t, context = inputs()
    layer: Any = unet.get_submodule(ATTENTION)
    told, seen = plain.prepare(Condition(context)), []
    with torch.no_grad():
        hook = layer.register_forward_hook(lambda *given: seen.append("hook"))
        assert torch.equal(unet(x, t, told), plain(x, t, told))
        hook.remove()
        usual, layer.attends = layer.attends, lambda q, k, v, mask: seen.append("attends") or 0 * q
        assert not torch.equal(unet(x, t, told), plain(x, t, told))
        layer.attends, layer.forward = usual, lambda x: seen.append("stand-in") or 0 * x
        assert not torch.equal(unet(x, t, told), plain(x, t, told))
        del layer.forward
        assert seen == ["hook", "attends", "stand-in"] and not Replayed.made
        unet.set_attention_backend("sdpa")
        whole = unet.register_forward_hook(lambda *given: seen.append("whole"))  # one of the network sees the graph's
        assert torch.equal(unet(x, t, told), plain(x, t, told))
        whole.remove()
        assert seen[-1] == "whole" and len(Replayed.made) == 1
        copied = copy.deepcopy(unet)
        for parameter in copied.conv_out.parameters():
            parameter.mul_(2)
        assert torch.equal(copied(x, t, told), 2 * unet(x, t, told)) and len(Replayed.made) == 2


@torch.no_grad()
def test_a_graph_is_not_replayed_on_weights_that_lie_elsewhere():
    """As after `.to` another GPU and back: of the same shapes and dtypes, and none of them where it was recorded."""
    Replayed.made.clear()
    unet, given = graphed(small_unet().requires_grad_(False), Replayed), inputs()
    before = unet(*given)
    unet.conv_out.weight.mul_(2)  # in place is what a graph reads
    unet(*given)
    assert len(Replayed.made) == 1
    for parameter in unet.conv_out.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert before.any() and not unet(*given).any() and len(Replayed.made) == 2


def test_a_graph_of_inference_mode_serves_outside_of_it():
    Replayed.made.clear()
    unet, plain, given = graphed(small_unet().requires_grad_(False), Replayed), small_unet(), inputs()
    with torch.inference_mode():
        unet(*given)
    with torch.no_grad():
        x, t, context = given
        assert torch.equal(unet(2 * x, t, context), plain(2 * x, t, context)) and len(Replayed.made) == 1


@pytest.mark.parametrize("backend", ["graph", "fused", "openvino"])
def test_what_stays_on_its_device_does_not_go_with_low_memory(
    backend: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ldm.device.choose_device", torch.device)
    monkeypatch.setattr("ldm.backends.find_spec", lambda _: True)
    with pytest.raises(UserError, match=f"'{backend}' needs networks that stay"):
        ldm.load(tiny_checkpoint, device="cuda", precision="fp32", backend=backend, low_memory=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_a_graph_follows_its_network_to_a_gpu_that_is_not_the_current_one():
    unet, plain = (small_unet().requires_grad_(False).cuda() for _ in range(2))
    run_by("graph", unet, main=True)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        given = [value.to(device) for value in inputs()]
        assert relative(unet.to(device)(*given), plain.to(device)(*given)) < 1e-3


@pytest.mark.parametrize(("backend", "words"), [("graph", "needs a CUDA device"), ("fused", "needs (a CUDA|Triton)")])
def test_what_is_of_a_gpu_needs_one(backend: str, words: str):
    with pytest.raises(UserError, match=f"'{backend}' {words}"):
        run_by(backend, small_unet())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("torch", "openvino")])
def test_on_a_gpu_a_step_is_the_same_by_each_backend(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)  # else of the one, and not of the other
    unet, plain = (small_unet().requires_grad_(False).cuda() for _ in range(2))
    run_by(backend, unet, main=True)
    with torch.no_grad():
        for height, width in SIZES:
            x, t, context = (value.cuda() for value in inputs(height=height, width=width))
            told = plain.prepare(Condition(context))
            for _ in range(2):
                assert relative(unet(x, t, told), plain(x, t, told)) < 1e-4


class Waits(TorchDispatchMode):
    """Counts what asks for the numbers of tensors that come of `seeds`: on a GPU, whoever asks waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device, self.asked = WeakTensorKeyDictionary(), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inner = [
            each for arg in (*args, *(kwargs or {}).values()) for each in (arg if isinstance(arg, list) else [arg])
        ]
        if any(isinstance(each, Tensor) and each in self.on_device for each in inner):
            if func.overloadpacket in (
                torch.ops.aten._local_scalar_dense,
                torch.ops.aten.nonzero,
                torch.ops.aten.equal,
            ):
                self.asked.append(str(func))
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, Tensor):
                    self.on_device[each] = True
        return out


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "ddpm"])
def test_the_loop_never_waits_for_the_device(tiny_model: ldm.LatentDiffusion, sampler: str):
    with Waits() as waits:
        hook = tiny_model.unet.register_forward_hook(lambda *given: waits.on_device.__setitem__(given[2], True))
        try:
            steps = list(tiny_model.sample("a heart", steps=4, cfg=3.0, sampler=sampler))
        finally:
            hook.remove()
        assert steps[-1].x in waits.on_device and not waits.asked
        bool(steps[-1].x.isfinite().all())
        assert waits.asked  # what is counted is counted


def test_no_gpu_part_is_imported_on_a_cpu():
    assert torch.cuda.is_available() or "triton" not in sys.modules
