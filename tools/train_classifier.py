"""Train the concept classifier whose features prompt accuracy is measured in.

    python tools/train_classifier.py --shards 'data/icons/masters/*.tar' --where mono=false \\
        --concepts configs/evaluation/classifier.yaml --output runs/classifier

It learns the concepts of --concepts, or else all that have pictures enough, in every style but the left-out one: what
it then says of that style's pictures is what it can say of pictures it never saw. "emojitwo" is left out because
another hand drew it than drew the styles that the shipped model learns, and it has most of the concepts.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ldm.arguments import COUNT, POSITIVE, SEED, SIDE, Parser
from ldm.errors import UserError
from ldm.home import recipe
from ldm.judge.augment import Augmentation, augment
from ldm.judge.classifier import Classifier, ClassifierConfig, save_classifier
from ldm.judge.pictures import Pictures, read_concepts, read_pictures
from ldm.judge.prompts import prototypes
from ldm.metrics.distances import ranks
from ldm.options import WHERE_HELP, where_of


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    wanted = read_concepts(arguments.concepts) if arguments.concepts else ()
    where = where_of(arguments.where)
    pictures = read_pictures(arguments.shards, {"name": list(wanted), **where} if wanted else where, arguments.size)
    classes, styles = choose(pictures, wanted, arguments)
    config = ClassifierConfig(classes, styles, arguments.size, arguments.channels)
    seen, left_out = pictures.of(classes, styles), pictures.of(classes, [arguments.left_out])
    print(f"{len(seen)} pictures of {len(classes)} concepts in {len(styles)} styles: {', '.join(styles)}", flush=True)
    print(f"left out: {len(left_out)} pictures in the style '{arguments.left_out}'", flush=True)

    classifier = Classifier(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(classifier, seen, left_out, arguments)
    save_classifier(classifier, arguments.output)
    print(f"wrote {arguments.output}")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--shards", required=True, help="shards of real pictures with a name and a style in their json")
    parser.add_argument("--where", nargs="*", default=[], help=WHERE_HELP)
    parser.add_argument("--output", required=True, help="folder of the classifier")
    parser.add_argument(
        "--concepts",
        type=recipe("evaluation"),
        help="YAML list of the concepts to learn; default: all with --pictures pictures",
    )
    parser.add_argument("--pictures", type=COUNT, default=5, help="pictures a concept must have to be learnt")
    parser.add_argument("--left-out", default="emojitwo", help="the style it never sees")
    parser.add_argument("--size", type=SIDE, default=64, help="pixels")
    parser.add_argument("--channels", type=COUNT, default=32)
    parser.add_argument("--steps", type=COUNT, default=600)
    parser.add_argument("--batch", type=COUNT, default=64)
    parser.add_argument("--rate", type=POSITIVE, default=3e-3)
    parser.add_argument("--seed", type=SEED, default=0)
    return parser.parse_args()


def choose(
    pictures: Pictures, wanted: Sequence[str], arguments: argparse.Namespace
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The concepts (those `wanted`, else all with pictures enough) and the styles to learn."""
    counts = Counter(n for n, s in zip(pictures.name, pictures.style, strict=True) if s != arguments.left_out)
    missing = [name for name in wanted if not counts[name]]
    if missing:
        raise UserError(f"--shards has no picture to learn these concepts from: {', '.join(missing)}")
    classes = tuple(wanted or sorted(name for name, count in counts.items() if count >= arguments.pictures))
    if len(classes) < 2:
        raise UserError(f"{len(classes)} concepts have {arguments.pictures} pictures or more; lower --pictures")
    known = set(classes)
    styles = {style for name, style in zip(pictures.name, pictures.style, strict=True) if name in known}
    return classes, tuple(sorted(styles - {arguments.left_out}))


def train(classifier: Classifier, seen: Pictures, left_out: Pictures, arguments: argparse.Namespace) -> None:
    """Cross-entropy on augmented pictures; AdamW whose rate rises for a tenth of the steps and falls to zero."""
    rng = torch.Generator().manual_seed(arguments.seed)
    labels = seen.labels(classifier.config.classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=arguments.rate, weight_decay=0.05)
    law = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.rate, arguments.steps + 1, pct_start=0.1)
    begun, running = time.monotonic(), 0.0
    for step in range(1, arguments.steps + 1):
        rows = torch.randint(len(seen), (arguments.batch,), generator=rng)
        image = augment(seen.image[rows], rng, Augmentation()).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(classifier.train()(image), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        law.step()
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0:
            print(f"step {step}: loss {running:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
        if step % -(-arguments.steps // 4) == 0 or step == arguments.steps:
            parts = {"seen pictures": seen, "left-out style": left_out}
            shares = [f"{name} {accuracy(classifier, seen, part):.1%}" for name, part in parts.items() if len(part)]
            print(f"step {step}: nearest of {len(classifier.config.classes)}: {', '.join(shares)}", flush=True)


@torch.inference_mode()
def accuracy(classifier: Classifier, seen: Pictures, asked: Pictures) -> float:
    """Share of `asked` whose nearest prototype, made of `seen`, is their own concept."""
    classifier.eval()
    classes = classifier.config.classes
    features = [torch.cat([classifier.features(part) for part in p.image.split(256)]) for p in (seen, asked)]
    centres = prototypes(features[0], seen.labels(classes), len(classes))
    return (ranks(features[1], asked.labels(classes), centres) == 0).float().mean().item()


if __name__ == "__main__":
    run(main)
