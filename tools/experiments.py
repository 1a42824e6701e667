"""The lecture notes' experiments, on a trained model.

    python tools/experiments.py steps-table --shards 'data/icons/masters/train-*.tar' --output runs/steps-table
    python tools/experiments.py steps-table --quick

Each prints its figures with their counts and writes them, with the protocol they were made by, into --output. What was
drawn is kept there: an experiment that was stopped goes on where it was. --quick is a small one that ends in a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies import steps_table
from studies.subject import make_subject, where_of

from ldm.errors import UserError, run
from ldm.options import WHERE_HELP

QUICK_REFERENCE = 32  # real pictures


def main() -> None:
    arguments = parse()
    if arguments.processes < 1:
        raise UserError(f"--processes is {arguments.processes}; choose at least 1")
    {"steps-table": run_steps_table}[arguments.command](arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("steps-table", help="quality against eta and the number of DDIM steps")
    for command in (table,):
        command.add_argument("--model", default="icons", help="shipped name, directory or file")
        command.add_argument("--shards", required=True, help="the real pictures that the model was trained on")
        command.add_argument(
            "--recipe", default="configs/diffusion/icons.yaml", help="its data.where picks them, unless --where does"
        )
        command.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE,...", help=WHERE_HELP)
        command.add_argument("--precision", default="auto")
        command.add_argument("--output", required=True, help="folder of results")
        command.add_argument("--processes", type=int, default=1, help="on a CPU, one for each core is fastest")
        command.add_argument("--quick", action="store_true", help="few pictures, few steps")
    return parser.parse_args()


def run_steps_table(arguments: argparse.Namespace) -> None:
    where = {name: list(values) for name, values in where_of(arguments.recipe, arguments.where).items()}
    most = QUICK_REFERENCE if arguments.quick else None
    subject = make_subject(arguments.model, arguments.shards, where, arguments.precision, most)
    protocol = steps_table.Protocol(arguments.model, subject.model.hash, arguments.shards, where, arguments.precision)
    if arguments.quick:
        protocol = steps_table.quick(protocol)
    steps_table.run(protocol, subject, Path(arguments.output), arguments.processes)


if __name__ == "__main__":
    run(main)
