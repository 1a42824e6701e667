"""Peak memory of drawing at Stable Diffusion v1.5's shapes, random weights: each case in a process of its own.

    python tools/peak_memory.py --size 256 512 --batch 1 2 --how plain low-memory tile
    python tools/peak_memory.py --device cuda --precision fp16 --size 512 1024 --batch 1 4

Prints, for each size, batch and way, the weights, and what the sampler's steps and the decoding take beside them at
most. On a CPU that is the process' memory above what it holds before; on a GPU what torch has allocated.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from turns import child, resident  # beside this file

from ldm.arguments import COUNT, SIDE, Parser, add_machine

WAYS = ("plain", "low-memory", "tile")
COLUMNS = ("weights", "steps", "decoding", "seconds")


def main() -> None:
    arguments = parse()
    if arguments.case:
        print(json.dumps(measure(arguments)))
        return
    print(f"{'size':>6} {'batch':>6} {'how':12}" + "".join(f"{name:>10}" for name in COLUMNS))
    for size in arguments.size:
        for batch in arguments.batch:
            for how in arguments.how:
                words = [f"--size={size}", f"--batch={batch}", f"--how={how}", f"--steps={arguments.steps}"]
                words += [f"--device={arguments.device}", f"--precision={arguments.precision}", "--case"]
                found = json.loads(child([__file__, *words]).splitlines()[-1])
                row = "".join(f"{found[name]:8.2f} {'s' if name == 'seconds' else 'G'}" for name in COLUMNS)
                print(f"{size:6} {batch:6} {how:12}{row}", flush=True)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--size", type=SIDE, nargs="+", default=[256, 512], help="pixels of a side")
    parser.add_argument("--batch", type=COUNT, nargs="+", default=[1, 2], help="pictures at once, each guided")
    parser.add_argument("--how", choices=WAYS, nargs="+", default=WAYS, help="tile: decoded in tiles of half the side")
    parser.add_argument("--steps", type=COUNT, default=1, help="of the sampler; each takes the same memory")
    add_machine(parser.add_argument)
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The first size, batch and way, in this process: gigabytes, and seconds of it all."""
    import torch

    from ldm import backends, generate
    from ldm.autoencoder.codec import Codec
    from ldm.checkpoints.architectures import SD_V1
    from ldm.checkpoints.networks import fill, skeleton
    from ldm.device import choose_device, choose_precision
    from ldm.jobs import Request, Settings
    from ldm.model import assemble

    size, batch, how = arguments.size[0], arguments.batch[0], arguments.how[0]
    device = choose_device(arguments.device)
    dtype, low = choose_precision(arguments.precision, device), how == "low-memory"
    parts, held = {}, 0
    for name in ("autoencoder", "text", "unet"):
        parts[name] = skeleton(name, SD_V1, "here")
        shapes = {key: value.shape for key, value in parts[name].state_dict().items()}
        state = {key: torch.randn(shape, dtype=dtype) * 0.02 for key, shape in shapes.items()}
        fill(parts[name], state, "cpu" if low else device, dtype)
        held += sum(value.numel() * value.element_size() for value in state.values())
        if device.type == "cpu":
            backends.run_by("auto", parts[name])
    codec = Codec(parts["autoencoder"], SD_V1.autoencoder)  # type: ignore[arg-type]
    model = assemble(SD_V1, codec, {"text": parts["text"]}, parts["unet"])  # type: ignore[arg-type, dict-item]
    model = replace(model, works_on=device if low else None)
    requests = [Request("a red heart", seed=seed) for seed in range(batch)]
    plan = Settings(steps=arguments.steps, width=size, height=size).plan()
    peak, begun = Peak(device.type), time.perf_counter()
    *_, last = generate.sample(model, requests, plan)
    steps = peak.taken()
    generate.decode(model, last, size // 2 if how == "tile" else None)
    figures = {"weights": held / 1e9, "steps": steps / 1e9, "decoding": peak.taken() / 1e9}
    return figures | {"seconds": time.perf_counter() - begun}


class Peak:
    """Bytes that were taken at most since the last question, above what was held at the first."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.before = self._at_most() if kind == "cuda" else resident("VmRSS")
        self._begin()

    def taken(self) -> int:
        found = self._at_most() - self.before
        self._begin()
        return found

    def _at_most(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self.kind == "cuda" else resident("VmHWM")

    def _begin(self) -> None:
        import torch

        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    run(main)
