"""The README's walk as it is printed, on a folder of forty pictures as people have them, to a model in diffusers."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from ldm.conditioning.torchvision_ops import declare_missing_operators

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Train on your own pictures")[2]
LINES = [line.strip() for line in SECTION.partition("\n## ")[0].splitlines() if line.strip().startswith("python ")]
# What the README says of trying it, and less: a step each, on one thread.
QUICK = {
    "train_autoencoder": "loop.steps=1 loop.global_batch=8 scale_samples=8 loop.threads=1",
    "train_clip": "loop.steps=1 loop.global_batch=8 loop.threads=1",
    "train_diffusion": "loop.steps=1 loop.global_batch=8 sample.steps=1 loop.threads=1",
    "train_embedding": "loop.steps=1 sample.steps=1 sample.prompts='[a cat]' loop.threads=1",
    "txt2img": "--steps 1",
}


def shape(numbers: random.Random, mode: str, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    left, top = size[0] // 4, size[1] // 4
    colour = tuple(numbers.randrange(256) for _ in range(3))
    ImageDraw.Draw(picture).ellipse((left, top, 3 * left, 3 * top), fill=colour)
    return picture.convert("L" if mode == "I;16" else "RGB").convert(mode)


def make_pictures(folder: Path) -> int:
    """Of kinds, shapes and names that a folder of one's own has; some have no caption, some are no pictures."""
    numbers = random.Random(0)
    kinds = [("jpg", "RGB", (300, 200))] * 12 + [("png", "RGBA", (128, 256))] * 8 + [("webp", "RGB", (90, 90))] * 6
    kinds += [("JPG", "L", (64, 80))] * 4 + [
        ("png", "P", (70, 70)),
        ("jpg", "CMYK", (80, 60)),
        ("png", "I;16", (66, 66)),
    ]
    kinds += [("png", "LA", (100, 40)), ("png", "1", (65, 65)), ("jpeg", "RGB", (900, 60)), ("png", "RGB", (9, 9))]
    for number, (suffix, mode, size) in enumerate(kinds):
        path = folder / ("holiday 2024" if number % 3 else ".") / f"Bild {number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape(numbers, mode, size).save(path)
        if number != 5:
            path.with_suffix(".txt").write_text(f"a ball, number {number}\n", encoding="utf-8")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.md").write_text("no picture")
    return len(kinds) + 2


@pytest.mark.slow
def test_the_walk_as_printed(tmp_path: Path) -> None:
    assert make_pictures(tmp_path / "photos") == 39 and len(LINES) == 9
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for line in LINES:
        _, program, *words = shlex.split(line)
        words += shlex.split(QUICK.get(Path(program).stem, ""))
        done = subprocess.run(
            [sys.executable, str(ROOT / program), *words], cwd=tmp_path, env=alone, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    for run in ("ldm", "lora", "mine"):
        assert [path.name for path in (tmp_path / "runs" / run / "samples").iterdir()] == ["00000001.png"]
    assert (tmp_path / "outputs" / "grid-00000.png").exists()

    declare_missing_operators()
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "for-others", local_files_only=True)
    drawn = pipeline("a red ball", num_inference_steps=1, height=64, width=64).images[0]  # type: ignore[operator]
    assert drawn.size == (64, 64)
