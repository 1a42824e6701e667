"""`tools/benchmark.py train`: a training step beside that of diffusers' U-Net of the same shape, with the same weights.

Like against like: one optimizer (AdamW, fused), one loss, gradients clipped, channels_last and SDPA on both sides, the
same inputs. The two take turns step by step. Peak memory is that of a fresh process for each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

from turns import child, ratios, resident, spread, take_turns

from ldm.arguments import COUNT
from ldm.home import recipe

WARM = 3  # steps that are not counted: the first ones allocate, compile and fill the optimizer's state


def add_network(command: argparse.ArgumentParser, batch: int, threads: int | None) -> None:
    """Which network is measured, on what; with the default `batch` and `threads`."""
    command.add_argument("--config", type=recipe("diffusion"), required=True, help="YAML of scripts/train_diffusion.py")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    command.add_argument("--side", type=COUNT, default=16, help="of the latent")
    command.add_argument("--length", type=COUNT, default=32, help="of the context, tokens")
    command.add_argument("--batch", type=COUNT, default=batch, help="samples of a training step")
    command.add_argument("--threads", type=COUNT, default=threads, help="CPU threads")


def add_commands(commands: Any) -> argparse.ArgumentParser:
    """`train`, and `trained`, which it runs in processes of their own."""
    speed = commands.add_parser("train", help="a training step beside diffusers' U-Net of the same shape")
    one = commands.add_parser("trained")
    for command in (speed, one):
        add_network(command, batch=8, threads=1)
        command.add_argument("--compile", action="store_true", help="torch.compile on both sides")
        command.add_argument("--device", default="cpu")
        command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of autocast")
    speed.add_argument("--rounds", type=COUNT, default=10, help="pairs of steps")
    one.add_argument("--by", choices=("ldm", "diffusers"), required=True)
    return speed


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples/s and peak memory of both, and the median ratio of pairs of steps."""
    ours, theirs, parameters = _steps(arguments)
    for work in (ours, theirs):
        for _ in range(WARM):
            work()
    seconds, cpu = take_turns({"ldm": lambda: ours, "diffusers": lambda: theirs}, arguments.rounds)
    memory = {name: _in_a_process(arguments, name) for name in seconds}
    by_clock, by_cpu = (ratios(each, "ldm", "diffusers") for each in (seconds, cpu))
    figures: dict[str, Any] = {
        "parameters": parameters,
        "threads": arguments.threads,
        "compiled": arguments.compile,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": memory,
        "speed_ratio": statistics.median(by_clock),
        "speed_ratio_cpu": statistics.median(by_cpu),
    }
    how = "compiled" if arguments.compile else "eager"
    shape = f"{parameters / 1e6:.2f} M parameters, batch {arguments.batch}, side {arguments.side}"
    print(f"{shape}, {how}, {arguments.precision} on {arguments.device}, {arguments.threads} threads")
    for name in seconds:
        rate = arguments.batch / statistics.median(seconds[name])
        steady = arguments.batch / statistics.median(cpu[name])
        print(f"{name:10s}{rate:8.2f} samples/s  {steady:8.2f} samples/s of CPU time  peak {memory[name]:7.0f} MB")
    for what, each in (("by the clock", by_clock), ("by CPU time", by_cpu)):
        print(f"ldm / diffusers {what}: {spread(each, of=f' over {len(each)} pairs of steps')}")
    return figures


def trained(arguments: argparse.Namespace) -> None:
    """Steps of one of the two alone; prints the peak memory of this process, or of the GPU, in MB."""
    import torch

    ours, theirs, _ = _steps(arguments, arguments.by)
    for _ in range(WARM):
        (ours if arguments.by == "ldm" else theirs)()
    print(torch.cuda.max_memory_allocated() / 1e6 if arguments.device != "cpu" else resident("VmHWM") / 1e6)


def _in_a_process(arguments: argparse.Namespace, by: str) -> float:
    words = [sys.argv[0], "trained", "--by", by, "--config", str(arguments.config), *arguments.overrides]
    for name in ("side", "length", "batch", "threads", "device", "precision"):
        words += [f"--{name}", str(getattr(arguments, name))]
    return float(child(words).splitlines()[-1])  # never compiled


def _steps(arguments: argparse.Namespace, by: str = "") -> tuple[Callable[[], None], Callable[[], None], int]:
    """A training step of ours and one of theirs; with `by`, the other is not built."""
    import torch
    import torch.nn.functional as F

    from ldm.checkpoints.diffusers import unet_names
    from ldm.config import DiffusionTraining, load
    from ldm.unet.unet import UNet

    torch.set_num_threads(arguments.threads)
    config = load(DiffusionTraining, arguments.config, arguments.overrides).model
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    network = UNet(config)
    for parameter in network.parameters():  # the zeroed ones too, or their gradients would be
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
    x = torch.randn(arguments.batch, config.in_channels, arguments.side, arguments.side, device=device)
    target = torch.randn_like(x)
    t = torch.rand(arguments.batch, device=device) * 999
    context = torch.randn(arguments.batch, arguments.length, config.context_width, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in network.parameters())

    def step_of(module: Any, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        module.to(device=device, memory_format=torch.channels_last).train()
        if arguments.compile:
            module.compile()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                output = forward()
            F.mse_loss(output.float(), target).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return step

    def nothing() -> None: ...

    ours = theirs = nothing
    if by != "ldm":
        other = _peer(config, arguments.side)
        names = unet_names(network.state_dict())
        other.load_state_dict({names[name][0]: value for name, value in network.state_dict().items()})
        with torch.no_grad():  # the same function, or there is nothing to compare
            row = (x[:1].cpu(), t[:1].cpu(), context[:1].cpu())
            torch.testing.assert_close(network(*row), other(*row).sample, rtol=1e-3, atol=1e-3)
        theirs = step_of(other, lambda: other(x, t, context).sample)
    if by != "diffusers":
        ours = step_of(network, lambda: network(x, t, context))
    return ours, theirs, parameters


def _peer(config: Any, side: int) -> Any:
    from ldm.checkpoints import diffusers_configs
    from ldm.conditioning.torchvision_ops import declare_missing_operators

    declare_missing_operators()  # its models import transformers, which imports torchvision
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    plain = {k: v for k, v in diffusers_configs.write_unet(config, side).items() if not k.startswith("_")}
    return UNet2DConditionModel(**plain)
