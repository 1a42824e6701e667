"""The lecture notes' experiments, on a trained model.

    python tools/experiments.py steps-table --shards 'data/icons/masters/train-*.tar' --output runs/steps-table
    python tools/experiments.py samplers    --shards 'data/icons/masters/train-*.tar' --output runs/samplers
    python tools/experiments.py guidance    --shards 'data/icons/masters/train-*.tar' --output runs/guidance
    python tools/experiments.py interpolate --shards 'data/icons/masters/train-*.tar' --output runs/interpolate
    python tools/experiments.py toy --output runs/toy

Each prints its figures with their counts and writes them, with the protocol they were made by, into --output. What was
drawn is kept there: an experiment that was stopped goes on where it was. --quick is a small one that ends in a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies import cells, guidance, interpolate, samplers, steps_table, toy
from studies.subject import make_subject, where_of

import ldm
from ldm.errors import UserError, run
from ldm.options import WHERE_HELP

TABLES = {"steps-table": steps_table.report, "samplers": samplers.report, "guidance": guidance.report}


def main() -> None:
    arguments = parse()
    folder = Path(arguments.output)
    if arguments.command in TABLES:
        run_table(arguments, folder)
    elif arguments.command == "interpolate":
        model = ldm.load(arguments.model, precision=arguments.precision)
        pair = interpolate.read_pair(arguments.shards, arguments.concepts, arguments.style, model.config.image_size)
        interpolate.run(model, pair, arguments.prompt, folder, arguments.quick)
    else:
        toy.run(folder, arguments.quick)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps-table", help="quality against eta and the number of DDIM steps")
    curves = commands.add_parser("samplers", help="quality against evaluations, for all samplers")
    scales = commands.add_parser("guidance", help="fidelity against diversity, over the guidance scale")
    mixing = commands.add_parser("interpolate", help="two pictures mixed in noisy latents, from coarse to fine")
    plane = commands.add_parser("toy", help="forward process, score, Langevin and ODE paths in the plane")

    for command, pictures in ((steps, 1000), (curves, 200), (scales, 400)):
        command.add_argument("--pictures", type=int, default=pictures, help=f"in a cell (default {pictures})")
        command.add_argument("--processes", type=int, default=1, help="on a CPU, one for each core is fastest")
        command.add_argument(
            "--recipe",
            default="configs/diffusion/icons.yaml",
            help="its data.where picks pictures, unless --where does",
        )
        command.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)
    steps.add_argument("--pictures-of-long", type=int, default=200, help="in a cell of 1000 steps (default 200)")
    mixing.add_argument("--concepts", nargs=2, default=["red apple", "dog face"], help="the two pictures' names")
    mixing.add_argument("--style", default="noto emoji")
    mixing.add_argument("--prompt", default="", help="on the way back; default: the model without a prompt")
    for command in (steps, curves, scales, mixing):
        command.add_argument("--model", default="icons", help="shipped name, directory or file")
        command.add_argument("--shards", required=True, help="the real pictures that the model was trained on")
        command.add_argument("--precision", default="auto")
    for command in (steps, curves, scales, mixing, plane):
        command.add_argument("--output", required=True, help="folder of results")
        command.add_argument("--quick", action="store_true", help="a small one, of which the figures say little")
    return parser.parse_args()


def run_table(arguments: argparse.Namespace, folder: Path) -> None:
    """Draw the cells of a table that are missing, and report."""
    if arguments.processes < 1:
        raise UserError(f"--processes is {arguments.processes}; choose at least 1")
    quick = arguments.quick
    batch, subset, pictures = (16, 8, 16) if quick else (40, 100, arguments.pictures)
    if pictures < subset:
        raise UserError(f"--pictures is {pictures}; the distances are of subsets of {subset}, so choose at least that")
    made = {
        "steps-table": lambda: steps_table.make_cells(quick, pictures, min(pictures, arguments.pictures_of_long)),
        "samplers": lambda: samplers.make_cells(quick, pictures),
        "guidance": lambda: guidance.make_cells(quick, pictures),
    }[arguments.command]()
    where = {name: list(values) for name, values in where_of(arguments.recipe, arguments.where).items()}
    subject = make_subject(arguments.model, arguments.shards, where, arguments.precision, 32 if quick else None)
    protocol = cells.Protocol(
        arguments.model, subject.model.hash, arguments.shards, where, arguments.precision, made, batch, subset
    )
    cells.draw(protocol, subject, folder, arguments.processes)
    TABLES[arguments.command](protocol, subject, folder)


if __name__ == "__main__":
    run(main)
