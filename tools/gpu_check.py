"""All that a GPU has to say, in one call of at most eight minutes: the tests that need one, then the benchmark on it.

    python tools/gpu_check.py > gpu.md

Parts stand in the order of what they are worth, and what there was no time for is named. It needs CUDA and
`pip install -e '.[test]'`.
"""

from __future__ import annotations

from ldm.script import run

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ldm.arguments import COUNT, Parser
from ldm.errors import UserError

ROOT = Path(__file__).parents[1]
EAGER = ["--sides", "ldm", "ldm/graph", "diffusers"]
ALL = ["--sides", "ldm", "ldm/graph", "ldm/compile", "diffusers", "diffusers/compile"]
STEP = ["step", "--shape", "sd", "--side", "64", "--precision", "fp16", "--rounds", "20"]
PARTS = (
    [*STEP, "--batch", "1", *EAGER],
    [*STEP, "--batch", "4", *EAGER],
    ["sample", "--shape", "sd", "--side", "64", "--precision", "fp16", "--steps", "20", *EAGER],
    ["decode", "--shape", "sd", "--side", "64", "--precision", "fp16", "--sides", "ldm", "diffusers"],
    ["train", "--shape", "sd", "--side", "32", "--batch", "16", "--precision", "bf16", "--sides", "ldm", "diffusers"],
    [*STEP, "--batch", "16", *EAGER],
    [*STEP, "--batch", "1", *ALL],
    ["step", "--shape", "small", "--precision", "fp16", "--rounds", "50", *ALL],
)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--seconds", type=COUNT, default=480, help="in all")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device on this machine; run this where there is one")
    until = time.monotonic() + arguments.seconds
    print(f"# On {torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    part("tests", ["-m", "pytest", "-n", "0", "-q", "-m", "gpu", "tests"], until)
    benchmark = ["tools/benchmark.py"]
    with tempfile.TemporaryDirectory() as folder:
        for words in PARTS:
            model = Path(folder) / words[2]
            if not model.exists():  # made once for all parts of a shape
                made = f"random_model(Path({str(model)!r}), shape({words[2]!r}))"
                script = f"import sys; sys.path.insert(0, 'tools'); from sides import Path, random_model, shape; {made}"
                part(f"a random model, {words[2]}", ["-c", script], until)
            part(" ".join(words), [*benchmark, *words, "--device", "cuda", "--model", str(model)], until)


def part(name: str, words: list[str], until: float) -> None:
    """Run one, and say how it ended."""
    print(f"\n## {name}\n", flush=True)
    left = until - time.monotonic()
    if left < 10:
        print("not run: the time was over", flush=True)
        return
    try:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        print("not finished: the time was over", flush=True)
        return
    print(done.stdout.strip(), flush=True)
    if done.returncode:
        print(f"\nfailed: {' '.join(done.stderr.strip().splitlines()[-1:])}", flush=True)


if __name__ == "__main__":
    run(main)
