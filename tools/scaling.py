"""What training Stable Diffusion's U-Net on a billion pictures costs on 8 to 1024 GPUs; prints docs/scaling.md's table.

    python tools/scaling.py
    python tools/scaling.py --rate 18 --interconnect 50 --failures 2 --batch 4096

Every number is one of three kinds: measured here, of a published source, or an assumption; `Inputs` says which. The
formulas are the functions below, and each is a line of arithmetic. Replace the inputs by your cluster's.
"""

from __future__ import annotations

from ldm.script import run

import math
from dataclasses import dataclass, fields

from ldm.arguments import Parser, add_fields, taken
from ldm.errors import UserError

DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Inputs:
    """The model, the data, one GPU, and the cluster around it."""

    parameters: float = 859.52e6  # of the U-Net; counted: Stable Diffusion v1's configuration in ldm/config.py
    pictures: float = 1e9  # samples seen in all; assumption: one epoch
    batch: float = 2048  # global; assumption: Stable Diffusion v1's own, which 2 to 1024 GPUs divide
    rate: float = 137.5  # samples/s of one GPU at 256 px, cached latents; published: 1100 on 8 A100 (MosaicML, SD 2)
    bytes_picture: float = 60e3  # of a 256 px JPEG with its caption; assumption
    bytes_latent: float = 134.7e3  # cached: moments 8 x 32 x 32 and one context 77 x 768, in float16; computed
    decode: float = (
        300.0  # pictures/s that one CPU core decodes and resizes; assumption: measure with `benchmark.py data`
    )
    interconnect: float = 25e9  # bytes/s of one GPU's share of the network between nodes; assumption: 200 Gbit/s
    inside: float = (
        250e9  # bytes/s of one GPU to its neighbours in a node of 8; assumption: NVLink, measured all-reduce
    )
    latency: float = 20e-6  # seconds of one hop; assumption
    overlap: float = 0.7  # share of the all-reduce that hides behind the backward pass; assumption (DDP's buckets)
    storage: float = 2e9  # bytes/s that one process writes to shared storage; assumption
    hash_rate: float = 1.8e9  # bytes/s of SHA-256 on one core; measured on the project's own machine
    failures: float = (
        1 / 365
    )  # of one GPU and its share of a node, a day; assumption; Llama 3: 419 in 54 days on 16,384
    restart: float = 600.0  # seconds from a failure to the next step; assumption: queue, import, state, first batch
    index_bytes: float = 34.0  # of memory a sample and process, three members and a key of 9 letters; measured
    index_seconds: float = 11e-6  # to read an index and open what it names, a sample and core; measured
    watts: float = 700.0  # of one GPU with its share of the node; assumption


@dataclass(frozen=True)
class Row:
    """What it comes to on `gpus`."""

    gpus: int
    samples_per_s: float
    days: float
    efficiency: float  # of the samples/s of as many single GPUs
    allreduce_s: float  # of one step, before overlap
    step_s: float
    data_mb_s: float  # of pictures, from wherever they are
    cores: float  # CPU cores that decode them
    failures_day: float
    save_minutes: float  # the interval between saves that loses least
    lost_share: float  # of the time, by saving, work done again, and restarts
    gpu_days: float
    mwh: float


def state_bytes(inputs: Inputs, profiles: int = 0) -> float:
    """Weights, Adam's two moments, one average, all float32; and as many power-function averages as are kept."""
    return 4 * inputs.parameters * (4 + profiles)


def save_seconds(inputs: Inputs) -> float:
    """A state is written by one process and then hashed; the others wait."""
    return state_bytes(inputs) * (1 / inputs.storage + 1 / inputs.hash_rate)


def allreduce_seconds(inputs: Inputs, gpus: int, bytes_each: float = 4.0) -> float:
    """A ring moves 2 (n - 1) / n of the gradients through each member's link, in 2 (n - 1) hops.

    In two layers: within nodes of 8, then between nodes, where each of the 8 carries an eighth (as NCCL does).
    """
    size = bytes_each * inputs.parameters
    inside = min(gpus, 8)
    nodes = math.ceil(gpus / 8)
    ring = 2 * (inside - 1) / inside * size / inputs.inside + 2 * (inside - 1) * inputs.latency
    between = 2 * (nodes - 1) / nodes * size / inside / inputs.interconnect + 2 * (nodes - 1) * inputs.latency
    return ring + between


def best_interval(save: float, mean_time: float) -> float:
    """Seconds between saves that lose least: sqrt(2 save mean_time) (Young 1974), mean_time that between failures."""
    return math.sqrt(2 * save * mean_time)


def lost(save: float, interval: float, mean_time: float, restart: float) -> float:
    """Share of the time: saves, half an interval for each failure, and the restart."""
    return save / interval + (interval / 2 + restart) / mean_time


def row(inputs: Inputs, gpus: int) -> Row:
    if inputs.batch / gpus < 1:
        raise UserError(f"a global batch of {inputs.batch:g} is less than one sample for each of {gpus} GPUs")
    compute = inputs.batch / gpus / inputs.rate
    reduce = allreduce_seconds(inputs, gpus)
    step = compute + max(reduce - inputs.overlap * compute, (1 - inputs.overlap) * reduce)
    mean_time = DAY / (inputs.failures * gpus)
    save = save_seconds(inputs)
    interval = best_interval(save, mean_time)
    share = lost(save, interval, mean_time, inputs.restart)
    rate = inputs.batch / step
    days = inputs.pictures / rate / DAY / (1 - share)
    return Row(
        gpus,
        rate,
        days,
        rate / (gpus * inputs.rate),
        reduce,
        step,
        rate * inputs.bytes_picture / 1e6,
        rate / inputs.decode,
        inputs.failures * gpus,
        interval / 60,
        share,
        days * gpus,
        days * 24 * gpus * inputs.watts / 1e6,
    )


HEADS = (
    ("GPUs", "gpus", "{:d}"),
    ("samples/s", "samples_per_s", "{:,.0f}"),
    ("days", "days", "{:.2f}"),
    ("efficiency", "efficiency", "{:.0%}"),
    ("step s", "step_s", "{:.3f}"),
    ("all-reduce s", "allreduce_s", "{:.3f}"),
    ("data MB/s", "data_mb_s", "{:,.0f}"),
    ("decoding cores", "cores", "{:,.0f}"),
    ("failures/day", "failures_day", "{:.2f}"),
    ("save every min", "save_minutes", "{:.0f}"),
    ("lost", "lost_share", "{:.2%}"),
    ("GPU-days", "gpu_days", "{:,.0f}"),
    ("MWh", "mwh", "{:.1f}"),
)


def table(inputs: Inputs, gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)) -> str:
    """Markdown."""
    rows = [row(inputs, n) for n in gpus]
    lines = ["| " + " | ".join(head for head, _, _ in HEADS) + " |", "|" + "---:|" * len(HEADS)]
    lines += ["| " + " | ".join(form.format(getattr(each, name)) for _, name, form in HEADS) + " |" for each in rows]
    return "\n".join(lines)


def summary(inputs: Inputs) -> str:
    """What does not depend on the number of GPUs."""
    pictures, latents = (inputs.pictures * each / 1e12 for each in (inputs.bytes_picture, inputs.bytes_latent))
    return (
        f"A state is {state_bytes(inputs) / 1e9:.2f} GB, written and hashed in {save_seconds(inputs):.1f} s; each "
        f"power-function average adds {4 * inputs.parameters / 1e9:.2f} GB. "
        f"{inputs.pictures / inputs.batch:,.0f} steps of {inputs.batch:,.0f} samples. "
        f"The pictures are {pictures:.0f} TB, their cached latents {latents:.0f} TB. "
        f"Opened as one set, they take each process {inputs.pictures * inputs.index_seconds / 60:.0f} minutes and "
        f"{inputs.pictures * inputs.index_bytes / 1e9:.0f} GB, {8 * inputs.pictures * inputs.index_bytes / 1e9:.0f} GB "
        "on a node of 8; in parts of a hundredth, a hundredth of both."
    )


def main() -> None:
    parser = Parser(description=__doc__)
    add_fields(parser.add_argument, Inputs)
    inputs = Inputs(**taken(parser.parse_args(), Inputs))
    for field in fields(Inputs):
        value = getattr(inputs, field.name)
        if value == math.inf or (value <= 0 and field.name not in ("overlap", "latency")):
            raise UserError(f"--{field.name.replace('_', '-')} is {value:g}; it must be a finite number above 0")
    print(summary(inputs) + "\n")
    print(table(inputs))


if __name__ == "__main__":
    run(main)
