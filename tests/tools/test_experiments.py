"""tools/experiments.py --quick: each experiment draws, is resumed rather than repeated, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from metrics.pictures_maker import toy_shard
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(*words: object, expect: int = 0) -> str:
    command = [sys.executable, "tools/experiments.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr if expect else done.stdout


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    toy_shard(folder / "a-0000.tar", side=64)
    return str(folder / "a-*.tar")


@pytest.mark.slow
@pytest.mark.parametrize("study", ["steps-table", "samplers", "guidance"])
def test_tables(study: str, shards: str, tmp_path: Path) -> None:
    words = (study, "--shards", shards, "--where", "mode=plain", "--output", tmp_path, "--quick")
    first = run(*words)
    figures = json.loads((tmp_path / "figures.json").read_text())
    cells = {name: row for name, row in figures["figures"].items() if name != "autoencoder alone"}
    assert len(cells) >= 2 and all(row["pictures"] == 16 and row["kernel"] > 0 for row in cells.values())
    if study == "samplers":
        spent = {name: row["evaluations"] for name, row in cells.items()}
        assert spent["ddim-6"] == 6 and spent["dpmpp_2m-6"] == 6 and spent["pc-6"] == 5  # the last step has one
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert first == run(*words) and before == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")
    }
    other = run(*words, "--precision", "bf16", expect=1)
    assert "results of another precision" in other and "Traceback" not in other
    for picture in tmp_path.glob("*.png"):
        Image.open(picture).load()


@pytest.mark.slow
def test_processes_draw_the_same(shards: str, tmp_path: Path) -> None:
    words = ("guidance", "--shards", shards, "--where", "mode=plain", "--quick")
    run(*words, "--output", tmp_path / "one")
    run(*words, "--output", tmp_path / "two", "--processes", 2)
    one, two = (json.loads((tmp_path / name / "figures.json").read_text())["figures"] for name in ("one", "two"))
    for name, row in one.items():
        assert row == pytest.approx(two[name], rel=1e-3), name


@pytest.mark.slow
def test_interpolation(shards: str, tmp_path: Path) -> None:
    words = ("interpolate", "--shards", shards, "--concepts", "red heart", "green apple", "--quick")
    run(*words, "--output", tmp_path)
    assert Image.open(tmp_path / "interpolate.png").size == (11 * 64 + 10 * 2, 3 * 64 + 2 * 2)
    assert "no picture of 'a cloud'" in run(
        "interpolate", "--shards", shards, "--concepts", "red heart", "a cloud", "--output", tmp_path, expect=1
    )


@pytest.mark.slow
def test_the_plane(tmp_path: Path) -> None:
    run("toy", "--output", tmp_path, "--quick")
    Image.open(tmp_path / "toy.png").load()
    assert getattr(Image.open(tmp_path / "toy.gif"), "n_frames", 1) == 11
