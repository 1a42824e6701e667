"""Small shards for the tests, built member by member, so that they can be wrong in every way."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.shards import ShardReader, index_shard


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def picture(seed: int = 0, size: tuple[int, int] = (24, 24), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """Random pixels, encoded."""
    rng = np.random.default_rng(seed)
    bands = len(mode) if mode in ("RGB", "RGBA") else 1
    pixels = rng.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels if bands > 1 else pixels[..., 0]).save(out, kind)
    return out.getvalue()


def sample(key: str, seed: int = 0, **meta: object) -> list[tuple[str, bytes]]:
    """The three members of a good sample."""
    return [
        (f"{key}.png", picture(seed)),
        (f"{key}.txt", f"caption of {key}".encode()),
        (f"{key}.json", json.dumps(meta).encode()),
    ]


def bare(key: str) -> str:
    """A batch's key without the name of the shard."""
    return key.rpartition("/")[2]


def text_shards(folder: Path, counts: Iterable[int]) -> str:
    """Shards of `counts` samples that are a text member each; returns their pattern. Keys are s<shard>-<number>."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        write_tar(folder / f"{shard:03d}.tar", [(f"s{shard}-{i:04d}.txt", b"x") for i in range(count)])
    return str(folder / "*.tar")


# ---------------------------------------------------------------- tools/make_shards.py, as people run it

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


def command(pictures: Path, output: Path, *options: object) -> list[str]:
    return [sys.executable, str(TOOL), str(pictures), "--output", str(output), "--workers", "1", *map(str, options)]


def make(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*args), capture_output=True, text=True)  # type: ignore[arg-type]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def records(output: Path, glob: str = "*.tar"):
    indices = [index_shard(path) for path in sorted(output.glob(glob))]
    reader = ShardReader(indices)
    return [reader.read(shard, i) for shard, index in enumerate(indices) for i in range(len(index))]


def left_out(output: Path) -> dict[str, list[str]]:
    found = json.loads((output / "report.json").read_text())["left_out"]
    return {reason: sorted(names) for reason, names in found.items()}
