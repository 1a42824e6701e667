"""Encode pictures and captions once, so that stage two need not at every step (latents=DIR of train_diffusion.py).

    python tools/precompute_latents.py --autoencoder runs/ae --text runs/clip --shards 'data/train-*.tar' \\
        --where 'style=noto emoji,flat emoji' --size 64 --flip --output data/latents

or with the file and the words of the training to come:

    python tools/precompute_latents.py --config configs/diffusion/icons.yaml autoencoder=runs/ae latents=data/latents

Written are posterior moments (in float32: beside the contexts they are small) of each picture, with --flip of its
mirror image too, and the context of each of its captions (float16), with a fingerprint of the networks and the picture
size. The tool goes on where an earlier run of it was interrupted, and refuses a folder of other latents.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import native
from ldm.conditioning.clip import TextTower
from ldm.config import DiffusionTraining, load
from ldm.data.latents import LatentSources, LatentWriter, SourceBatch, latent_fingerprint
from ldm.device import choose_device, choose_precision
from ldm.errors import UserError, run
from ldm.options import WHERE_HELP, parse_where


def main() -> None:
    arguments = parse()
    config = settings(arguments)
    device = choose_device(arguments.device)
    dtype = choose_precision(arguments.precision, device)
    codec = native.load_autoencoder(config.autoencoder, device, dtype)
    tower = native.load_text(config.text, device, dtype)
    codec.latent_shape(config.data.size, config.data.size)  # UserError for a size that f does not divide

    sources = LatentSources(config.data)
    fingerprint = latent_fingerprint(config.autoencoder, config.text, config.data)
    writer = LatentWriter(config.latents, fingerprint, sources.fingerprint, config.data.flip, arguments.shard_samples)
    if writer.complete:
        print(f"{config.latents} is complete already")
        return
    if writer.start:
        print(f"going on at sample {writer.start} of {len(sources)}", flush=True)
    written, cut = precompute(codec, tower, sources, writer, config.data.flip, arguments.batch)
    print(f"wrote {written} samples to {config.latents}")
    if cut:
        print(
            f"note: {cut} captions are longer than the text tower's {tower.config.context_length} tokens and were cut"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML of scripts/train_diffusion.py to take settings from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    parser.add_argument("--autoencoder", help="checkpoint of the autoencoder (setting: autoencoder)")
    parser.add_argument("--text", help="checkpoint of the text tower (setting: text)")
    parser.add_argument("--shards", help="pictures with captions (setting: data.shards)")
    parser.add_argument("--where", action="append", metavar="FIELD=VALUE,...", help=f"{WHERE_HELP}; may be repeated")
    parser.add_argument("--output", help="folder of the latents (setting: latents)")
    parser.add_argument("--size", type=int, help="pixels (setting: data.size)")
    parser.add_argument("--flip", action="store_true", help="the mirrored pictures too (setting: data.flip)")
    parser.add_argument("--batch", type=int, default=64, help="pictures encoded at once")
    parser.add_argument("--shard-samples", type=int, default=1024, help="an interrupted run goes on at a whole shard")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", default="fp32", help="of the networks: fp32 (as in training), fp16, bf16")
    arguments = parser.parse_intermixed_args()
    for name, count in (("batch", arguments.batch), ("shard-samples", arguments.shard_samples)):
        if count < 1:
            raise UserError(f"--{name} is {count}; it must be at least 1")
    return arguments


def settings(arguments: argparse.Namespace) -> DiffusionTraining:
    """The training's settings with this command's words over them; raises UserError for one that is missing."""
    config = load(DiffusionTraining, arguments.config, arguments.overrides)
    data = config.data
    data = dataclasses.replace(
        data,
        shards=arguments.shards or data.shards,
        where=parse_where(arguments.where) if arguments.where else data.where,
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
        if not value:
            raise UserError(f"--{option} is missing; say where it is")
    return config


@torch.inference_mode()
def precompute(
    codec: Codec, tower: TextTower, sources: LatentSources, writer: LatentWriter, flip: bool, batch_size: int
) -> tuple[int, int]:
    """Encode what `writer` does not have yet; returns the samples written and the captions that were cut."""
    device = tower.positional_embedding.device
    written = cut = 0
    with tqdm(total=len(sources), initial=writer.start, unit="picture", disable=not sys.stderr.isatty()) as bar:
        for batch in sources.batches(batch_size, writer.start):
            image = batch.image.to(device)
            moments = codec.posterior(image).moments()
            flipped = codec.posterior(image.flip(-1)).moments() if flip else None
            contexts, too_long = encode_captions(tower, batch)
            writer.add(batch, moments, flipped, contexts)
            written, cut = written + len(batch.key), cut + too_long
            bar.update(len(batch.key))
    writer.finish()
    return written, cut


def encode_captions(tower: TextTower, batch: SourceBatch) -> tuple[list[Tensor], int]:
    """For each sample the contexts (K, L, D) of its captions; and how many captions are longer than L."""
    captions = [text for texts in batch.captions for text in texts]
    tokens, dropped = tower.tokenize(captions)
    context = tower(tokens.to(tower.positional_embedding.device))
    return list(context.split([len(texts) for texts in batch.captions])), sum(map(bool, dropped))


if __name__ == "__main__":
    run(main)
