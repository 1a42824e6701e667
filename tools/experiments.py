"""The lecture notes' experiments, on a trained model.

    python tools/experiments.py steps-table --shards 'data/icons/masters/train-*.tar' --output runs/steps-table
    python tools/experiments.py samplers    --shards 'data/icons/masters/train-*.tar' --output runs/samplers
    python tools/experiments.py guidance    --shards 'data/icons/masters/train-*.tar' --output runs/guidance
    python tools/experiments.py fewer-steps --shards 'data/icons/masters/*.tar' --classifier runs/classifier \\
        --student four=runs/four --output runs/fewer-steps
    python tools/experiments.py grids       --output runs/grids
    python tools/experiments.py interpolate --shards 'data/icons/masters/train-*.tar' --output runs/interpolate
    python tools/experiments.py networks    --shards 'data/icons/masters/train-*.tar' --output runs/networks
    python tools/experiments.py toy --output runs/toy

Each prints its figures with their counts and writes them, with the protocol they were made by, into --output. What was
drawn is kept there: the first four, which take long, go on where they were stopped. They draw and measure as
scripts/evaluate.py does, and like it may be started by accelerate-launch on several processes; on a CPU, one for each
core is fastest. --quick is a small experiment that ends in a minute.
"""

from __future__ import annotations

from ldm.script import run

import argparse
from pathlib import Path

from ldm.arguments import COUNT, NATURAL, POSITIVE, Parser
from ldm.device import PRECISIONS, choose_device
from ldm.errors import UserError
from ldm.home import recipe
from ldm.options import WHERE_HELP, split_list, where_of

MANY, FEW, MANY_ON_GPU = 1000, 200, 5000  # pictures in a cell of the steps table; FEW where one takes 1000 steps
RECIPE = "@icons"  # what the shipped model was trained on


def main() -> None:
    arguments = parse()
    folder = Path(arguments.output)
    from studies import interpolate, toy

    import ldm  # torch takes seconds, and a mistake is told before

    if arguments.command == "toy":
        toy.run(folder, arguments.quick)
    elif arguments.command == "networks":
        from studies import networks

        quick = ["loop.global_batch=4"] if arguments.quick else []
        networks.run(arguments.shards, 0.01 if arguments.quick else arguments.minutes, folder, quick)
    elif arguments.command == "grids":
        run_grids(arguments, folder)
    elif arguments.command == "fewer-steps":
        run_fewer(arguments, folder)
    elif arguments.command == "interpolate":
        model = ldm.load(arguments.model, precision=arguments.precision)
        pair = interpolate.read_pair(arguments.shards, arguments.concepts, arguments.style, model.config.image_size)
        interpolate.run(model, pair, arguments.prompt, folder, arguments.quick)
    else:
        run_table(arguments, folder)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps-table", help="quality against eta and the number of DDIM steps")
    curves = commands.add_parser("samplers", help="quality against evaluations, for all samplers")
    scales = commands.add_parser("guidance", help="fidelity against diversity, over the guidance scale")
    mixing = commands.add_parser("interpolate", help="two pictures mixed in noisy latents, from coarse to fine")
    fewer = commands.add_parser("fewer-steps", help="quality against evaluations, for a model and its students")
    levels = commands.add_parser("grids", help="distance from the exact flow, for samplers on grids")
    sides = commands.add_parser("networks", help="a transformer and a U-Net trained for the same processor time")
    plane = commands.add_parser("toy", help="forward process, score, Langevin and ODE paths in the plane")

    for command, pictures in ((steps, f"{MANY}, on a GPU {MANY_ON_GPU}"), (curves, 200), (scales, 400)):
        default = pictures if isinstance(pictures, int) else None
        command.add_argument("--pictures", type=COUNT, default=default, help=f"in a cell (default {pictures})")
        command.add_argument(
            "--where", action="append", default=[], metavar="FIELD=VALUE,...", help=f"{WHERE_HELP} (default: {RECIPE})"
        )
        command.add_argument(
            "--compile", action="store_true", help="torch.compile the U-Net: for long tables; the same up to rounding"
        )
    add_fewer(fewer)
    steps.add_argument(
        "--pictures-of-long", type=COUNT, help=f"in a cell of 1000 steps (default {FEW}, on a GPU {MANY_ON_GPU})"
    )
    mixing.add_argument("--concepts", nargs=2, default=["red apple", "dog face"], help="the two pictures' names")
    mixing.add_argument("--style", default="noto emoji")
    mixing.add_argument("--prompt", default="", help="on the way back; default: the model without a prompt")
    for command in (steps, curves, scales, fewer, mixing):
        command.add_argument("--model", default="icons", help="shipped name, directory or file")
        command.add_argument("--shards", required=True, help="the real pictures that the model was trained on")
        command.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    levels.add_argument("--model", default="icons", help="shipped name, directory or file")
    levels.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    levels.add_argument("--prompts", default="docs/prompts.txt", metavar="FILE", help="evenly taken from [%(default)s]")
    levels.add_argument("--count", type=NATURAL, default=16, help="of prompts [%(default)s]; 0: the Gaussian alone")
    levels.add_argument("--cfg", type=float, default=7.5, help="guidance scale [%(default)s]")
    levels.add_argument(
        "--samplers",
        nargs="+",
        metavar="NAME",
        help="with some that draw noise, the Gaussian alone [the twelve that follow the flow]",
    )
    levels.add_argument("--spacings", nargs="+", metavar="GRID", default=["trailing", "karras", "exponential", "beta"])
    levels.add_argument(
        "--evaluations", nargs="+", type=COUNT, default=[10, 20, 50], help="of the network [%(default)s]"
    )
    sides.add_argument("--shards", required=True, help="pictures with the names and styles of mmdit_tiny.yaml")
    sides.add_argument("--minutes", type=POSITIVE, default=2.0, help="of processor time for each [%(default)s]")
    for command in (steps, curves, scales, fewer, mixing, levels, sides, plane):
        command.add_argument("--output", required=True, help="folder of results")
        command.add_argument("--quick", action="store_true", help="a small one, of which the figures say little")
    return parser.parse_args()


def add_fewer(parser: Parser) -> None:
    parser.add_argument("--pictures", type=COUNT, default=256, help="in a cell [%(default)s]")
    for option, what in (("--student", "a model"), ("--lora", "a LoRA of --model")):
        about = f"{what} that was taught to need few steps; drawn as it says of itself, or by SAMPLER at cfg 1"
        parser.add_argument(option, action="append", default=[], metavar="NAME=PATH[,SAMPLER]", help=about)
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance scale of the model itself [%(default)s]")
    parser.add_argument("--classifier", required=True, help="folder that tools/train_classifier.py wrote: the judge")
    parser.add_argument("--concepts", type=recipe("evaluation"), default="concepts64", help="YAML list [%(default)s]")
    styles = "noto emoji,flat emoji,twemoji,3d render"
    parser.add_argument("--styles", default=styles, help="of the prompts [%(default)s]")
    parser.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)


def run_grids(arguments: argparse.Namespace, folder: Path) -> None:
    from studies import grids

    import ldm
    from ldm.jobs import Settings, catalogue, read_prompts

    samplers = list(arguments.samplers or grids.COMPARED)
    spacings = [catalogue.resolve_grid(name) for name in arguments.spacings]
    noisy = {grids.read(word)[0] for word in samplers} & set(grids.NOISY)
    samplers, evaluations = (samplers[:2], [8]) if arguments.quick else (samplers, arguments.evaluations)
    measures: dict[str, grids.Measure] = {f"Gaussian, {n}": grids.gaussian for n in evaluations}
    if arguments.count and not arguments.quick and not noisy:
        prompts = [request.prompt for request in read_prompts(arguments.prompts)]
        prompts = prompts[:: max(1, len(prompts) // arguments.count)][: arguments.count]
        model = ldm.load(arguments.model, precision=arguments.precision)
        measures |= dict.fromkeys(
            [f"cfg {arguments.cfg:g}, {n}" for n in evaluations],
            grids.on_model(model, prompts, Settings(cfg=arguments.cfg)),
        )
    grids.run(measures, samplers, spacings, folder)


def run_fewer(arguments: argparse.Namespace, folder: Path) -> None:
    from studies import fewer_steps
    from studies.subject import make_subject

    import ldm
    from ldm.judge.classifier import load_classifier
    from ldm.judge.pictures import read_concepts, read_pictures
    from ldm.metrics.crew import muster
    from ldm.metrics.figures import Measures

    quick, pictures = arguments.quick, 16 if arguments.quick else arguments.pictures
    named = {fewer_steps.Student.read(word): False for word in arguments.student}
    named |= {fewer_steps.Student.read(word): True for word in arguments.lora}
    classifier, concepts = load_classifier(arguments.classifier), read_concepts(arguments.concepts)
    styles, where = split_list(arguments.styles), {"name": list(concepts), **where_of(arguments.where)}
    real = read_pictures(arguments.shards, where, classifier.config.size)
    question = fewer_steps.Question.of(real, classifier, concepts, styles, pictures)
    subset = min(8 if quick else 100, pictures, len(real.of(concepts, styles)))
    measures, where = Measures(("kernel",), subset=subset), {**where, "style": styles}
    subject = make_subject(arguments.model, arguments.shards, where, arguments.precision, folder, muster(), measures)
    students = {
        student: subject.model.adapted(student.path) if lora else ldm.load(student.path, precision=arguments.precision)
        for student, lora in named.items()
    }
    fewer_steps.run(subject, students, question, arguments.cfg, quick, pictures)


def run_table(arguments: argparse.Namespace, folder: Path) -> None:
    """An experiment whose cells are drawn and measured alike."""
    quick = arguments.quick
    subset, pictures = (8, 16) if quick else (100, arguments.pictures)
    fewest = pictures
    if arguments.command == "steps-table":
        many, few = (MANY_ON_GPU, MANY_ON_GPU) if choose_device().type == "cuda" else (MANY, FEW)
        pictures = many if pictures is None else pictures
        fewest = min(pictures, few if arguments.pictures_of_long is None else arguments.pictures_of_long)
    if fewest < subset:
        raise UserError(f"{fewest} pictures were asked for; the distances are of subsets of {subset}, so ask for more")
    where = where_of(arguments.where or [RECIPE])
    from studies import guidance, samplers, steps_table
    from studies.subject import make_subject

    from ldm.metrics.crew import muster
    from ldm.metrics.figures import Measures

    measures = Measures(("kernel", "neighbours"), subset=subset)
    crew = muster()
    subject = make_subject(
        arguments.model, arguments.shards, where, arguments.precision, folder, crew, measures, 32 if quick else None
    )
    if arguments.compile:
        subject.model.unet.compile()
    if arguments.command == "steps-table":
        steps_table.run(subject, quick, pictures, fewest)
    elif arguments.command == "samplers":
        samplers.run(subject, quick, pictures)
    else:
        guidance.run(subject, quick, pictures)


if __name__ == "__main__":
    run(main)
