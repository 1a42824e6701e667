"""Two networks at equal compute: a transformer and a U-Net learn the same pictures in the same processor time.

Data, latents, law, rate and batch are those of configs/diffusion/mmdit_tiny.yaml. A step of each is timed first, and
each gets as many as fit into its share of processor time: a busy machine changes nothing but how long one waits.
The error is `validation/error` over the pictures trained on, with noise of its own, of averaged weights: the mean of
(1 + 1 / sigma^2) |D - x0|^2, 1 for who knows nothing. One seed, one size: it says nothing of large networks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.backends.trained import trained
from ldm.config import DiffusionTraining, load
from ldm.files import atomic_write_text
from ldm.home import recipe
from ldm.training.draws import Draws
from ldm.training.loop import carry_out
from ldm.training.stage_two import DiffusionStage, diffusion_stage

UNET = (
    "{kind: unet, in_channels: 16, out_channels: 16, channels: 40, multipliers: [1, 2], blocks: 1, "
    "attention_levels: [1], heads: 0, head_width: 40, linear_projection: true, context_width: 192}"
)
NETWORKS = {
    "DiT, 96 wide, 6 blocks, one stream": (),
    "U-Net, 40 channels x (1, 2), one block a level": (f"model={UNET}",),
}
TIMED = 12  # steps, of which the first two, which allocate, do not count
HEAD = ("network", "parameters", "forward pass", "processor time of a step", "steps", "loss at the last", "error")


def run(shards: str, minutes: float, folder: Path, words: Sequence[str] = ()) -> None:
    """Train both for `minutes` of processor time each, print a Markdown table, and write it. `words`: more settings."""
    os.environ["ACCELERATE_USE_CPU"] = "true"  # whose time it is, also beside a GPU
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for i, (name, own) in enumerate(NETWORKS.items()):
        output = folder / ("transformer", "unet")[i]
        plain = [f"data.shards={shards}", f"data.validation={shards}", "autoencoder=icons", "text=icons"]
        plain += ["loop.threads=1", "loop.precision=fp32", "sample.prompts=[]", f"output={output}", *own, *words]
        stage = diffusion_stage(settings(plain), 0, 1, torch.device("cpu"))
        numbers, flops, seconds = about(stage)
        steps = max(2, int(60 * minutes / seconds))
        ends = [
            f"loop.steps={steps}",
            f"loop.validate_every={steps}",
            f"loop.log_every={min(100, steps)}",
            "resume=auto",
        ]
        carry_out(settings([*plain, *ends]), diffusion_stage)
        found: dict[str, Any] = {}
        for line in (output / "log.jsonl").read_text().splitlines():
            found |= json.loads(line)
        figures = f"{numbers / 1e6:.2f} M | {flops / 1e6:.0f} MFLOP | {seconds:.3f} s | {steps}"
        lines.append(f"| {name} | {figures} | {found['loss']:.3f} | {found['validation/error']:.3f} |")
    print("\n".join(lines))
    atomic_write_text(folder / "networks.md", "\n".join(lines) + "\n")


def settings(words: Sequence[str]) -> DiffusionTraining:
    return load(DiffusionTraining, recipe("diffusion")("mmdit_tiny"), list(words))


def about(stage: DiffusionStage) -> tuple[int, int, float]:
    """Parameters, floating point operations of one picture's forward pass, and processor seconds of a step."""
    torch.set_num_threads(1)
    network, batch = stage.trained.module, next(iter(stage.batches))
    x0, told = stage.inputs(batch, Draws(0, 0, batch.key))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x0[:1], torch.full((1,), 500.0), type(told)(told.context[:1]))  # type: ignore[index]
    trained(network)  # as the run has it, by products that nobody counts
    optimizer = torch.optim.AdamW(network.parameters(), 0.0)
    spent: list[float] = []
    for step in range(TIMED):
        begun = time.process_time()
        for _, loss, _ in stage.losses(batch, Draws(0, step, batch.key), step, {"unet": network}):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent.append(time.process_time() - begun)
    numbers = sum(p.numel() for p in network.parameters())
    return numbers, counter.get_total_flops(), sorted(spent[2:])[len(spent[2:]) // 2]
