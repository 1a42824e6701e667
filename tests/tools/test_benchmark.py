"""The benchmark's commands run and name what they measured. No speed is asserted anywhere."""

import json
import math
import runpy
import subprocess
import sys
import time
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
@pytest.mark.parametrize("kind", ["step", "text", "decode", "encode", "sample", "train"])
def test_pairs(kind, benchmark, tmp_path, capsys):
    """The same work by each side, with the memory of a process of its own."""
    pytest.importorskip("diffusers")
    words = [kind, "--shape", "tiny", "--rounds", 2, "--steps", 2, "--sides", "ldm", "diffusers"]
    benchmark(*words, "--output", tmp_path / "p.json")
    figures = json.loads((tmp_path / "p.json").read_text())
    assert len(figures["cpu"]["diffusers"]) == 2 and min(figures["peak"].values()) > 50e6
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {kind}")]
    assert len(rows) == 2 and rows[1].count("|") == 8 and "x (" in rows[1]


@pytest.mark.parametrize("kind", ["step", "text", "decode", "encode"])
def test_sides_do_the_same_work(kind, tmp_path, monkeypatch):
    """Ours and theirs give the same numbers, or there would be nothing to compare."""
    pytest.importorskip("diffusers")
    import torch

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    made = runpy.run_path(TOOL)
    a = made["parse"]([kind, "--shape", "tiny"])
    sides, model = made["sides"], made["Model"](a)
    sides.quiet()
    given = sides.Inputs(model.config, a)
    with torch.inference_mode():
        ours, theirs = (side(kind, "", model.path, given, a)() for side in (sides.ours, sides.theirs))
    torch.testing.assert_close(ours, theirs.clamp(-1, 1) if kind == "decode" else theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_start(benchmark, tmp_path, capsys):
    """Several fresh processes, each of which imports everything."""
    pytest.importorskip("diffusers")
    benchmark("start", "--rounds", 1, "--steps", 2, "--output", tmp_path / "s.json")
    figures = json.loads((tmp_path / "s.json").read_text())
    assert len(figures) == 3 and all(figure["cpu"] > 0 for figure in figures.values())


def test_load_is_of_what_both_libraries_read(benchmark, tiny_checkpoint, capsys):
    with pytest.raises(SystemExit):
        benchmark("load", "--model", tiny_checkpoint)
    said = capsys.readouterr()
    assert said.out == "" and "is not a diffusers directory" in said.err and said.err.count("\n") == 1


def test_a_side_that_is_not_there(benchmark, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SystemExit):
        benchmark("alone", "--of", "step", "--shape", "tiny", "--sides", "openvino")
    assert "pip install -e '.[openvino]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_by_both_libraries_on_weights_made_here(monkeypatch, capsys):
    pytest.importorskip("diffusers")
    words = "--shape tiny --batch 1 2 --side 8 --rounds 1 --device cpu --precision fp32 --sides ldm diffusers"
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *words.split()])
    runpy.run_path(str(ROOT / "tools" / "gpu_step.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1:3] for row in rows] == [
        [f" tiny, batch {batch}, fp32 ", f" {side} "] for side in ("ldm", "diffusers") for batch in (1, 2)
    ]
    assert all(float(row.split("|")[3]) > 0 for row in rows)


def test_a_side_that_fails_leaves_the_others_their_turn(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    made = runpy.run_path(str(ROOT / "tools" / "gpu_step.py"))
    a = made["parse"](["--shape", "tiny", "--batch", "1", "2", "--device", "cpu", "--precision", "fp32"])

    def broken(how: str, a: object) -> None:
        raise RuntimeError("no kernel for sm_90|a\nand more")

    monkeypatch.setitem(made["measured"].__globals__, "ours", broken)
    assert [*made["measured"]("ldm", a, math.inf)] == 2 * ["failed: RuntimeError: no kernel for sm_90/a | | |"]


def test_what_a_part_has_printed_stays_when_the_time_is_over(monkeypatch, capfd):
    part, real = runpy.run_path(str(ROOT / "tools" / "gpu_check.py"))["part"], subprocess.run

    def late(words: list[str], **how: object) -> None:
        real(words, **how)
        raise subprocess.TimeoutExpired(words, 1)

    monkeypatch.setattr(subprocess, "run", late)
    part("steps", ["-c", "print('a row')"], time.monotonic() + 100)
    assert capfd.readouterr().out == "\n## steps\n\na row\nnot finished: the time was over\n"


def test_without_a_gpu_its_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "gpu_check.py"), run_name="__main__")
    assert "no CUDA device" in capsys.readouterr().err


def test_what_a_gpus_check_and_the_page_run_is_understood(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    made = runpy.run_path(TOOL)
    check = runpy.run_path(str(ROOT / "tools" / "gpu_check.py"))
    tools = {name: runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["parse"] for name in ("benchmark", "gpu_step")}
    read = [tools[name]([*words, "--device", "cuda"]) for name, *words in check["PARTS"]]
    assert {each.shape for each in read} == {"sd", "sdxl"}
    assert {each.kind for each in read if "kind" in each} == {"sample", "decode", "train"}
    assert {batch for each in read if "kind" not in each for batch in each.batch} == {1, 4, 16}
    small = [tools[name](words) for name, *words in map(check["rehearsed"], check["PARTS"])]
    assert {(each.shape, each.rounds, each.precision) for each in small} == {("tiny", 1, "fp32")}
    assert {tuple(each.sides) for each in small} == {("ldm", "diffusers")}
    assert all(made["parse"](list(words)).shape in ("small", "sd", "icons") for words in made["PAGES"])
