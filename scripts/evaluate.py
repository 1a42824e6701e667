"""Measure a model on held-out pictures and on prompts.

    python scripts/evaluate.py autoencoder --model icons --shards 'data/icons/shards/test_*.tar'
    python scripts/evaluate.py prompts --model icons --shards 'data/icons/masters/*.tar' --where mono=false \\
        --classifier runs/classifier

Each prints a table, and with --output writes its figures as JSON together with the protocol that they were made by.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch
from tqdm import tqdm

import ldm
from ldm.checkpoints import native
from ldm.config import DataConfig
from ldm.data.loader import validation_batches
from ldm.device import choose_device, choose_precision, precision_name
from ldm.errors import UserError, run
from ldm.files import atomic_write_text
from ldm.generate import draw
from ldm.image_io import grid, save_png
from ldm.jobs import Settings, batches, of_prompts
from ldm.metrics.classifier import load_classifier
from ldm.metrics.pictures import read_concepts, read_pictures
from ldm.metrics.prompts import Judge, Score, make_prompts
from ldm.metrics.quality import psnr, ssim
from ldm.model import find
from ldm.options import WHERE_HELP, parse_where, split_list
from ldm.provenance import surroundings


def main() -> None:
    arguments = parse()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    report = {"autoencoder": evaluate_autoencoder, "prompts": evaluate_prompts}[arguments.command](arguments)
    if arguments.output:
        atomic_write_text(arguments.output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    autoencoder = commands.add_parser("autoencoder", help="PSNR and SSIM of decoded pictures")
    autoencoder.add_argument("--size", type=int, help="pixels; default: the model's")

    prompts = commands.add_parser("prompts", help="is the picture of a prompt nearest to its own concept?")
    prompts.add_argument("--classifier", required=True, help="what tools/train_classifier.py wrote")
    prompts.add_argument("--concepts", default="configs/evaluation/concepts64.yaml", help="YAML list of concepts")
    prompts.add_argument("--styles", default="noto emoji,flat emoji", help="styles to prompt, separated by commas")
    prompts.add_argument("--left-out", default="twemoji", help="the style whose real pictures are judged beside")
    prompts.add_argument("--n", type=int, default=2, help="pictures of each prompt")
    prompts.add_argument("--cfg", type=float, default=Settings.cfg)
    prompts.add_argument("--steps", type=int, default=Settings.steps)
    prompts.add_argument("--sampler", default=Settings.sampler)
    prompts.add_argument("--seed", type=int, default=0, help="picture i of all has the seed SEED + i")
    prompts.add_argument("--grid", metavar="PNG", help="write the pictures, a row for each eight")

    for command in (autoencoder, prompts):
        command.add_argument("--model", default="icons", help="shipped name, directory or file")
        command.add_argument("--shards", required=True, help="real pictures")
        command.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)
        command.add_argument("--batch-size", type=int, default=16)
        command.add_argument("--device", default="auto")
        command.add_argument("--precision", default="auto")
        command.add_argument("--output", metavar="JSON", help="write figures and protocol")
    return parser.parse_args()


@torch.inference_mode()
def evaluate_autoencoder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mean PSNR and SSIM over pictures: encoded to the posterior's mode, decoded, compared as floats."""
    path = find(arguments.model)
    device = choose_device(arguments.device)
    dtype = choose_precision(arguments.precision, device)
    codec = native.load_autoencoder(path, device, dtype)
    size = arguments.size or native.read_config(path).image_size
    data = DataConfig(validation=arguments.shards, size=size, where=parse_where(arguments.where))
    values: list[torch.Tensor] = []
    for batch in progress(validation_batches(data, arguments.batch_size), None):
        decoded = codec.decode(codec.encode(batch.image.to(device))).cpu()
        values.append(torch.stack([psnr(batch.image, decoded), ssim(batch.image, decoded)]))
    pairs = torch.cat(values, dim=1)
    (mean_psnr, mean_ssim), count = pairs.mean(dim=1).tolist(), pairs.shape[1]
    print(f"{count} pictures of {size} px, f = {codec.factor}, {codec.latent_channels} latent channels")
    print(f"PSNR {mean_psnr:.2f} dB, SSIM {mean_ssim:.4f} (means over pictures)")
    weights = native.fingerprint(native.read_part(path, "autoencoder")) if codec.autoencoder else "identity"
    return {
        "figures": {"psnr": round(mean_psnr, 4), "ssim": round(mean_ssim, 5), "pictures": count},
        "protocol": {
            "model": {"name": str(arguments.model), "autoencoder": weights},
            "shards": arguments.shards,
            "where": data.where,
            "size": size,
            "made_on": {"device": device.type, "precision": precision_name(dtype), **versions()},
        },
    }


def evaluate_prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompt accuracy by style, and of real pictures of the left-out style; see ldm/metrics/prompts.py."""
    concepts, styles = read_concepts(arguments.concepts), split_list(arguments.styles)
    classifier = load_classifier(arguments.classifier)
    if arguments.left_out in classifier.config.styles:
        raise UserError(f"the classifier was trained on the style '{arguments.left_out}'; name the one it left out")
    where = {"name": list(concepts), **parse_where(arguments.where)}
    pictures = read_pictures(arguments.shards, where, classifier.config.size)
    judge = Judge(classifier, pictures, concepts)
    prompts = make_prompts(pictures, concepts, styles)
    settings = Settings(arguments.cfg, arguments.steps, arguments.sampler).check()
    model = ldm.load(arguments.model, arguments.device, arguments.precision)

    requests = of_prompts([prompt.text for prompt in prompts], seed=arguments.seed, n=arguments.n)
    parts = list(batches(requests, arguments.batch_size))
    drawn = torch.cat([draw(model, part, settings, len(part)) for part in progress(parts, len(parts))])
    if arguments.grid:
        save_png(grid(drawn, columns=8), arguments.grid, {})
    asked = [prompt for prompt in prompts for _ in range(arguments.n)]
    places = judge.ranks(drawn, [prompt.concept for prompt in asked])

    def score(name: str, of: str) -> Score:
        return Score.of(places[torch.tensor([getattr(prompt, of) == name for prompt in asked])])

    rows = {f"drawn, {style}": score(style, "style") for style in styles}
    rows["drawn, all"] = Score.of(places)
    unseen = pictures.of(concepts, [arguments.left_out])
    if len(unseen):
        rows[f"real, {arguments.left_out} (never seen)"] = Score.of(judge.ranks(unseen.image, unseen.name))
    by_concept = {name: score(name, "concept") for name in concepts}
    print_table(rows, by_concept)
    return {
        "figures": {name: row.figures() for name, row in rows.items()},
        "concepts": {name: row.top1 for name, row in by_concept.items()},
        "protocol": {
            "model": {"name": str(arguments.model), "hash": model.hash},
            "prompts": [prompt.text for prompt in prompts],
            "pictures_of_each": arguments.n,
            "seeds": [requests[0].seed, requests[-1].seed],
            "sampler": settings.sampler,
            "spacing": settings.spacing,
            "steps": settings.steps,
            "cfg": settings.cfg,
            "chance": 1 / len(concepts),
            "classifier": {
                "fingerprint": native.fingerprint(classifier),
                "classes": len(classifier.config.classes),
                "styles": classifier.config.styles,
                "size": classifier.config.size,
            },
            "prototypes": {"concepts": len(concepts), "pictures": judge.pictures, "shards": arguments.shards},
            "made_on": {**surroundings(model), **versions()},
        },
    }


def print_table(rows: dict[str, Score], by_concept: dict[str, Score]) -> None:
    width = max(map(len, rows))
    print(f"nearest of {len(by_concept)} concept prototypes (chance {1 / len(by_concept):.1%})")
    print(f"{'':{width}}  pictures   top-1  95 % interval   top-5")
    for name, row in rows.items():
        f = row.figures()
        interval = f"{f['low']:.1%} - {f['high']:.1%}"
        print(f"{name:{width}}  {row.count:8d}  {f['top1']:6.1%}  {interval:>13}  {f['top5']:6.1%}")
    always = [name for name, row in by_concept.items() if row.top1 == row.count]
    never = [name for name, row in by_concept.items() if row.top1 == 0]
    print(f"always right: {', '.join(always) or 'none'}")
    print(f"never right: {', '.join(never) or 'none'}")


def progress(batches: Any, total: int | None) -> Any:
    """A bar on a terminal, quiet in a pipe."""
    return tqdm(batches, total=total, unit="batch", disable=not sys.stderr.isatty())


def versions() -> dict[str, str]:
    return {"ldm": ldm.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


if __name__ == "__main__":
    run(main)
