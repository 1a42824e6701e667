"""Stable Diffusion XL's base in its full shape, random numbers: written, opened, drawn; time and memory of each.

python tests/equivalence/sdxl_full.py --side 512 --precision fp32

No test: it takes minutes, 7 GB of disk and (in float32) some 16 GB of memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import ldm
from ldm.checkpoints import export
from ldm.checkpoints.architectures import SD_XL
from ldm.checkpoints.native import part_names
from ldm.checkpoints.networks import skeleton
from ldm.jobs import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args()
    begun = time.perf_counter()

    def tell(what: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what:8} {time.perf_counter() - begun:7.1f} s since the start, peak {peak:5.1f} GiB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "xl.safetensors"
        states = {}
        for name in part_names(SD_XL):
            shapes = {key: value.shape for key, value in skeleton(name, SD_XL, path).state_dict().items()}
            states[name] = {key: torch.randn(shape, dtype=torch.float16) * 0.02 for key, shape in shapes.items()}
        export.write(path, SD_XL, states, "original")
        del states
        tell("written")
        model = ldm.load(path, device="cpu", precision=given.precision)
        tell("opened")
        settings = Settings(steps=2, cfg=5.0, width=given.side, height=given.side)
        for step in model.sample("a red heart", settings=settings):
            tell(f"step {step.index + 1}")


if __name__ == "__main__":
    main()
