"""Measure speed: nothing in the tests asserts any, since it is the machine's as much as ours.

    python tools/benchmark.py start                     # a fresh process, until its first picture is written
    python tools/benchmark.py unet --config configs/diffusion/icons.yaml    # samples/s of training and sampling
    python tools/benchmark.py load                      # memory and seconds to load a model, beside diffusers
    python tools/benchmark.py train --config configs/diffusion/icons.yaml   # a training step, beside diffusers
    python tools/benchmark.py data                      # from tar to tensor, beside webdataset and ImageFolder

Torch is imported only by what measures in this process: `start` measures others, and must not be in their way.
"""

from __future__ import annotations

import time

BEGUN = time.time()  # before any other import, for the traced process

from ldm.script import run  # noqa: E402

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import data_speed  # noqa: E402 (beside this file)
import train_speed  # noqa: E402
from turns import child, resident  # noqa: E402

from ldm.arguments import COUNT, Parser  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files import atomic_write_text  # noqa: E402
from ldm.find import find  # noqa: E402

PAGE = 4096  # bytes that a machine reads together
SCRIPT = Path(__file__).parents[1] / "scripts" / "txt2img.py"


def main() -> None:
    arguments = parse()
    if arguments.command in ("trace", "loaded", "trained"):
        {"trace": trace, "loaded": loaded, "trained": train_speed.trained}[arguments.command](arguments)
        return
    measures = {"start": start, "unet": unet, "load": load, "train": train_speed.train, "data": data_speed.data}
    figures = measures[arguments.command](arguments)
    if arguments.output:
        atomic_write_text(arguments.output, json.dumps(figures, indent=1) + "\n")
        print(f"wrote {arguments.output}")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="start | unet | load | train | data")

    first = commands.add_parser("start", help="seconds from a fresh process to the first picture, and where they go")
    traced = commands.add_parser("trace")  # what `start` runs in a process of its own
    for command in (first, traced):
        command.add_argument("--model", default="icons", help="shipped name, directory or file")
        command.add_argument("--prompt", default="a red heart")
        command.add_argument("--steps", type=COUNT, default=30)
        command.add_argument("--cfg", type=float, default=7.5)
    first.add_argument("--runs", type=COUNT, default=5, help="measured runs of each kind; one more goes before")
    traced.add_argument("--spawned", type=float, required=True)
    traced.add_argument("--out", required=True)

    network = commands.add_parser("unet", help="a training step and a guided sampling step of a configuration's U-Net")
    train_speed.add_network(network, batch=32, threads=None)
    network.add_argument("--pictures", type=COUNT, default=1, help="of a sampling step; guidance doubles the batch")
    network.add_argument("--seconds", type=float, default=10.0, help="how long each is measured")

    memory = commands.add_parser("load", help="peak memory and seconds of loading a model onto the CPU, and diffusers'")
    memory.add_argument("--model", help="a diffusers directory; default: v1's shapes in float16, random, made for this")
    memory.add_argument("--precision", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"])
    memory.add_argument("--runs", type=COUNT, default=3, help="fresh processes of each kind; the median counts")
    one = commands.add_parser("loaded")  # what `load` runs in a process of its own
    one.add_argument("--model", required=True)
    one.add_argument("--precision", required=True)
    one.add_argument("--by", choices=("ldm", "diffusers"), required=True)

    for command in (first, network, memory, train_speed.add_commands(commands), data_speed.add_commands(commands)):
        command.add_argument("--output", metavar="JSON", help="write the figures")
    return parser.parse_args()


# ---------------------------------------------------------------- start


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over runs: the whole of scripts/txt2img.py, then the same work with a clock between its stages."""
    options = ["--model", arguments.model, "--prompt", arguments.prompt]
    options += ["--steps", str(arguments.steps), "--cfg", str(arguments.cfg)]
    whole: list[float] = []
    stages: list[dict[str, float]] = []
    for turn in range(arguments.runs + 1):  # the first one reads the files into the page cache
        with tempfile.TemporaryDirectory() as folder:
            begun = time.time()
            child([str(SCRIPT), *options, "--out", folder])
            seconds = time.time() - begun
            begun = time.time()
            printed = child([__file__, "trace", *options, "--spawned", repr(begun), "--out", folder])
            marks = json.loads(printed.splitlines()[-1])
            marks["leave"] = time.time() - begun - sum(marks.values())
        if turn:
            whole.append(seconds)
            stages.append(marks)
    figures = {name: statistics.median(marks[name] for marks in stages) for name in stages[0]}
    total = statistics.median(whole)
    print(f"scripts/txt2img.py, {arguments.steps} steps, {os.cpu_count()} cores: {total:.2f} s from start to end")
    print(f"  {arguments.runs} runs, {min(whole):.2f} to {max(whole):.2f} s; where the time goes:")
    for name, seconds in figures.items():
        print(f"  {name:24s}{seconds:6.2f} s")
    return {"seconds": total, "all": whole, "stages": figures, "steps": arguments.steps, "cores": os.cpu_count()}


def trace(arguments: argparse.Namespace) -> None:
    """What scripts/txt2img.py does for one prompt, in the same order; prints seconds of each stage as JSON."""
    marks = {"python": BEGUN - arguments.spawned}
    last = BEGUN

    def mark(name: str) -> None:
        nonlocal last
        now = time.time()
        marks[name] = now - last
        last = now

    import torch

    mark("import torch")
    from ldm import api, generate, image_io, jobs, provenance

    mark("import ldm")
    from ldm.conditioning.clip import clip_tokenizer
    from ldm.conditioning.torchvision_ops import declare_missing_operators

    declare_missing_operators()
    import open_clip.transformer  # noqa: F401

    mark("import open_clip")
    clip_tokenizer()
    mark("make the tokenizer")
    made = api.load(arguments.model)
    mark("load the model")
    requests = jobs.of_prompts([arguments.prompt])
    settings = jobs.Settings(cfg=arguments.cfg, steps=arguments.steps)
    with torch.inference_mode():
        generate.conditions(made, [jobs.Ask(arguments.prompt), jobs.Ask()])
    mark("encode the prompt")
    steps = list(generate.sample(made, requests, settings.plan()))
    mark(f"sample, {arguments.steps} steps")
    image = generate.decode(made, steps[-1])
    mark("decode")
    metadata = provenance.record(made, settings, requests, 0)
    image_io.save_png(image[0], Path(arguments.out) / "traced.png", metadata)
    mark("hash the model and save")
    print(json.dumps(marks))


# ---------------------------------------------------------------- unet


def unet(arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples/s of a training step (forward, backward, AdamW) and pictures x steps/s of guided sampling, float32."""
    import torch

    from ldm.conditioning.condition import Condition
    from ldm.config import DiffusionTraining, load
    from ldm.unet.unet import UNet

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = load(DiffusionTraining, arguments.config, arguments.overrides).model
    network = UNet(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = sum(p.numel() for p in network.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x = torch.randn(batch, config.in_channels, arguments.side, arguments.side)
        context = torch.randn(batch, arguments.length, config.context_width) if config.context_width else None
        return x.contiguous(memory_format=torch.channels_last), torch.rand(batch) * 999, context

    x, t, context = inputs(arguments.batch)

    def training_step() -> None:
        optimizer.zero_grad()
        network(x, t, context).square().mean().backward()
        optimizer.step()

    training = seconds_each(training_step, arguments.seconds)

    x2, t2, context2 = inputs(2 * arguments.pictures)
    network.eval().requires_grad_(False)
    with torch.inference_mode():
        told = network.prepare(Condition(context2)) if context2 is not None else None
        sampling = seconds_each(lambda: network(x2, t2, told), arguments.seconds)

    figures = {
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "training_samples_per_second": arguments.batch / training,
        "guided_step_seconds": sampling,
        "guided_picture_steps_per_second": arguments.pictures / sampling,
    }
    latent = f"{config.in_channels}x{arguments.side}x{arguments.side}"
    print(f"{parameters / 1e6:.2f} M parameters, latents {latent}, {figures['threads']} threads")
    rate = arguments.batch / training
    print(f"training, batch {arguments.batch}: {rate:.1f} samples/s ({training * 1e3:.0f} ms a step)")
    print(f"guided sampling, {arguments.pictures} pictures: {sampling * 1e3:.1f} ms a step")
    return figures


def seconds_each(work: Callable[[], object], seconds: float) -> float:
    """The median duration of `work` over `seconds`, three times at least, after two turns to warm up."""
    work()
    work()
    durations: list[float] = []
    until = time.perf_counter() + seconds
    while len(durations) < 3 or time.perf_counter() < until:
        begun = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begun)
    return statistics.median(durations)


# ---------------------------------------------------------------- load


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each precision and library: seconds until all weights are in memory, their bytes, the peak above imports."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(find(arguments.model) if arguments.model else random_v1(Path(folder) / "v1"))
        if not (Path(path) / "model_index.json").is_file():
            raise UserError(f"{arguments.model} is not a diffusers directory, the one kind that both libraries load")
        print("weights held, peak memory above what the imports take, their ratio, seconds")
        for precision in arguments.precision:
            for library in ("ldm", "diffusers"):
                words = [__file__, "loaded", "--model", path, "--precision", precision, "--by", library]
                runs = [json.loads(child(words).splitlines()[-1]) for _ in range(arguments.runs)]
                median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                figures[f"{library} {precision}"] = median
                held, peak = median["held"] / 1e9, median["peak"] / 1e9
                row = f"{held:5.2f} GB {peak:6.2f} GB {peak / held:6.2f} {median['seconds']:7.1f} s"
                print(f"  {library:10s}{precision}  {row}")
    return figures


def random_v1(path: Path) -> Path:
    """A diffusers directory of Stable Diffusion v1's shapes, random, in float16: about 2 GB."""
    import torch

    from ldm.checkpoints import export, native
    from ldm.checkpoints.architectures import SD_V1
    from ldm.checkpoints.networks import skeleton

    states = {}
    for name in native.part_names(SD_V1):
        shapes = {key: value.shape for key, value in skeleton(name, SD_V1, path).state_dict().items()}
        states[name] = {key: torch.randn(shape, dtype=torch.float16) * 0.02 for key, shape in shapes.items()}
    export.write(path, SD_V1, states, "diffusers")
    return path


def loaded(arguments: argparse.Namespace) -> None:
    """Load once in this process; prints seconds and bytes as JSON. Linux alone tells a process its peak."""
    work = {"ldm": by_ldm, "diffusers": by_diffusers}[arguments.by](arguments.model, arguments.precision)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begun = time.perf_counter()
    weights = [parameter for network in work() for parameter in network.parameters()]
    for weight in weights:  # one that is mapped and not yet read would be in memory no sooner than it is used
        dense = weight.detach().as_strided((weight.numel(),), (1,))
        dense[:: PAGE // weight.element_size()].float().sum()
    seconds = time.perf_counter() - begun
    held = sum(weight.numel() * weight.element_size() for weight in weights)
    print(json.dumps({"seconds": seconds, "held": held, "peak": resident("VmHWM") - before}))


def by_ldm(path: str, precision: str) -> Callable[[], Sequence[Any]]:
    """With everything imported, what loads the model and gives its networks."""
    from ldm import api
    from ldm.checkpoints import opening  # noqa: F401
    from ldm.conditioning.torchvision_ops import declare_missing_operators

    declare_missing_operators()
    import open_clip.transformer  # noqa: F401

    def work() -> Sequence[Any]:
        made = api.load(path, "cpu", precision)
        return [made.unet, *made.towers.values(), made.codec.autoencoder]

    return work


def by_diffusers(path: str, precision: str) -> Callable[[], Sequence[Any]]:
    """The same of diffusers."""
    import torch

    from ldm.conditioning.torchvision_ops import declare_missing_operators

    declare_missing_operators()
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]

    def work() -> Sequence[Any]:
        pipe: Any = StableDiffusionPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        return [pipe.unet, pipe.text_encoder, pipe.vae]

    return work


if __name__ == "__main__":
    run(main)
