"""What the benchmark compares: the same work, on the same random weights, by each library; a `side` is one of them.

    ldm          as it is by default;  ldm/torch, ldm/compile, ldm/openvino: by that backend (ldm/backends)
    diffusers    with transformers' text tower;  diffusers/compile: its U-Net by torch.compile
    openvino     our networks, converted, in float32 (CPU)

A work is a function without arguments that ends when the device is done. Sides are built one by one, so that a process
which measures one holds nothing of another.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig
from ldm.errors import UserError

Work = Callable[[], object]
PROMPT = "a photograph of an astronaut riding a horse"


def shape(name: str) -> ModelConfig:
    """icons (the shipped U-Net, 8 M parameters), small (43 M), sd (Stable Diffusion v1, 860 M), tiny (for tests)."""
    from ldm.checkpoints.architectures import SD_V1

    if name == "sd":
        return replace(SD_V1, image_size=256)
    widths = {"tiny": (64, (1, 2), 64), "icons": (64, (1, 3), 192), "small": (128, (1, 2, 3), 256)}
    channels, multipliers, context = widths[name]
    levels = tuple(range(1, len(multipliers)))
    return ModelConfig(
        AutoencoderConfig(channels=128, multipliers=(1, 1) if name == "tiny" else (1, 1, 2), blocks=1),
        TextConfig(width=context, heads=context // 64, layers=4, embed_dim=0, padding="eot", cleaning="plain"),
        UNetConfig(
            channels=channels,
            multipliers=multipliers,
            blocks=1,
            attention_levels=levels,
            heads=0,
            head_width=32,
            context_width=context,
            linear_projection=True,
        ),
        ScheduleConfig(),
        parameterization="v",
        image_size=16 if name == "tiny" else 64,
    )


SHAPES = ("tiny", "icons", "small", "sd")


def random_model(path: Path, config: ModelConfig, half: bool = False) -> Path:
    """A diffusers directory, the format that both libraries read, of random weights in the shapes of `config`."""
    import torch

    from ldm.checkpoints import export, native
    from ldm.checkpoints.networks import skeleton

    generator = torch.Generator().manual_seed(0)
    states: dict[str, dict[str, Any]] = {}
    for name in native.part_names(config):
        states[name] = {}
        for key, value in skeleton(name, config, path).state_dict().items():
            norm = value.ndim == 1 and key.endswith("weight")
            drawn = torch.randn(value.shape, generator=generator) * 0.02 + norm
            states[name][key] = drawn.half() if half else drawn
    export.write(path, config, states, "diffusers")
    return path


def quiet() -> None:
    """No warning of the libraries, and their progress bars off: they would stand between the figures."""
    warnings.simplefilter("ignore")
    from ldm.conditioning.torchvision_ops import declare_missing_operators

    declare_missing_operators()
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ[name] = "1"


def open_ours(path: Path, a: argparse.Namespace, backend: str = "auto") -> Any:
    from ldm import api

    return api.load(path, a.device, a.precision, backend=backend)


def open_theirs(path: Path, a: argparse.Namespace) -> Any:
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[a.precision]
    pipe: Any = StableDiffusionPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(a.device)


class Inputs:
    """The same numbers for all sides; `batch` pictures, twice as many rows where guidance compares two prompts."""

    def __init__(self, config: ModelConfig, a: argparse.Namespace) -> None:
        import torch

        assert config.unet is not None and config.autoencoder is not None
        torch.manual_seed(0)
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[a.precision]
        latent = (config.autoencoder.latent_channels, *2 * (a.side or config.image_size // config.autoencoder.factor,))
        rows = a.batch * (2 if a.kind == "step" else 1)
        pixels = [side * config.autoencoder.factor for side in latent[1:]]
        self.size = pixels[0]
        self.x = torch.randn(rows, *latent).to(a.device, kind)
        self.t = torch.full((rows,), 500.0, device=a.device)
        self.context = torch.randn(rows, 77, config.unet.context_width).to(a.device, kind)
        self.image = (torch.rand(rows, 3, *pixels) * 2 - 1).to(a.device, kind)
        self.tokens = torch.randint(1000, 40_000, (rows, 77), device=a.device)
        self.tokens[:, 0], self.tokens[:, -1] = 49406, 49407


def work(kind: str, side: str, path: Path, config: ModelConfig, a: argparse.Namespace) -> Work:
    """The work of `kind` by `side`, with its model from `path`. Raises UserError for what a side does not do."""
    library, _, how = side.partition("/")
    made = {"ldm": ours, "diffusers": theirs, "openvino": converted}[library](kind, how, path, Inputs(config, a), a)
    return ended(made, a.device, kind == "train")


def ended(made: Work, device: str, grad: bool) -> Work:
    import torch

    def whole() -> None:
        with torch.enable_grad() if grad else torch.inference_mode():
            made()
        if device == "cuda":
            torch.cuda.synchronize()

    return whole


def ours(kind: str, how: str, path: Path, given: Inputs, a: argparse.Namespace) -> Work:
    import torch

    from ldm.conditioning.condition import Condition
    from ldm.jobs import Settings

    model = open_ours(path, a, how or ("torch" if kind == "train" else "auto"))
    if kind == "train":
        from ldm.backends.heap import keep_memory
        from ldm.backends.trained import trained

        keep_memory()  # for the sides after it in this process too
        network = trained(model.unet)  # as ldm/training/members.py has it
        return training(network, lambda: network(given.x, given.t, given.context), given, a)
    if kind == "sample":
        settings = Settings(width=given.size, height=given.size, sampler="ddim", spacing="leading", steps=a.steps)
        prompts = [PROMPT] * a.batch
        return lambda: model.txt2img(prompts, cfg=7.5, batch_size=a.batch, settings=settings)
    with torch.inference_mode():
        told = model.unet.prepare(Condition(given.context))
    return {
        "step": lambda: model.unet(given.x.float(), given.t, told),
        "text": lambda: model.text(given.tokens),
        "decode": lambda: model.codec.decode(given.x),
        "encode": lambda: model.codec.encode(given.image),
    }[kind]


def theirs(kind: str, how: str, path: Path, given: Inputs, a: argparse.Namespace) -> Work:
    pipe = open_theirs(path, a)
    if how == "compile":
        pipe.unet.compile(fullgraph=True)
    if kind == "train":
        return training(pipe.unet, lambda: pipe.unet(given.x, given.t, given.context).sample, given, a)
    if kind == "sample":
        prompts, size = [PROMPT] * a.batch, {"height": given.size, "width": given.size}
        return lambda: pipe(prompts, num_inference_steps=a.steps, guidance_scale=7.5, output_type="pt", **size)
    return {
        "step": lambda: pipe.unet(given.x, given.t, given.context).sample,
        "text": lambda: pipe.text_encoder(given.tokens).last_hidden_state,
        "decode": lambda: pipe.vae.decode(given.x / 0.18215).sample,
        "encode": lambda: pipe.vae.encode(given.image).latent_dist.mode() * 0.18215,
    }[kind]


def training(network: Any, forward: Callable[[], Any], given: Inputs, a: argparse.Namespace) -> Work:
    """A step as a training's: AdamW (fused), mean squared error, gradients clipped; bf16 is autocast's."""
    import torch

    network.float().requires_grad_(True).train()
    given.x, given.context = given.x.float(), given.context.float()
    target = torch.randn_like(given.x)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(a.device, torch.bfloat16, enabled=a.precision == "bf16"):
            output = forward()
        torch.nn.functional.mse_loss(output.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def converted(kind: str, how: str, path: Path, given: Inputs, a: argparse.Namespace) -> Work:
    """Our plain network as OpenVINO compiles it for these sizes."""
    import torch
    from torch import nn

    from ldm.conditioning.condition import Condition

    try:
        import openvino  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise UserError("the openvino side needs OpenVINO; pip install -e '.[openvino]'") from error
    model = open_ours(path, a, "torch")
    with torch.no_grad():
        told = model.unet.prepare(Condition(given.context))
    pieces: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "step": (lambda x, t: model.unet(x, t, told), (given.x, given.t)),
        "text": (model.text, (given.tokens,)),
        "decode": (model.codec.autoencoder.decode, (given.x,)),
        "encode": (lambda image: model.codec.autoencoder.encode(image).mode(), (given.image,)),
    }
    if kind not in pieces or a.device != "cpu":
        raise UserError(f"the openvino side has no '{kind}' on {a.device}; leave it out of --sides")
    call, inputs = pieces[kind]

    class Piece(nn.Module):
        def forward(self, *values: Any) -> Any:
            return call(*values)

    with torch.no_grad():
        traced = torch.jit.trace(Piece(), inputs, check_trace=False)
    graph = openvino.convert_model(traced, example_input=inputs, input=[list(value.shape) for value in inputs])
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": a.threads, "NUM_STREAMS": 1}
    request = openvino.compile_model(graph, "CPU", hints).create_infer_request()
    arrays = [value.numpy() for value in inputs]
    return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)
