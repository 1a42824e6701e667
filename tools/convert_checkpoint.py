"""Write a checkpoint in another form: another precision, a directory, or one file.

python tools/convert_checkpoint.py runs/ldm ldm/assets/icons --precision fp16
python tools/convert_checkpoint.py runs/ldm model.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ldm.checkpoints import native
from ldm.errors import run
from ldm.model import find

PRECISIONS = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name, directory or .safetensors file")
    parser.add_argument("output", type=Path, help="a directory, or a file if it ends in .safetensors")
    parser.add_argument("--precision", choices=PRECISIONS, default="keep", help="of the stored weights")
    arguments = parser.parse_args()

    source = find(arguments.model)
    config = native.read_config(source)
    parts = {name: native.read_part(source, name) for name in native.part_names(config)}
    native.save(arguments.output, config, parts, PRECISIONS[arguments.precision])
    size = {name: sum(tensor.numel() for tensor in part.values()) for name, part in parts.items()}
    print(f"{arguments.output}: " + ", ".join(f"{name} {count:,} values" for name, count in size.items()))


if __name__ == "__main__":
    run(main)
