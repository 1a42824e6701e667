"""Make a model of a training's saved state, of its averaged or its raw weights: of a run that has not finished, too.

    python tools/export_state.py runs/ldm models/at-12000 --step 12000
    python tools/export_state.py runs/ldm models/raw --weights raw
    python tools/export_state.py /mnt/cluster/runs/ldm models/mine autoencoder=models/ae text=models/clip

Written is what the run would have left had it ended there, a LoRA or a word where it trains that. The run is only read,
and may go on meanwhile. The last words are settings over the run's own, for what lies elsewhere on this machine: the
models that it names, and data.shards of an autoencoder or a text tower, which are read once more.
"""

from __future__ import annotations

from ldm.script import run

from pathlib import Path

from ldm.arguments import NATURAL, Parser
from ldm.find import WEIGHTS


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="the output of a training")
    parser.add_argument("output", type=Path, help="a new folder for the model")
    parser.add_argument("--step", type=NATURAL, default=0, help="of the state; default: the newest")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="auto: the average, if the run has one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the run")
    arguments = parser.parse_intermixed_args()

    from ldm.training.exporting import export_state

    print(export_state(arguments.run, arguments.output, arguments.step, arguments.weights, arguments.overrides))


if __name__ == "__main__":
    run(main)
