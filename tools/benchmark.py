"""Measure speed and memory: ours beside what one would take instead, on the same random weights.

    python tools/benchmark.py step --shape small          # a guided step of the U-Net; so text, decode, encode
    python tools/benchmark.py sample --steps 10           # from prompt to pixels
    python tools/benchmark.py train --batch 4             # a training step
    python tools/benchmark.py start                       # a fresh process, until its first picture is written
    python tools/benchmark.py load --shape sd             # seconds and memory of loading a model
    python tools/benchmark.py data                        # from tar to tensor, beside webdataset and ImageFolder
    python tools/benchmark.py page --write docs/benchmarks.md     # all of these, as a page

Sides take turns in one process, none is always the first, and what counts is the ratio in each round: a machine that
has other things to do slows all of them. Seconds are the processor's and the clock's; peak memory is that of a fresh
process which does the one work alone. Nothing in the tests asserts any figure: they are the machine's as much as ours.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import data_speed  # beside this file
import sides
from turns import child, ratios, resident, spread, take_turns

from ldm.arguments import COUNT, Parser
from ldm.errors import UserError
from ldm.files import atomic_write_text
from ldm.find import find

PAIRED = ("step", "text", "decode", "encode", "sample", "train")
PEERS = {"train": ("ldm", "diffusers"), "sample": ("ldm", "diffusers")}  # others: OpenVINO too
HEAD = "| what | shape | side | CPU s | clock s | peak MB | ours, by CPU time |\n|---|---|---|---|---|---|---|"
PAGE = 4096  # bytes that a machine reads together
SCRIPT = Path(__file__).parents[1] / "scripts" / "txt2img.py"
PAGES = (  # what a page has: words of a command line each
    *([kind, "--shape", "small", "--rounds", "9"] for kind in ("step", "text", "decode", "encode")),
    *([kind, "--shape", "sd", "--rounds", "3"] for kind in ("step", "text", "decode", "encode")),
    ["sample", "--shape", "small", "--rounds", "5"],
    ["train", "--shape", "icons", "--batch", "4", "--rounds", "9"],
    ["train", "--shape", "small", "--batch", "4", "--rounds", "5"],
    ["load", "--shape", "small", "--rounds", "3"],
    ["load", "--shape", "sd", "--rounds", "1"],
    ["start", "--rounds", "3"],
)


def main() -> None:
    a = parse()
    others = {"alone": alone, "page": page, "start": start, "load": load, "data": data_speed.data}
    figures = others.get(a.kind, pairs)(a)
    if a.output:
        atomic_write_text(a.output, json.dumps(figures, indent=1) + "\n")
        print(f"wrote {a.output}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="kind", required=True, metavar=f"{' | '.join(PAIRED)} | start | load | data")
    made = {kind: commands.add_parser(kind) for kind in (*PAIRED, "load", "start", "alone")}
    for command in made.values():
        command.add_argument("--shape", choices=sides.SHAPES, default="small")
        command.add_argument("--model", help="a diffusers directory in that shape, made before (default: new)")
        command.add_argument("--sides", nargs="+", help="ldm[/torch|/compile|/graph], diffusers[/compile], openvino")
        command.add_argument("--rounds", type=COUNT, default=5, help="pairs, or fresh processes, of each side")
        command.add_argument("--batch", type=COUNT, default=1, help="pictures; guidance doubles the rows")
        command.add_argument("--side", type=COUNT, help="of the latent (default: the shape's: 16, sd 32)")
        command.add_argument("--steps", type=COUNT, default=10, help="of sample and start")
        command.add_argument("--threads", type=COUNT, default=1, help="CPU threads")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
        command.add_argument("--half", action="store_true", help="store the weights in float16")
    made["alone"].add_argument("--of", choices=(*PAIRED, "load"), required=True)
    made["page"] = commands.add_parser("page", help="all of these, as docs/benchmarks.md has them")
    made["page"].add_argument("--write", metavar="FILE")
    made["page"].add_argument("--only", nargs="+", choices=(*PAIRED, "load", "start"), help="a part of it")
    for command in (*made.values(), data_speed.add_commands(commands)):
        command.add_argument("--output", metavar="JSON", help="write the figures")
    a = parser.parse_args(words)
    if getattr(a, "sides", 0) is None:
        a.sides = PEERS.get(a.kind, ("ldm", "diffusers", "openvino") if a.kind in PAIRED else ("ldm", "diffusers"))
        there = {"openvino": a.device == "cpu" and find_spec("openvino"), "diffusers": find_spec("diffusers")}
        a.sides = [side for side in a.sides if there.get(side, True)]
    return a


class Model:
    """The model that all sides read, in a folder that goes again."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.config, self.folder = sides.shape(a.shape), tempfile.TemporaryDirectory()
        path = Path(find(a.model)) if a.model else None
        if path and not (path / "model_index.json").is_file():
            raise UserError(f"{a.model} is not a diffusers directory, the one kind that both libraries load")
        self.path = path or sides.random_model(Path(self.folder.name) / "model", self.config, a.half)


# ---------------------------------------------------------------- in pairs


def pairs(a: argparse.Namespace) -> dict[str, Any]:
    """Of each side: seconds of all rounds, by clock and processor, and the peak memory of a process of its own."""
    import torch

    torch.set_num_threads(a.threads)
    model = Model(a)
    peaks = {side: fresh(a, side, model.path)["peak"] for side in a.sides}
    sides.quiet()
    works = {side: sides.work(a.kind, side, model.path, model.config, a) for side in a.sides}
    for work in works.values():  # the first runs compile, pack, allocate
        for _ in range(2):
            work()
    wall, cpu = take_turns({side: lambda work=work: work for side, work in works.items()}, a.rounds)
    print(HEAD if a.device == "cpu" else HEAD.replace("CPU time", "the clock"))
    for side in a.sides:
        by_cpu, by_clock = (statistics.median(seconds[side]) for seconds in (cpu, wall))
        ours = spread(ratios(cpu if a.device == "cpu" else wall, a.sides[0], side), "x") if side != a.sides[0] else ""
        row = f"{by_cpu:.4f} | {by_clock:.4f} | {peaks[side] / 1e6:.0f} | {ours}"
        print(f"| {described(a)} | {a.shape} | {side} | {row} |", flush=True)
    return {"kind": a.kind, "shape": a.shape, "threads": a.threads, "cpu": cpu, "clock": wall, "peak": peaks}


def described(a: argparse.Namespace) -> str:
    said = [a.kind, f"{a.steps} steps" * (a.kind == "sample"), f"batch {a.batch}" * (a.batch > 1 or a.kind == "train")]
    return ", ".join(filter(None, [*said, a.precision * (a.precision != "fp32")]))


def fresh(a: argparse.Namespace, side: str, path: Path, of: str = "") -> dict[str, float]:
    words = [__file__, "alone", "--of", of or a.kind, "--sides", side, "--model", str(path), "--shape", a.shape]
    for name in ("batch", "side", "steps", "threads", "device", "precision"):
        words += [f"--{name}", str(getattr(a, name))] if getattr(a, name) else []
    return json.loads(child(words).splitlines()[-1])


def alone(a: argparse.Namespace) -> dict[str, float]:
    """What `fresh` runs: one side in this process, once or twice; seconds and bytes as JSON.

    Of a load: `held`, what the weights take, and `peak`, above what the imports take; of others: the whole peak.
    """
    import torch

    torch.set_num_threads(a.threads)
    model, a.kind = Model(a), a.of
    sides.quiet()
    figures = loaded(model.path, a) if a.of == "load" else {}
    if a.of != "load":
        work = sides.work(a.of, a.sides[0], model.path, model.config, a)
        for _ in range(2):
            work()
        figures["peak"] = torch.cuda.max_memory_allocated() if a.device == "cuda" else resident("VmHWM")
    print(json.dumps(figures))
    return figures


# ---------------------------------------------------------------- load


def load(a: argparse.Namespace) -> dict[str, Any]:
    """Medians over fresh processes: seconds until all weights are in memory, their bytes, the peak beyond imports."""
    model, figures = Model(a), {}
    print("| what | shape | side | CPU s | clock s | held MB | peak MB |\n|---|---|---|---|---|---|---|")
    for side in a.sides:
        runs = [fresh(a, side, model.path) for _ in range(a.rounds)]
        figures[side] = median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        row = f"{median['cpu']:.2f} | {median['clock']:.2f} | {median['held'] / 1e6:.0f} | {median['peak'] / 1e6:.0f}"
        print(f"| {described(a)} | {a.shape} | {side} | {row} |", flush=True)
    return figures


def loaded(path: Path, a: argparse.Namespace) -> dict[str, float]:
    if a.sides[0].startswith("ldm"):
        from ldm.checkpoints import opening  # noqa: F401 (its imports are not counted)
        from ldm.conditioning.clip import clip_tokenizer

        clip_tokenizer()
    else:
        from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begun, used = time.perf_counter(), time.process_time()
    if a.sides[0].startswith("ldm"):
        made = sides.open_ours(path, a)
        networks = [made.unet, *made.towers.values(), made.codec.autoencoder]
    else:
        made = sides.open_theirs(path, a)
        networks = [made.unet, made.text_encoder, made.vae]
    weights = [parameter for network in networks for parameter in network.parameters()]
    for weight in weights:  # one that is mapped and not yet read would be in memory no sooner than it is used
        weight.detach().as_strided((weight.numel(),), (1,))[:: PAGE // weight.element_size()].float().sum()
    clock, cpu = time.perf_counter() - begun, time.process_time() - used
    held = sum(weight.numel() * weight.element_size() for weight in weights)
    return {"clock": clock, "cpu": cpu, "held": held, "peak": resident("VmHWM") - before}


# ---------------------------------------------------------------- start


THEIRS = """
import warnings; warnings.simplefilter("ignore")
from ldm.conditioning.torchvision_ops import declare_missing_operators; declare_missing_operators()
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({path!r}, local_files_only=True)
pipe("a red heart", num_inference_steps={steps}, height=64, width=64).images[0].save({out!r})
"""
OURS = "import ldm; ldm.load()"


def start(a: argparse.Namespace) -> dict[str, Any]:
    """Medians over fresh processes, each from its start to its end."""
    figures: dict[str, Any] = {}
    print("| a fresh process | CPU s | clock s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder) / "theirs.py"
        path = sides.random_model(Path(folder) / "model", sides.shape("icons")) if "diffusers" in a.sides else ""
        theirs.write_text(THEIRS.format(path=str(path), steps=a.steps, out=f"{folder}/theirs.png"))
        opened = Path(folder) / "ours.py"
        opened.write_text(OURS)
        drawn = [str(SCRIPT), "--model", str(a.model or "icons"), "--prompt", "a red heart", "--steps", str(a.steps)]
        commands: dict[str, list[str]] = {
            f"scripts/txt2img.py, {a.steps} steps": [*drawn, "--out", f"{folder}/ours"],
            OURS: [str(opened)],
        }
        if "diffusers" in a.sides:
            commands[f"diffusers, a picture of {a.steps} steps, U-Net of the same shape"] = [str(theirs)]
        for name, words in commands.items():
            seconds = [_timed(words) for _ in range(a.rounds + 1)][1:]  # the first reads the files into the page cache
            cpu, clock = (statistics.median(column) for column in zip(*seconds, strict=True))
            figures[name] = {"cpu": cpu, "clock": clock, "all": seconds}
            print(f"| {name} | {cpu:.2f} | {clock:.2f} |", flush=True)
    return figures


def _timed(words: Sequence[str]) -> tuple[float, float]:
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child(words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - begun


# ---------------------------------------------------------------- page


WHY = """
On a CPU our networks run with weights that oneDNN has reordered once (`ldm/backends/packed.py`), where eager torch, and
diffusers on it, reorders them at every call; a training's linear layers are oneDNN's too (`ldm/backends/trained.py`),
because MKL, which torch has for them, reached 100 GFLOP/s here and oneDNN 240.

What is left between ours and OpenVINO in small networks is the price of a call. Of 45 ms of a step of `small`, little
else running, 28 were in oneDNN's kernels, at 230 to 280 GFLOP/s, which is what the processor has; about 10 in norms,
activations, attention and sums; about 7 are what 510 operators cost before they compute (the same network with almost
nothing to compute), 117 of them oneDNN's at 10 microseconds each (a linear layer of torch's own: 1.5). Beside other
processes ours takes 52 to 56 ms and OpenVINO's stays at 37 to 39: probably torch's and Python's code leaves the caches.
Tried without gain: sums as part of the convolution before them (equal), of the linear layer (1 ms more for each call,
whose kernel is made anew), feed-forward gates in the matrix product (slower). `--backend openvino` has OpenVINO's
own speed: the U-Net is converted in 3 to 4 seconds for `small` at its first step, its weights are held twice, and what
looks into its layers runs the layers themselves. OpenVINO's disk cache would save .4 of these seconds and take as much
room as the weights, so it is not used.

The peak of a fresh process: of 680 MB of `step`, torch takes 229, the weights of all three networks 282, a tokenizer
53, and most of the rest is what packing leaves between blocks of memory. diffusers imports 231 MB more than torch, but
maps its files, so that a work which needs one network never reads the other two; hence ours is larger for `text`,
`decode`, `encode` and the `sd` step, where the other two are 820 MB and packing leaves about 400. Both hold the
float32 weights that they use once, so little but imports can be saved. The peak of OpenVINO's process includes
converting the network.
"""


def page(a: argparse.Namespace) -> list[str]:
    """docs/benchmarks.md: each part is a process of its own, which prints its table."""
    parts = [f"# Speed and memory\n\n{surroundings()}\n{WHY}"]
    for words in PAGES:
        if a.only and words[0] not in a.only:
            continue
        parts.append(f"\n`python tools/benchmark.py {' '.join(words)}`\n\n{child([__file__, *words])}")
        print(parts[-1], flush=True)
    if a.write:
        atomic_write_text(a.write, "".join(parts))
    return parts


def surroundings() -> str:
    """The machine in a sentence."""
    import torch

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    busy = f"{os.getloadavg()[0]:.1f} processes wanted to run as it began" if hasattr(os, "getloadavg") else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return (
        f"Printed by `python tools/benchmark.py page --write docs/benchmarks.md` (after "
        f"`pip install -e '.[peers,openvino]'`) on {name}, {os.cpu_count()} cores, "
        f"each work in one thread; {versions}; {time.strftime('%Y-%m-%d', time.gmtime())}; {busy}. Ratios are how many "
        "times as fast as the side ours was, in each round: median (least to largest)."
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    run(main)
