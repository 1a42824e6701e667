"""The average of any width of a finished training, from the snapshots it kept, as a model of its own.

    python tools/reconstruct_ema.py runs/ldm --width 0.07 --output runs/ldm-0.07

The run must have had loop.ema_widths, as (0.05, 0.1), and loop.ema_snapshot_every. See ldm/training/posthoc.py.
"""

from __future__ import annotations

from ldm.script import run

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.arguments import NATURAL, POSITIVE, Parser
from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PLAYERS = {
    "unet": ("unet", ""),
    "autoencoder": ("autoencoder", "autoencoder."),
}  # part, prefix of names


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="the output of a training that has finished")
    parser.add_argument(
        "--width", type=POSITIVE, required=True, help="of the average, a share of the run: 0.01 to 0.25"
    )
    parser.add_argument(
        "--step", type=NATURAL, default=0, help="as if the run had ended there; default: its last snapshot"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the model to write")
    arguments = parser.parse_args()

    from ldm.checkpoints import native
    from ldm.checkpoints.opening import open_checkpoint
    from ldm.training.posthoc import reconstruct

    model = open_checkpoint(arguments.run)
    config = model.config
    player = "unet" if config.unet is not None else "autoencoder"
    if getattr(config, player) is None:
        raise UserError(
            f"{arguments.run} holds no U-Net and no autoencoder to average; name the output of another training"
        )
    tensors, residual = reconstruct(arguments.run, player, arguments.width, arguments.step)
    part, prefix = PLAYERS[player]
    parts: dict[str, Mapping[str, Tensor]] = {name: model.state(name) for name in model.parts}
    parts[part] = {**parts[part], **{name.removeprefix(prefix): tensor for name, tensor in tensors.items()}}
    native.save(arguments.output, config, parts)
    print(f"wrote {arguments.output}: width {arguments.width:g}, its profile is met to {100 * residual:.2g} %")


if __name__ == "__main__":
    run(main)
