"""All that a GPU has to say, in one call of at most eight minutes: the tests that need one, then the benchmarks on it.

    python tools/gpu_check.py > gpu.md
    python tools/gpu_check.py --rehearse        # each part on the CPU, small

A guided step of Stable Diffusion v1 and SDXL, by each backend and beside diffusers; a whole trajectory; decoding; a
training step. Parts stand in the order of what they are worth, and what there was no time for is named. It needs
CUDA and `pip install -e '.[test]'`. What it prints has not been seen on a GPU yet.
"""

from __future__ import annotations

from ldm.script import run

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ldm.arguments import COUNT, Parser
from ldm.errors import UserError

ROOT = Path(__file__).parents[1]
SAMPLE = ["sample", "--shape", "sd", "--side", "64", "--precision", "fp16", "--steps", "20", "--rounds", "3"]
DECODE = ["decode", "--shape", "sd", "--side", "64", "--precision", "fp16", "--rounds", "10"]
TRAIN = ["train", "--shape", "sd", "--side", "32", "--batch", "16", "--precision", "bf16", "--rounds", "10"]
STEP = ["gpu_step", "--precision", "fp16", "--rounds", "20"]
EAGER = ["ldm", "ldm/fused", "ldm/graph", "diffusers"]
COMPILED = ["ldm/compile", "diffusers/compile"]
PARTS = (  # a tool and its words
    [*STEP, "--shape", "sd", "--batch", "1", "4", "16", "--sides", *EAGER],
    ["benchmark", *SAMPLE, "--sides", "ldm", "ldm/graph", "diffusers"],
    [*STEP, "--shape", "sdxl", "--batch", "1", "4", "--sides", *EAGER],
    ["benchmark", *TRAIN, "--sides", "ldm", "diffusers"],
    ["benchmark", *DECODE, "--sides", "ldm", "diffusers"],
    [*STEP, "--shape", "sd", "--batch", "1", "4", "--sides", *COMPILED],
    [*STEP, "--shape", "sdxl", "--batch", "1", "--sides", *COMPILED],
)
SMALL = {  # a rehearsal's, in the place of what an option says
    **{"--shape": "tiny", "--side": "16", "--precision": "fp32", "--rounds": "1", "--steps": "2"},
    **{"--batch": "1", "--sides": "ldm diffusers"},
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--seconds", type=COUNT, default=480, help="in all")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small: whether each part runs at all")
    arguments = parser.parse_args()
    import torch

    if not (torch.cuda.is_available() or arguments.rehearse):
        raise UserError("torch sees no CUDA device on this machine; run this where there is one, or with --rehearse")
    until = time.monotonic() + arguments.seconds
    where = "a CPU, small, as a rehearsal" if arguments.rehearse else torch.cuda.get_device_name()
    print(f"# On {where}, torch {torch.__version__}\n", flush=True)
    if not arguments.rehearse:
        # named, so that no time goes by, and nothing is missed, for the imports of all others
        files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
        part("tests", ["-m", "pytest", "-n", "0", "-v", "-m", "gpu", "-rs", *sorted(files)], until)
    with tempfile.TemporaryDirectory() as folder:
        for words in map(rehearsed, PARTS) if arguments.rehearse else PARTS:
            given = ["--device", "cpu" if arguments.rehearse else "cuda"]
            if words[0] == "benchmark":
                model, shape = Path(folder) / "model", words[words.index("--shape") + 1]
                given += ["--model", str(model)]
                if not model.exists():  # made once for all parts
                    made = f"sides.random_model(sides.Path({str(model)!r}), sides.shape({shape!r}))"
                    script = f"import sys; sys.path.insert(0, 'tools'); import sides; {made}"
                    part(f"a random model, {shape}", ["-c", script], until)
            part(" ".join(words), [f"tools/{words[0]}.py", *words[1:], *given], until)


def rehearsed(words: Sequence[str]) -> list[str]:
    """The same on a small scale."""
    made: list[str] = []
    for index, word in enumerate(words):
        option = next((each for each in reversed(words[:index]) if each.startswith("--")), "")
        if word.startswith("--") or option not in SMALL:
            made.append(word)
        elif words[index - 1] == option:  # the first of its values stands for all
            made += SMALL[option].split()
    return made


def part(name: str, words: list[str], until: float) -> None:
    """Run one, which prints for itself, and say how it ended."""
    print(f"\n## {name}\n", flush=True)
    left = until - time.monotonic()
    if left < 10:
        print("not run: the time was over", flush=True)
        return
    try:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        print("not finished: the time was over", flush=True)
        return
    if done.returncode:
        print(f"\nfailed: {' '.join(done.stderr.strip().splitlines()[-1:])}", flush=True)


if __name__ == "__main__":
    run(main)
