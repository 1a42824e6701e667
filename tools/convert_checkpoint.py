"""Write a checkpoint in another form: another layout, another precision, a directory, or one file.

python tools/convert_checkpoint.py runs/ldm ldm/assets/icons --precision fp16
python tools/convert_checkpoint.py sd-v1.ckpt model.safetensors --weights ema
python tools/convert_checkpoint.py runs/ldm for-others --to diffusers
python tools/convert_checkpoint.py stable-diffusion-2/ one.safetensors --to original --vae vae.safetensors
"""

from __future__ import annotations

from ldm.script import run

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.arguments import Parser
from ldm.device import PRECISIONS
from ldm.errors import UserError
from ldm.find import WEIGHTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.checkpoints.state import Translated


def main() -> None:
    arguments = parse()
    if arguments.output.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"{arguments.output} has the name of a pickle, which is not written; name a directory, or a file that "
            "ends in .safetensors"
        )
    import torch  # takes seconds, and a mistake is told before

    from ldm.checkpoints import export, native
    from ldm.checkpoints.opening import open_checkpoint, parse_settings

    settings = parse_settings(arguments.set)
    checkpoint = open_checkpoint(arguments.model, arguments.weights, settings, arguments.vae)
    if checkpoint.two_sets and arguments.weights == "auto":
        raise UserError(
            f"{checkpoint.path} has raw and averaged weights of the U-Net, and one of them would be lost; say which to "
            "keep: --weights ema draws better pictures, --weights raw is what training goes on with"
        )
    dtype = None if arguments.precision == "keep" else getattr(torch, PRECISIONS[arguments.precision])
    states = {name: Cast(checkpoint.state(name), dtype) for name in checkpoint.parts}
    remarks = list(checkpoint.notices)
    if arguments.to == "native":
        native.save(arguments.output, checkpoint.config, states)
    else:
        remarks += export.write(arguments.output, checkpoint.config, states, arguments.to)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    size = {name: sum(math.prod(part.state.form(key)[1]) for key in part) for name, part in states.items()}
    print(f"{arguments.output}: " + ", ".join(f"{name} {count:,} values" for name, count in size.items()))


class Cast(Mapping[str, "Tensor"]):
    """A network's tensors in another precision, each converted when it is asked for."""

    def __init__(self, state: Translated, dtype: torch.dtype | None) -> None:
        self.state, self.dtype = state, dtype

    def __getitem__(self, name: str) -> Tensor:
        value = self.state[name]
        return value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="shipped name, checkpoint directory or file, or hf:owner/name")
    parser.add_argument("output", type=Path, help="a directory, or a file if it ends in .safetensors")
    parser.add_argument(
        "--to", choices=("native", "original", "diffusers"), default="native", help="the layout to write"
    )
    parser.add_argument("--precision", choices=("keep", *PRECISIONS), default="keep", help="of the stored weights")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="of files with two sets")
    parser.add_argument("--vae", metavar="MODEL", help="take the autoencoder of this checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="what goes before the files: parameterization=v"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
