"""The benchmark's commands run and name what they measured. No speed is asserted anywhere."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "benchmark.py")
sys.path.insert(0, str(ROOT / "tools"))  # as Python does for a script


@pytest.fixture
def benchmark(monkeypatch):
    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words)])
        runpy.run_path(TOOL, run_name="__main__")

    return call


def test_sides_take_turns():
    """Each is made ready before its clock starts, and none is always the first."""
    from turns import ratios, spread, take_turns

    seen = []
    sides = {name: lambda name=name: seen.append(f"ready {name}") or (lambda: seen.append(name)) for name in "abc"}
    wall, cpu = take_turns(sides, rounds=3)
    assert seen[1::2] == list("abcbcacab") and seen[::2] == [f"ready {name}" for name in "abcbcacab"]
    assert [len(each) for each in (*wall.values(), *cpu.values())] == [3] * 6
    assert ratios({"a": [1.0, 2.0], "b": [2.0, 2.0]}, "a", "b") == [2.0, 1.0]
    assert spread([1.0, 3.0, 2.0], "x", " of it") == "2.000x (1.000 to 3.000 of it)"


def test_unet(benchmark, tmp_path, capsys):
    config = ROOT / "configs" / "diffusion" / "tiny.yaml"
    benchmark("unet", "--config", config, "--batch", 2, "--side", 8, "--seconds", 0, "--output", tmp_path / "u.json")
    figures = json.loads((tmp_path / "u.json").read_text())
    assert figures["parameters"] > 0
    assert figures["training_samples_per_second"] > 0
    assert "guided sampling, 1 pictures" in capsys.readouterr().out


@pytest.mark.slow
def test_data(benchmark, tmp_path, capsys):
    words = ["--pictures", 24, "--per-shard", 12, "--picture-side", 32, "--size", 16, "--batch", 4, "--batches", 1]
    benchmark("data", *words, "--rounds", 1, "--workers", 0, 1, "--seek", 50, "--output", tmp_path / "d.json")
    figures = json.loads((tmp_path / "d.json").read_text())
    for workers in (0, 1):
        for side in ("ldm", "webdataset", "ImageFolder"):
            assert figures[f"{workers} workers"][side]["samples_per_second"] > 0
    assert figures["seek"]["first batch, after 2.9 epochs"] > 0
    assert "a shard of 50 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_start(benchmark, tmp_path, tiny_checkpoint):
    """Several fresh processes, each of which imports everything."""
    benchmark("start", "--model", tiny_checkpoint, "--runs", 1, "--steps", 2, "--output", tmp_path / "s.json")
    figures = json.loads((tmp_path / "s.json").read_text())
    assert figures["seconds"] == figures["all"][0]
    assert {"python", "import torch", "import open_clip", "load the model", "sample, 2 steps"} <= set(figures["stages"])
    assert all(seconds >= 0 for seconds in figures["stages"].values())


def test_a_model_that_is_not_there(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark("start", "--model", tmp_path / "none", "--runs", 1)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "no model" in err and err.count("\n") == 1


def test_load_is_of_what_both_libraries_read(benchmark, tiny_checkpoint, capsys):
    with pytest.raises(SystemExit):
        benchmark("load", "--model", tiny_checkpoint, "--runs", 1)
    said = capsys.readouterr()
    assert said.out == "" and "is not a diffusers directory" in said.err and said.err.count("\n") == 1


@pytest.mark.slow
def test_train(benchmark, tmp_path, capsys):
    config = ROOT / "configs" / "diffusion" / "tiny.yaml"
    words = ["--batch", 2, "--side", 8, "--rounds", 2, "--output", tmp_path / "t.json"]
    benchmark("train", "--config", config, *words)
    figures = json.loads((tmp_path / "t.json").read_text())
    assert figures["speed_ratio"] > 0 and len(figures["seconds"]["ldm"]) == 2
    assert min(figures["peak_mb"].values()) > 50
    assert "ldm / diffusers by the clock" in capsys.readouterr().out
