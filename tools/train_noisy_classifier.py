"""Train a classifier of noisy latents, for classifier guidance (--classifier of scripts/txt2img.py).

    python tools/train_noisy_classifier.py --model icons --shards 'data/icons/masters/train-*.tar' \\
        --where mono=false --classes configs/evaluation/classifier.yaml --output runs/noisy_classifier

The class of a picture is what its json says in --label. Each picture is encoded --views times: as it is, and changed as
the clean classifier's pictures are; training then adds noise of every level, ln sigma uniform. One picture in ten is
held out, and at the end its class is guessed at several levels.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.arguments import COUNT, POSITIVE, SEED, Bounded, Parser
from ldm.autoencoder.codec import Codec
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import DataConfig
from ldm.data.latent_writing import LatentSources
from ldm.device import DEVICES, choose_device
from ldm.errors import UserError
from ldm.guidance.latents import latent_probe
from ldm.guidance.noisy_classifier import NoisyClassifier, NoisyClassifierConfig, save_noisy_classifier
from ldm.home import recipe
from ldm.judge.augment import Augmentation, augment
from ldm.judge.pictures import read_concepts
from ldm.options import WHERE_HELP, where_of
from ldm.ranges import MAX_SIDE

ASKED_AT = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)  # sigmas at which held-out pictures are classified


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    device = choose_device(arguments.device)
    model = open_checkpoint(arguments.model).only("autoencoder")
    for notice in model.notices:
        print(f"note: {notice}", file=sys.stderr)
    codec = model.load("autoencoder", device)
    size = arguments.size or model.config.image_size
    codec.latent_shape(size, size)  # UserError for a size that f does not divide

    wanted = read_concepts(arguments.classes) if arguments.classes else ()
    latents = read_latents(codec, arguments, wanted, size)
    config = NoisyClassifierConfig(
        latents.classes,
        codec.latent_channels,
        latent_probe(codec),
        arguments.channels,
        sigma_min=arguments.sigma_min,
        sigma_max=arguments.sigma_max,
    )
    held_out = torch.randperm(len(latents.label), generator=torch.Generator().manual_seed(arguments.seed))
    held_out, seen = held_out.split([len(held_out) // 10, len(held_out) - len(held_out) // 10])
    print(f"{len(seen)} pictures of {len(config.classes)} classes to learn, {len(held_out)} held out", flush=True)

    classifier = NoisyClassifier(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(classifier, latents.of(seen), arguments.steps, arguments.batch, arguments.rate, arguments.seed)
    for name, part in (("seen", latents.of(seen[: 10 * len(held_out)])), ("held out", latents.of(held_out))):
        shares = [
            f"{accuracy(classifier, part, sigma):.1%} at sigma {sigma:g}" for sigma in ASKED_AT if len(part.label)
        ]
        print(f"{name}: {', '.join(shares)}", flush=True)
    save_noisy_classifier(classifier, arguments.output)
    print(f"wrote {arguments.output}")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="the model to be guided, or a checkpoint of its autoencoder")
    parser.add_argument("--shards", required=True, help="shards of pictures with a class in their json")
    parser.add_argument("--where", nargs="*", default=[], help=WHERE_HELP)
    parser.add_argument("--output", required=True, help="folder of the classifier")
    parser.add_argument("--label", default="name", metavar="FIELD", help="json field with the class (default name)")
    parser.add_argument(
        "--classes",
        type=recipe("evaluation"),
        help="YAML list of the classes to learn; default: all with --pictures pictures",
    )
    parser.add_argument("--pictures", type=COUNT, default=5, help="pictures a class must have to be learnt")
    parser.add_argument("--views", type=COUNT, default=8, help="latents kept of each picture")
    parser.add_argument(
        "--size", type=Bounded(int, 0, MAX_SIDE), default=0, help="pixels (default: what the model was trained at)"
    )
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--sigma-min", type=float, default=NoisyClassifierConfig.sigma_min, help="of the levels")
    parser.add_argument("--sigma-max", type=float, default=NoisyClassifierConfig.sigma_max, help="of the levels")
    parser.add_argument("--steps", type=COUNT, default=2000)
    parser.add_argument("--batch", type=COUNT, default=128)
    parser.add_argument("--rate", type=POSITIVE, default=1e-3)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    arguments = parser.parse_args()
    if arguments.channels < 2 or arguments.channels % 2:
        raise UserError(f"--channels is {arguments.channels}; choose an even number")
    if not 0 < arguments.sigma_min < arguments.sigma_max < math.inf:
        raise UserError("--sigma-min must be above 0 and below --sigma-max, and both must be finite")
    return arguments


@dataclass(frozen=True)
class Latents:
    """N pictures in V views: `latent` (V, N, C, h, w) float32, `label` (N,) long into `classes`."""

    latent: Tensor
    label: Tensor
    classes: tuple[str, ...]

    def of(self, rows: Tensor) -> Latents:
        return Latents(self.latent[:, rows], self.label[rows], self.classes)


@torch.no_grad()
def read_latents(codec: Codec, arguments: argparse.Namespace, wanted: Sequence[str], size: int) -> Latents:
    """The pictures of the classes `wanted` (or of all that have enough), encoded. Raises UserError if too few have."""
    where = where_of(arguments.where)
    if wanted:
        where[arguments.label] = list(wanted)
    generator = torch.Generator().manual_seed(arguments.seed)
    device = torch.device("cpu") if codec.autoencoder is None else next(codec.autoencoder.parameters()).device
    views: list[list[Tensor]] = [[] for _ in range(arguments.views)]
    names: list[str] = []
    for batch in LatentSources(DataConfig(shards=arguments.shards, where=where, size=size)).batches(64):
        named = [i for i, meta in enumerate(batch.meta) if arguments.label in meta]
        image = batch.image[named]
        names += [str(batch.meta[i][arguments.label]) for i in named]
        for view in views if named else ():
            seen = image if view is views[0] else augment(image, generator, Augmentation())
            posterior_noise = torch.randn(len(named), *codec.latent_shape(size, size), generator=generator)
            view.append(codec.encode(seen.to(device), posterior_noise.to(device)).cpu())
    counts = Counter(names)
    classes = tuple(wanted) or tuple(sorted(name for name, count in counts.items() if count >= arguments.pictures))
    missing = [name for name in classes if not counts[name]]
    if missing:
        raise UserError(f"--shards has no picture to learn these classes from: {', '.join(missing)}")
    if len(classes) < 2:
        raise UserError(
            f"{len(classes)} classes have {arguments.pictures} pictures or more whose json has '{arguments.label}'; "
            "lower --pictures or name another --label"
        )
    place = {name: i for i, name in enumerate(classes)}
    rows = [i for i, name in enumerate(names) if name in place]
    label = torch.tensor([place[names[i]] for i in rows])
    return Latents(torch.stack([torch.cat(view)[rows] for view in views]), label, classes)


def train(classifier: NoisyClassifier, latents: Latents, steps: int, batch: int, rate: float, seed: int) -> None:
    """Cross-entropy on noised latents; AdamW whose rate rises for a tenth of the steps and falls to zero."""
    config = classifier.config
    device = classifier.conv_in.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=0.05)
    law = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    views, count = latents.latent.shape[:2]
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    begun, running = time.monotonic(), 0.0
    classifier.train()
    for step in range(1, steps + 1):
        rows = torch.randint(count, (batch,), generator=generator)
        latent = latents.latent[torch.randint(views, (batch,), generator=generator), rows]
        # Stratified: each batch has levels from all of the range.
        uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        sigma = torch.exp(low + (high - low) * uniform)
        x = latent + sigma[:, None, None, None] * torch.randn(latent.shape, generator=generator)
        loss = F.cross_entropy(classifier(x.to(device), sigma.to(device)), latents.label[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        law.step()
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % 100 == 0:
            print(f"step {step}: loss {running:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    classifier.eval()


@torch.inference_mode()
def accuracy(classifier: NoisyClassifier, latents: Latents, sigma: float) -> float:
    """Share of the pictures, unchanged but for noise of this level, whose likeliest class is their own."""
    device = classifier.conv_in.weight.device
    clean = latents.latent[0]
    x = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    guesses = [classifier(part.to(device), torch.tensor(sigma)).argmax(dim=1).cpu() for part in x.split(256)]
    return (torch.cat(guesses) == latents.label).float().mean().item()


if __name__ == "__main__":
    run(main)
