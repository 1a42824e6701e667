"""Encode pictures and captions once, so that stage two need not at every step (latents=DIR of train_diffusion.py).

    python tools/precompute_latents.py --autoencoder runs/ae --text runs/clip --shards 'data/train-*.tar' \\
        --where 'style=noto emoji,flat emoji' --size 64 --flip --output data/latents

or with the file and the words of the training to come:

    python tools/precompute_latents.py --config configs/diffusion/icons.yaml autoencoder=runs/ae latents=data/latents

Written are posterior moments (in float32: beside the contexts they are small) of each picture, with --flip of its
mirror image too, and the context of each of its captions (float16), with a fingerprint of the networks and the picture
size. Both networks may come from any file that --model of scripts/txt2img.py takes. The tool goes on where an earlier
run of it was interrupted, and refuses a folder of other latents. With --processes N the samples are
divided into N ranges, each encoded by a process (and GPU, where there are several) of its own; an interrupted run goes
on with the same N.
"""

from __future__ import annotations

from ldm.script import end_with_parent, run

import argparse
import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ldm.arguments import COUNT, SIDE, Parser, add_machine
from ldm.config import DiffusionTraining, load
from ldm.device import choose_device, choose_precision, precision_name
from ldm.errors import UserError
from ldm.home import recipe
from ldm.locks import held
from ldm.options import WHERE_HELP, where_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.autoencoder.codec import Codec
    from ldm.conditioning.encoder import Encoder
    from ldm.data.latent_writing import LatentSources, LatentWriter, SourceBatch


def main() -> None:
    arguments = parse()
    config = settings(arguments)
    from ldm.data.latent_writing import check_parts, part_folder  # torch takes seconds, and a mistake is told before

    folder = Path(config.latents)
    if arguments.part is not None:
        end_with_parent()
        folder = part_folder(folder, arguments.part, arguments.processes)
    with held(folder):
        if arguments.part is not None:
            encode(arguments, config, folder, arguments.part, arguments.processes)
            return
        check_parts(folder, arguments.processes)
        if arguments.processes > 1:
            divide(arguments, folder)
        else:
            encode(arguments, config, folder, 0, 1)


def encode(arguments: argparse.Namespace, config: DiffusionTraining, folder: Path, part: int, parts: int) -> None:
    """Write the latents of one of the equal parts that the pictures are divided into."""
    import torch

    from ldm.checkpoints.opening import open_checkpoint, open_towers
    from ldm.conditioning.encoder import Encoder
    from ldm.data.latent_writing import LatentSources, LatentWriter
    from ldm.data.latents import latent_fingerprint

    device = choose_device(arguments.device)
    dtype = choose_precision(arguments.precision, device)
    autoencoder = open_checkpoint(config.autoencoder).only("autoencoder")
    text = open_towers(config.text, config.text_2, config.encoder.t5_tokens > 0) if config.text else None
    for notice in (*autoencoder.notices, *(() if text is None else text.notices)):
        print(f"note: {notice}", file=sys.stderr)
    codec = autoencoder.load("autoencoder", device, dtype)
    encoder = Encoder({} if text is None else text.load_towers(device, dtype), config.encoder, config.model.classes)
    codec.latent_shape(config.data.size, config.data.size)  # UserError for a size that f does not divide

    sources = LatentSources(config.data)
    fingerprint = latent_fingerprint(autoencoder, text, config.data, config.encoder)
    first, stop = (len(sources) * edge // parts for edge in (part, part + 1))
    writer = LatentWriter(
        folder,
        fingerprint,
        sources.fingerprint,
        config.data.flip,
        arguments.shard_samples,
        first=first,
        precision=precision_name(dtype),
    )
    if writer.complete:
        print(f"{folder} is complete already")
        return
    if writer.start > first:
        print(f"going on at sample {writer.start} of {len(sources)}", flush=True)
    with torch.inference_mode():
        written, cut = precompute(codec, encoder, device, sources, writer, config.data.flip, arguments.batch, stop)
    print(f"wrote {written} samples to {folder}")
    if cut and encoder.text is not None:
        length = encoder.text.config.context_length
        print(f"note: {cut} captions are longer than the text tower's {length} tokens and were cut")


def divide(arguments: argparse.Namespace, folder: Path) -> None:
    """Run this tool once for each part, all at a time, and make one set of what they wrote.

    Raises UserError with the last words of a process that failed; the others end with it, and go on when run again.
    """
    from ldm.data.latent_writing import merge_parts
    from ldm.data.latents import MANIFEST

    parts = arguments.processes
    if (folder / MANIFEST).exists():  # check_parts has seen that it is not of an unfinished run
        print(f"{folder} is complete already")
        return
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parts)), **os.environ}
    gpus = visible_gpus() if choose_device(arguments.device).type == "cuda" else []
    running = []
    with ThreadPoolExecutor(parts) as readers:  # one each: who fails is heard while the others work
        try:
            for part in range(parts):
                if gpus:
                    environment["CUDA_VISIBLE_DEVICES"] = gpus[part % len(gpus)]
                words = [sys.executable, __file__, *sys.argv[1:], "--part", str(part)]
                running.append(
                    subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                )
            ends = {readers.submit(process.communicate): part for part, process in enumerate(running)}
            for end in as_completed(ends):
                (out, err), part = end.result(), ends[end]
                if running[part].returncode:
                    last = (err.strip().splitlines() or ["it said nothing"])[-1]
                    raise UserError(f"process {part} of {parts}: {last.removeprefix('error: ')}")
                for line in [line for line in out.splitlines() if line.startswith("note: ")]:
                    print(f"{line} (process {part})")
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    print(f"wrote {merge_parts(folder, parts)} samples to {folder}")


def visible_gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES may give to one GPU each."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--config",
        type=recipe("diffusion"),
        metavar="FILE",
        help="YAML of scripts/train_diffusion.py to take settings from",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    parser.add_argument("--autoencoder", help="checkpoint of the autoencoder (setting: autoencoder)")
    parser.add_argument("--text", help="checkpoint of the text tower (setting: text)")
    parser.add_argument("--shards", help="pictures with captions (setting: data.shards)")
    parser.add_argument("--where", action="append", metavar="FIELD=VALUE,...", help=f"{WHERE_HELP}; may be repeated")
    parser.add_argument("--output", help="folder of the latents (setting: latents)")
    parser.add_argument("--size", type=SIDE, help="pixels (setting: data.size)")
    parser.add_argument("--flip", action="store_true", help="the mirrored pictures too (setting: data.flip)")
    parser.add_argument("--batch", type=COUNT, default=64, help="pictures encoded at once")
    parser.add_argument("--shard-samples", type=COUNT, default=1024, help="an interrupted run goes on at a whole shard")
    add_machine(parser.add_argument, precision="fp32")  # as in training
    parser.add_argument("--processes", type=COUNT, default=1, help="that encode at a time")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # which of them this is
    arguments = parser.parse_intermixed_args()
    if arguments.part is not None and not 0 <= arguments.part < arguments.processes:
        raise UserError(f"--part is {arguments.part}; it must be from 0 to {arguments.processes - 1}")
    return arguments


def settings(arguments: argparse.Namespace) -> DiffusionTraining:
    """The training's settings with this command's words over them; raises UserError for one that is missing."""
    config = load(DiffusionTraining, arguments.config, arguments.overrides)
    data = config.data
    data = dataclasses.replace(
        data,
        shards=arguments.shards or data.shards,
        where=where_of(arguments.where) if arguments.where else data.where,
        size=data.size if arguments.size is None else arguments.size,
        flip=data.flip or arguments.flip,
    )
    config = dataclasses.replace(
        config,
        autoencoder=arguments.autoencoder or config.autoencoder,
        text=arguments.text or config.text,
        latents=arguments.output or config.latents,
        data=data,
    )
    for option, value in (("autoencoder", config.autoencoder), ("text", config.text), ("output", config.latents)):
        if not value and (option != "text" or config.model.context_width):
            raise UserError(f"--{option} is missing; say where it is")
    if not config.model.context_width:
        if config.text:
            raise UserError("text names a text tower, and with model.context_width=0 none is used; set one of them")
        config = dataclasses.replace(config, data=dataclasses.replace(data, caption="none"))
    return config


def precompute(
    codec: Codec,
    encoder: Encoder,
    device: torch.device,
    sources: LatentSources,
    writer: LatentWriter,
    flip: bool,
    batch_size: int,
    stop: int,
) -> tuple[int, int]:
    """Encode what `writer` does not have yet, up to before sample `stop`; returns the samples written and the captions
    that were cut."""
    written = cut = 0
    with tqdm(total=stop, initial=writer.start, unit="picture", disable=not sys.stderr.isatty()) as bar:
        for batch in sources.batches(batch_size, writer.start, stop):
            image = batch.image.to(device)
            moments = codec.posterior(image).moments()
            flipped = codec.posterior(image.flip(-1)).moments() if flip else None
            contexts, pooled, too_long = encode_captions(encoder, batch)
            writer.add(batch, moments, flipped, contexts, pooled)
            written, cut = written + len(batch.key), cut + too_long
            bar.update(len(batch.key))
    writer.finish()
    return written, cut


def encode_captions(encoder: Encoder, batch: SourceBatch) -> tuple[list[Tensor], list[Tensor], int]:
    """For each sample the contexts (K, L, D) of its captions and, where the network is told that, their pooled text
    (K, E); and how many captions are longer than L. L and D are 0 where no tower reads them."""
    import torch

    if encoder.text is None:
        return [torch.zeros(len(texts), 0, 0) for texts in batch.captions], [], 0
    captions, counts = [text for texts in batch.captions for text in texts], [len(texts) for texts in batch.captions]
    made, (_, dropped) = encoder.texts(captions), encoder.text.tokenize(captions)
    assert made.context is not None
    pooled = [] if made.pooled is None else list(made.pooled.split(counts))
    return list(made.context.split(counts)), pooled, sum(map(bool, dropped))


if __name__ == "__main__":
    run(main)
