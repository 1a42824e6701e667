"""Write a checkpoint in another form: another layout, another precision, a directory, or one file.

python tools/convert_checkpoint.py runs/ldm ldm/assets/icons --precision fp16
python tools/convert_checkpoint.py sd-v1.ckpt model.safetensors --weights ema
python tools/convert_checkpoint.py runs/ldm for-others --to diffusers
python tools/convert_checkpoint.py stable-diffusion-2/ one.safetensors --to original --vae vae.safetensors
python tools/convert_checkpoint.py runs/lora/lora.safetensors half.safetensors --precision fp16
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
from ldm.errors import UserError, explain_os_error
from ldm.files import atomic_write
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

    dtype = None if arguments.precision == "keep" else getattr(torch, PRECISIONS[arguments.precision])
    if Path(arguments.model).is_file() and lora(Path(arguments.model), arguments, dtype):
        return
    settings = parse_settings(arguments.set)
    checkpoint = open_checkpoint(arguments.model, arguments.weights, settings, arguments.vae)
    if checkpoint.two_sets and arguments.weights == "auto":
        raise UserError(
            f"{checkpoint.path} has raw and averaged weights of the U-Net, and one of them would be lost; say which to "
            "keep: --weights ema draws better pictures, --weights raw is what training goes on with"
        )
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


def lora(path: Path, arguments: argparse.Namespace, dtype: torch.dtype | None) -> bool:
    """Write the LoRA at `path` in another precision, with all that it says of itself; False if it is none."""
    from ldm.checkpoints.lora_names import split
    from ldm.checkpoints.reading import read_tensors
    from ldm.checkpoints.writing import write_tensors

    tensors = read_tensors(path)
    if not any(map(split, tensors)):
        return False
    others = arguments.to != "native" or arguments.weights != "auto" or arguments.vae or arguments.set
    if others or arguments.output.suffix != ".safetensors":
        raise UserError(
            f"{path} is a LoRA, of which only the precision is changed; leave out --to, --weights, --vae and --set, "
            "and name an output that ends in .safetensors"
        )
    written = {name: cast(name, value, dtype) for name, value in tensors.items()}
    try:
        with atomic_write(arguments.output) as temporary:
            write_tensors(written, temporary, tensors.metadata)
    except OSError as error:
        raise explain_os_error(error, f"writing {arguments.output}") from error
    print(f"{arguments.output}: {sum(value.numel() for value in written.values()):,} values")
    return True


def cast(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another precision, if it has a fraction at all; raises UserError for numbers that it cannot hold."""
    from ldm.checkpoints.reading import all_finite

    if dtype is None or not value.is_floating_point():
        return value
    made = value.to(dtype)
    if not all_finite(made):
        short = {long: short for short, long in PRECISIONS.items()}[str(dtype).removeprefix("torch.")]
        raise UserError(f"{name} has numbers too large for {short}; choose another --precision")
    return made


class Cast(Mapping[str, "Tensor"]):
    """A network's tensors in another precision, each converted when it is asked for."""

    def __init__(self, state: Translated, dtype: torch.dtype | None) -> None:
        self.state, self.dtype = state, dtype

    def __getitem__(self, name: str) -> Tensor:
        return cast(name, self.state[name], self.dtype)

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
