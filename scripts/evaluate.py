"""Measure a model, or pictures, and say how it was measured.

python scripts/evaluate.py generation --captions prompts.txt --reference 'data/train-*.tar' --out runs/eval
python scripts/evaluate.py generation --pictures outputs/ --size 64 --reference photos/ --space inception=weights.pth
python scripts/evaluate.py generation ... --sweep cfg=1,2,4,8 steps=10,20,50 eta=0,1
python scripts/evaluate.py autoencoder --model icons --shards 'data/icons/masters/test_*.tar'
python scripts/evaluate.py prompts --model icons --shards 'data/icons/masters/*.tar' --classifier runs/classifier
python scripts/evaluate.py likelihood --model icons --shards tests/fixtures/icons/val-0000.tar --count 4
python scripts/evaluate.py --compare a.json b.json

Each prints its figures, and with --output writes them as JSON with the protocol that they were made by. `generation`
may be started by accelerate-launch on several processes. docs/evaluation.md tells what the figures mean.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.arguments import COUNT, NATURAL, SEED, SIDE, Bounded, Parser, add_fields, add_machine, taken
from ldm.errors import UserError
from ldm.find import WEIGHTS
from ldm.home import recipe
from ldm.jobs import Settings
from ldm.options import WHERE_HELP, split_list, where_of

if TYPE_CHECKING:
    from ldm.metrics.drawing import Drawing
    from ldm.metrics.generation import Against

SETTINGS = ("cfg", "cfg_rescale", "steps", "sampler", "spacing", "eta")
BRIEF = ("cfg", "steps", "sampler", "spacing")
# What only a model's pictures depend on.
DRAWS = (*SETTINGS, "model", "weights", "precision", "seed", "count", "batch_size", "sweep", "out", "labels")


def main() -> None:
    arguments = parse()
    if arguments.compare:
        from ldm.metrics.protocol import compare

        print(compare(tuple(arguments.compare), split_list(arguments.ignore)))
        return
    commands = {"generation": generation, "autoencoder": autoencoder, "prompts": prompts, "likelihood": likelihood}
    commands[arguments.command](arguments)


# ---------------------------------------------------------------- commands


def generation(arguments: argparse.Namespace) -> None:
    """Figures of a model's pictures, or of pictures that are there."""
    import ldm
    from ldm.metrics.crew import muster
    from ldm.metrics.generation import evaluate_model, evaluate_pictures
    from ldm.metrics.protocol import read
    from ldm.metrics.sources import open_source, read_captions, recaption
    from ldm.metrics.sweep import name_of, parse_axes, sweep
    from ldm.metrics.tables import brief, sweep_table, table

    if not arguments.pictures and not ((arguments.captions or arguments.labels) and arguments.out):
        raise UserError(
            "say what to measure: --pictures FOLDER_OR_SHARDS, or a model by --captions or --labels and a folder --out"
        )
    given = [f"--{name.replace('_', '-')}" for name in DRAWS if getattr(arguments, name) not in (None, [])]
    if arguments.pictures and given:
        raise UserError(f"{given[0]} is of pictures that a model draws; leave it or --pictures out")
    if arguments.pictures and arguments.size is None:
        raise UserError("pictures that are there need the size they are compared at, as --size 64")
    if arguments.sweep and arguments.output:
        raise UserError("a sweep writes a result for each combination into --out; leave --output out")
    axes = parse_axes(arguments.sweep)
    crew = muster()
    against = compared_with(arguments, crew.main)
    where = where_of(arguments.captions_where)
    captions = read_captions(arguments.captions, where) if arguments.captions else ()
    if arguments.pictures:
        drawn = open_source(arguments.pictures, "--pictures", where)
        drawn = recaption(drawn, captions) if captions else drawn
        document = evaluate_pictures(drawn, arguments.size, against, crew)
    else:
        drawing, out, weights = what_to_draw(arguments, captions), Path(arguments.out), arguments.weights or "auto"
        precision = arguments.precision or "auto"
        model = ldm.load(arguments.model or "icons", arguments.device, precision, weights=weights)
        if axes:
            rows = sweep(model, drawing, axes, against, out, crew, weights)
            if crew.main:
                print(sweep_table(rows, tuple(axes)))
                print(brief(read(out / f"{name_of({name: rows[0][name] for name in axes})}.json"), without=tuple(axes)))
                print(f"wrote sweep.csv, sweep.png and a result for each combination into {out}")
            return
        document = evaluate_model(model, drawing, against, out / "pictures", crew, weights)
        arguments.output = arguments.output or str(out / "figures.json")
    if crew.main:
        made = document["protocol"]
        beside = f" and {made['held_out']['pictures']} held out" if made["held_out"] else ""
        real = f"{made['reference']['pictures']} real ones{beside}"
        print(f"{made['pictures']} pictures against {real}, {made['size']} px")
        print(table(document["figures"]))
        print(brief(document))
        keep(document, arguments.output)


def compared_with(arguments: argparse.Namespace, main: bool) -> Against:
    """The real pictures, the spaces and the measures."""
    from ldm.device import choose_device
    from ldm.metrics.extraction import CACHE
    from ldm.metrics.figures import Measures
    from ldm.metrics.generation import Against
    from ldm.metrics.sources import open_source
    from ldm.metrics.spaces import make_space

    kinds = tuple(split_list(arguments.figures)) if arguments.figures else Measures.kinds
    numbers = {name: getattr(arguments, name) for name in ("subset", "subsets", "neighbours", "ball", "splits")}
    measures = Measures(kinds, **numbers, allow_few=arguments.allow_few).check()
    where, device = where_of(arguments.where), choose_device(arguments.device).type
    real = open_source(arguments.reference, "--reference", where)
    if arguments.held_out_where:
        where = where_of(arguments.held_out_where)
    held_out = open_source(arguments.held_out, "--held-out", where) if arguments.held_out else None
    spaces = [make_space(name, device) for name in arguments.space or ["efficientnet-lite0"]]
    cache = Path(arguments.cache).expanduser() if arguments.cache else CACHE
    return Against(real, held_out, spaces, measures, cache, main and shown())


def what_to_draw(arguments: argparse.Namespace, captions: tuple[str, ...]) -> Drawing:
    from ldm.metrics.drawing import Drawing

    settings = Settings(width=arguments.size, height=arguments.size, **taken(arguments, Settings, SETTINGS))
    labels = tuple(split_list(arguments.labels or ""))
    count = max(len(captions), len(labels)) if arguments.count is None else arguments.count
    batch_size = arguments.batch_size or Drawing.batch_size
    return Drawing(captions, settings, count, arguments.seed or 0, batch_size, arguments.captions or "", labels).check()


def autoencoder(arguments: argparse.Namespace) -> None:
    """PSNR, SSIM, perceptual distances and rFID of decoded pictures; the latents' statistics."""
    from ldm.checkpoints.opening import open_checkpoint
    from ldm.device import choose_device, choose_precision
    from ldm.metrics.reconstruction import autoencoder_table, evaluate_autoencoder
    from ldm.metrics.sources import open_source
    from ldm.metrics.spaces import make_space
    from ldm.metrics.tables import brief

    model, device = open_checkpoint(arguments.model).only("autoencoder"), choose_device(arguments.device)
    for notice in model.notices:
        print(f"note: {notice}", file=sys.stderr)
    codec = model.load("autoencoder", device, choose_precision(arguments.precision, device))
    size = model.config.image_size if arguments.size is None else arguments.size
    source = open_source(arguments.shards, "--shards", where_of(arguments.where))
    spaces = [make_space(name, device.type) for name in arguments.space]
    document = evaluate_autoencoder(
        codec,
        source,
        size,
        name=str(arguments.model),
        spaces=spaces,
        perceptual=arguments.perceptual,
        batch_size=arguments.batch_size,
        allow_few=arguments.allow_few,
        bar=shown(),
    )
    print(f"f = {codec.factor}, {codec.latent_channels} latent channels")
    print(autoencoder_table(document))
    print(brief(document))
    keep(document, arguments.output)


def prompts(arguments: argparse.Namespace) -> None:
    """Prompt accuracy by style, and of real pictures of the left-out style."""
    import ldm
    from ldm.image_io import grid, save_png
    from ldm.judge.accuracy import evaluate_prompts, prompt_table
    from ldm.judge.classifier import load_classifier
    from ldm.judge.colours import read_colours
    from ldm.judge.pictures import read_concepts
    from ldm.metrics.tables import brief

    settings = Settings(**taken(arguments, Settings, BRIEF))
    settings.check()
    concepts, classifier = read_concepts(arguments.concepts), load_classifier(arguments.classifier)
    model = ldm.load(arguments.model, arguments.device, arguments.precision)
    document, drawn = evaluate_prompts(
        model,
        classifier,
        settings,
        concepts=concepts,
        styles=split_list(arguments.styles),
        left_out=arguments.left_out,
        shards=arguments.shards,
        where=where_of(arguments.where),
        pairs=arguments.pairs,
        colours=read_colours(arguments.colours) if arguments.colours else None,
        n=arguments.n,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        bar=shown(),
    )
    if arguments.grid:
        save_png(grid(drawn, columns=8), arguments.grid, {})
    print(prompt_table(document))
    print(brief(document))
    keep(document, arguments.output)


def likelihood(arguments: argparse.Namespace) -> None:
    """Bits per dimension by the probability flow or the variational bound."""
    import ldm
    from ldm.metrics.likelihood import Method, evaluate_likelihood, likelihood_table
    from ldm.metrics.tables import brief

    method = Method(
        arguments.method,
        arguments.probes,
        arguments.tolerance,
        arguments.variance,
        arguments.strata,
        arguments.draws,
    )
    model = ldm.load(arguments.model, arguments.device, arguments.precision)
    where = where_of(arguments.where)
    document = evaluate_likelihood(
        model, arguments.shards, where, method, arguments.count, arguments.seed, arguments.batch_size
    )
    print(likelihood_table(document))
    print(brief(document))
    keep(document, arguments.output)


def keep(document: Mapping[str, Any], path: str | None) -> None:
    from ldm.metrics.protocol import write

    if path:
        write(document, path)
        print(f"wrote {path}")


def shown() -> bool:
    return sys.stderr.isatty()  # bars for who looks, quiet in a pipe


# ---------------------------------------------------------------- words


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--compare", nargs=2, metavar="JSON", help="two results side by side, if measured alike")
    parser.add_argument("--ignore", "--besides", default="", metavar="NAMES", help="what may differ: drawing.cfg,...")
    commands = parser.add_subparsers(dest="command", required="--compare" not in sys.argv)
    add_generation(commands.add_parser("generation", help="FID and its kin, of a model or of pictures"))
    add_autoencoder(commands.add_parser("autoencoder", help="PSNR, SSIM, rFID of decoded pictures"))
    add_prompts(commands.add_parser("prompts", help="is the picture of a prompt nearest to its own concept?"))
    add_likelihood(commands.add_parser("likelihood", help="bits per dimension of captioned pictures"))
    return parser.parse_args()


def add_generation(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("what is measured").add_argument
    add("--pictures", help="a folder or shards, in place of a model's")
    add("--captions", help="of the pictures: a file, a prompt a line, or shards")
    add("--labels", metavar="A,B,...", help="in place of captions or with them: the classes to be drawn in turn")
    add("--captions-where", action="append", default=[], metavar="FIELD=VALUE,...", help="of those shards, as --where")
    add("--count", type=COUNT, metavar="N", help="pictures to draw, captions in turn; default: one of each")
    add("--seed", type=NATURAL, metavar="N", help="picture i has the seed SEED + i [0]")
    add("--size", type=SIDE, metavar="N", help="pixels; default: the model's")
    add_fields(add, Settings, SETTINGS)
    add("--sweep", nargs="+", default=[], metavar="NAME=VALUES", help="each combination: cfg=1,2,4 steps=10,20 eta=0,1")
    add("--weights", choices=WEIGHTS, help="of files that hold two sets")
    add("--out", metavar="FOLDER", help="of drawn pictures and results; gone on with when it is there")
    add = command.add_argument_group("against what, and how").add_argument
    add("--reference", required=True, help="real pictures: a folder or shards")
    add("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)
    add("--held-out", help="real pictures that no training saw, beside them")
    add("--held-out-where", action="append", default=[], metavar="FIELD=VALUE,...", help="default: that of --where")
    add("--space", action="append", help="of features: efficientnet-lite0, inception=FILE, clip=FOLDER, ViT-B-32=FILE")
    add("--figures", metavar="KINDS", help="some of frechet,kernel,neighbours,score,captions (default: all)")
    add("--subset", type=Bounded(int, 2), default=1000, metavar="N", help="pictures in a subset of the kernel distance")
    add("--subsets", type=COUNT, default=100, metavar="N", help="how many of them")
    add("--neighbours", type=COUNT, default=3, metavar="N", help="of precision and recall")
    add("--ball", type=COUNT, default=5, metavar="N", help="neighbours of density and coverage")
    add("--splits", type=COUNT, default=10, metavar="N", help="of the Inception Score")
    add("--allow-few", action="store_true", help="Frechet distances of fewer pictures than dimensions")
    add("--cache", help="folder of the real pictures' features (default ~/.cache/ldm/features)")
    add_common(command)
    # As all that concerns drawing, to tell whether they were given.
    command.set_defaults(model=None, precision=None, batch_size=None)


def add_autoencoder(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--shards", required=True, help="real pictures: shards or a folder")
    add("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)
    add("--size", type=SIDE, metavar="N", help="pixels; default: the model's")
    add("--space", action="append", default=[], help="of rFID: efficientnet-lite0, inception=FILE")
    add("--perceptual", action="append", default=[], choices=("efficientnet-lite0", "lpips"))
    add("--allow-few", action="store_true", help="rFID of fewer pictures than dimensions")
    add_common(command)


def add_prompts(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--classifier", required=True, help="what tools/train_classifier.py wrote")
    add("--concepts", type=recipe("evaluation"), default="concepts64", help="YAML list of concepts")
    add("--styles", default="noto emoji,flat emoji,twemoji,3d render", help="styles to prompt, separated by commas")
    add("--left-out", default="emojitwo", help="the style whose real pictures are judged beside")
    add("--pairs", default="", metavar="SHARDS", help="prompt the (concept, style) pairs of these pictures alone")
    add("--colours", type=recipe("evaluation"), metavar="YAML", help="name backgrounds, and judge them: colours")
    add("--n", type=COUNT, default=2, metavar="N", help="pictures of each prompt")
    add_fields(add, Settings, BRIEF)
    add("--seed", type=NATURAL, default=0, metavar="N", help="picture i of all has the seed SEED + i")
    add("--grid", metavar="PNG", help="write the pictures, a row for each eight")
    add("--shards", required=True, help="real pictures")
    add("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)
    add_common(command)


def add_likelihood(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--method", choices=["flow", "bound"], default="flow", help="the ODE's density, or DDPM's")
    add("--count", type=COUNT, default=8, metavar="N", help="pictures, from the first of the shards")
    add("--seed", type=SEED, default=0, metavar="N", help="picture i of all has the seed SEED + i")
    add("--probes", type=COUNT, default=1, metavar="N", help="flow: of the trace's estimate")
    add("--tolerance", type=Bounded(float, 0), default=1e-4, metavar="X", help="flow: of the solver, in either sense")
    add("--variance", choices=["posterior", "beta", "learned"], default="posterior", help="bound")
    add("--strata", type=NATURAL, default=50, metavar="N", help="bound: 0 evaluates every step")
    add("--draws", type=COUNT, default=2, metavar="N", help="bound: evaluations in each stratum, or of each step")
    add("--shards", required=True, help="real pictures")
    add("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)
    add_common(command)
    command.set_defaults(precision="fp32")  # the trace is a derivative, which half precision blurs


def add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="icons", help="shipped name, directory or file, or hf:owner/name")
    command.add_argument("--batch-size", type=COUNT, default=16, metavar="N", help="pictures at once")
    add_machine(command.add_argument)
    command.add_argument("--output", metavar="JSON", help="write figures and protocol")


if __name__ == "__main__":
    run(main)
