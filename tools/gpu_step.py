"""A guided step of a U-Net on a GPU: ours by each backend beside diffusers' eager and compiled, at several batches.

    python tools/gpu_step.py --shape sd                     # Stable Diffusion v1 at 512 pixels, half precision
    python tools/gpu_step.py --shape sdxl --batch 1 4       # SDXL at 1024
    python tools/gpu_step.py --shape tiny --device cpu --precision fp32 --sides ldm diffusers      # that it runs at all

tools/benchmark.py measures more, with weights that both libraries read from a disk. Here they are random and made where
they are run, by one process, one side after another: little time beside that of the steps, and the memory told is one
side's. Seconds to begin are those of the first two steps of a batch, which compile and record.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import sides  # beside this file

from ldm.arguments import COUNT, Parser
from ldm.config import UNetConfig
from ldm.errors import UserError, first_line, out_of_memory

SDXL = UNetConfig(
    channels=320,
    multipliers=(1, 2, 4),
    blocks=2,
    attention_levels=(1, 2),
    heads=0,
    head_width=64,
    context_width=2048,
    transformer_depth=10,
    depths=(2, 10),
    linear_projection=True,
    vector_width=1280 + 6 * 256,
)
TINY = replace(SDXL, channels=64, multipliers=(1, 1, 2), transformer_depth=1, depths=(1, 1), context_width=64)
SHAPES = {"sd": 64, "sdxl": 128, "tiny": 16}  # and the latent's side
SIDES = ("ldm", "ldm/fused", "ldm/graph", "ldm/compile", "diffusers", "diffusers/compile")
WANTED = {"sd": 6e9, "sdxl": 14e9, "tiny": 0}  # bytes that are free, at batch 1
Step = Callable[[], object]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="sd")
    parser.add_argument("--side", type=COUNT, help="of the latent (default: the shape's: 64, sdxl 128, tiny 16)")
    parser.add_argument(
        "--batch", type=COUNT, nargs="+", default=[1, 4, 16], help="pictures; guidance doubles the rows [%(default)s]"
    )
    parser.add_argument("--rounds", type=COUNT, default=20)
    parser.add_argument("--seconds", type=COUNT, default=240, help="nothing is begun after so many")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    return parser.parse_args(words)


def main() -> None:
    a = parse()
    import torch

    if a.device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("torch sees no CUDA device on this machine; run this where there is one")
        free = torch.cuda.mem_get_info()[0]
        if free < WANTED[a.shape]:
            wanted = WANTED[a.shape] / 1e9
            raise UserError(f"{free / 1e9:.0f} GB of the GPU's memory are free, and {a.shape} wants {wanted:.0f}")
    sides.quiet()
    print("| what | side | s | least | to begin, s | peak MB |\n|---|---|---|---|---|---|")
    until = time.monotonic() + a.seconds
    for side in a.sides:
        rows = measured(side, a, until)
        for batch in a.batch:
            print(f"| {a.shape}, batch {batch}, {a.precision} | {side} | {next(rows)} |", flush=True)


def config(name: str) -> UNetConfig:
    unet = sides.shape("sd").unet
    assert isinstance(unet, UNetConfig)
    return {"sd": unet, "sdxl": SDXL, "tiny": TINY}[name]


def measured(side: str, a: argparse.Namespace, until: float) -> Iterator[str]:
    """The figures of each batch, or why there are none."""
    import torch

    def now() -> float:
        if a.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    library, _, how = side.partition("/")
    make = None
    for batch in a.batch:
        if time.monotonic() > until:
            yield "not run: the time was over | | |"
            continue
        gc.collect()
        if a.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with torch.no_grad():
                make = make or {"ldm": ours, "diffusers": theirs}[library](how, a)
                step, seconds = make(given(a, batch)), []
                begun = now()
                for _ in range(2):
                    step()
                ready = now()
                for _ in range(a.rounds):
                    at = now()
                    step()
                    seconds.append(now() - at)
        except Exception as error:  # of whichever side: the others are still to be measured
            why = "too little memory" if out_of_memory(error) else f"{type(error).__name__}: {first_line(error)}"
            yield f"failed: {why.replace('|', '/')} | | |"
            continue
        peak = torch.cuda.max_memory_allocated() if a.device == "cuda" else 0
        yield f"{statistics.median(seconds):.4f} | {min(seconds):.4f} | {ready - begun:.1f} | {peak / 1e6:.0f}"


def given(a: argparse.Namespace, batch: int) -> dict[str, Any]:
    """What the network of a guided step takes."""
    import torch

    unet, side = config(a.shape), a.side or SHAPES[a.shape]
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[a.precision]
    rows, made = 2 * batch, {"device": a.device, "dtype": dtype}
    return {
        "x": torch.randn(rows, unet.in_channels, side, side, **made),
        "t": torch.full((rows,), 500.0, device=a.device),
        "context": torch.randn(rows, 77, unet.context_width, **made),
        "pooled": torch.randn(rows, 1280, **made),
        "sizes": torch.full((rows, 6), 1024.0, **made),
    }


def ours(how: str, a: argparse.Namespace) -> Callable[[dict[str, Any]], Step]:
    import torch

    from ldm.backends import run_by
    from ldm.conditioning.condition import Condition
    from ldm.unet import UNet

    with torch.device(a.device):
        unet = UNet(config(a.shape)).to(given(a, 1)["x"].dtype).eval().requires_grad_(False)
    for parameter in unet.parameters():  # as loading does
        parameter.data = parameter.data.contiguous(
            memory_format=torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        )
    unet = run_by(how or "auto", unet, main=True)

    def make(of: dict[str, Any]) -> Step:
        sizes = of["sizes"].repeat_interleave(256, dim=1)  # as wide as their cosines and sines
        vector = torch.cat([of["pooled"], sizes], dim=1) if unet.config.vector_width else None
        told = unet.prepare(Condition(of["context"], vector=vector))
        return lambda: unet(of["x"].float(), of["t"], told)

    return make


def theirs(how: str, a: argparse.Namespace) -> Callable[[dict[str, Any]], Step]:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from ldm.checkpoints.diffusers_written import write_unet

    wide = config(a.shape).vector_width
    plain = write_unet(config(a.shape), a.side or SHAPES[a.shape], 256 if wide else 0)
    with torch.device(a.device):
        made: Any = UNet2DConditionModel.from_config(plain)
    unet = made.to(given(a, 1)["x"].dtype).eval().requires_grad_(False)
    if how == "compile":
        unet.compile(fullgraph=True, dynamic=False)  # each batch by itself, as ours

    def make(of: dict[str, Any]) -> Step:
        more = {"text_embeds": of["pooled"], "time_ids": of["sizes"]} if wide else None
        return lambda: unet(of["x"], of["t"], of["context"], added_cond_kwargs=more).sample

    return make


if __name__ == "__main__":
    run(main)
