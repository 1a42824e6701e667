"""tools/experiments.py --quick: each experiment draws, is resumed rather than repeated, and writes what it says."""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import sample, write_tar  # tests/ is the root of the tests' packages
from metrics.pictures_maker import COLOURS, STYLES, toy_shard
from PIL import Image

from ldm.errors import UserError
from ldm.image_io import save_png
from ldm.judge.classifier import Classifier, ClassifierConfig, save_classifier
from ldm.judge.pictures import read_pictures
from ldm.metrics import protocol

ROOT = Path(__file__).parents[2]


def run(*words: object, expect: int = 0, processes: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "tools/experiments.py", *map(str, words)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr if expect else done.stdout


def drawn(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*/*/*.png")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    toy_shard(folder / "a-0000.tar", side=64)
    return str(folder / "a-*.tar")


@pytest.mark.slow
def test_two_networks_at_equal_compute(tmp_path: Path) -> None:
    """Both learn for as long; the table says what came of it, and is kept."""
    shards = tmp_path / "icons-0000.tar"
    words = ["--shards", shards, "--output", tmp_path / "out", "--quick"]
    members = []
    for i, (name, style) in enumerate((n, s) for n in ("pizza", "sun") for s in ("noto emoji", "flat emoji")):
        members += sample(f"{i:05d}", i, name=name, style=style, captions=[f"a {name}, {style}"])
    write_tar(shards, members)
    first, (head, _, *rows) = run("networks", *words), (tmp_path / "out" / "networks.md").read_text().splitlines()
    assert head.startswith("| network | parameters |") and len(rows) == 2 and all(row in first for row in rows)
    figures = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1] for row in figures] == ["1.09 M", "1.64 M"] and figures[0][2] == "152 MFLOP"
    for row in figures:
        assert int(row[4]) >= 2 and 0.2 < float(row[6]) < 3


@pytest.mark.slow
@pytest.mark.parametrize("study", ["steps-table", "samplers", "guidance"])
def test_tables(study: str, shards: str, tmp_path: Path) -> None:
    words = (study, "--shards", shards, "--where", "mode=plain", "--output", tmp_path, "--quick")
    first = run(*words)
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2
    assert all(row["pictures"] == "16" and float(row["KD[efficientnet-lite0] deviation"]) > 0 for row in rows)
    if study == "samplers":
        spent = {row["sampler"]: float(row["evaluations"]) for row in rows}
        assert spent["ddim"] == 6 and spent["dpmpp_2m"] == 6 and spent["pc"] == 5  # the last step has one
    results = [protocol.read(path) for path in tmp_path.glob("*-*.json")] or [protocol.read(tmp_path / "cfg1.json")]
    assert all(found["protocol"]["command"] == "generation" for found in results)
    before = drawn(tmp_path)
    assert len(before) == 16 * len(rows)
    assert first == run(*words) and before == drawn(tmp_path)
    other = run(*words, "--precision", "bf16", expect=1)
    assert "made with another precision" in other and "Traceback" not in other
    for picture in tmp_path.glob("*.png"):
        Image.open(picture).load()


@pytest.fixture
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("studies.fewer_steps")


def small_classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(tuple(COLOURS), STYLES[:2], 16, 4)).eval()


@pytest.mark.slow
def test_fewer_steps(shards: str, tmp_path: Path) -> None:
    """The base guided, two evaluations a step, and students as they say; what is there is not drawn again."""
    save_classifier(small_classifier(), tmp_path / "judge")
    (tmp_path / "concepts.yaml").write_text("".join(f"- {name}\n" for name in COLOURS))
    words = ("fewer-steps", "--shards", shards, "--classifier", tmp_path / "judge", "--student", "same=icons,lcm")
    words = (
        *words,
        "--student",
        "itself=icons",
        "--concepts",
        tmp_path / "concepts.yaml",
        "--output",
        tmp_path / "out",
        "--quick",
    )
    first = run(*words)
    with open(tmp_path / "out" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    spent = {(row["model"], row["sampler"], row["steps"]): float(row["evaluations"]) for row in rows}
    base = {("base", sampler, "2"): 4.0 for sampler in ("ddim", "dpmpp_2m", "unipc")}
    assert spent == {**base, ("same", "lcm", "1"): 1.0, ("itself", "dpmpp_2m", "1"): 2.0}  # which says cfg 7.5
    assert all(float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) for row in rows)
    before = drawn(tmp_path / "out")
    assert len(before) == 16 * len(rows) and first == run(*words) and before == drawn(tmp_path / "out")
    assert "NAME=PATH" in run(*words, "--lora", "file.safetensors", expect=1)


def test_the_question_takes_prompts_evenly_and_scores_in_their_order(
    fewer_steps: Any, shards: str, tmp_path: Path
) -> None:
    """Pictures that are the judge's own are all right; each in another's place, all wrong."""
    pictures = read_pictures(shards, {}, 16)
    question = fewer_steps.Question.of(pictures, small_classifier(), list(COLOURS), STYLES[:2], 4)
    assert list(question.concepts) == [
        "a red heart, noto emoji", "a green apple, noto emoji", "a red heart, flat emoji", "a green apple, flat emoji",
    ]  # fmt: skip
    whole = fewer_steps.Question.of(pictures, small_classifier(), list(COLOURS), STYLES[:2], 100)
    assert len(whole.concepts) == 6
    paths = []
    for number, (prompt, concept) in enumerate([*whole.concepts.items(), *whole.concepts.items()]):
        own = pictures.of([concept], [prompt.partition(", ")[2]])
        save_png(own.image[0], tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    assert whole.score(paths)["accuracy"] == 1 > whole.score(paths)["low"] > 0.7
    assert whole.score([*paths[1:3], paths[0], *paths[4:6], paths[3]])["accuracy"] == 0


def test_the_table_and_the_words_of_students(fewer_steps: Any) -> None:
    row = {"model": "four", "sampler": "ddim", "steps": 4, "evaluations": 4.0, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    row |= {fewer_steps.FIGURE: 0.1234, f"{fewer_steps.FIGURE} deviation": 0.004}
    told = fewer_steps.table([row]).splitlines()
    assert told[-1] == "| four | ddim | 4 | 4 | 50.0% | 40.0% - 60.0% | 123.4 +- 4.0 |"
    assert fewer_steps.Student.read("a=hf:x/y") == fewer_steps.Student("a", "hf:x/y")
    assert fewer_steps.Student.read("a=b,lcm") == fewer_steps.Student("a", "b", "lcm")
    with pytest.raises(UserError, match="NAME=PATH"):
        fewer_steps.Student.read("runs/four")


@pytest.mark.slow
def test_processes_draw_the_same(shards: str, tmp_path: Path) -> None:
    words = ("guidance", "--shards", shards, "--where", "mode=plain", "--quick")
    run(*words, "--output", tmp_path / "one")
    run(*words, "--output", tmp_path / "two", processes=2)
    one, two = (sorted((tmp_path / name).rglob("*.png")) for name in ("one", "two"))
    assert len(one) == len(two) > 32
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert (tmp_path / "one" / "sweep.csv").read_text() == (tmp_path / "two" / "sweep.csv").read_text()


@pytest.mark.slow
def test_interpolation(shards: str, tmp_path: Path) -> None:
    words = ("interpolate", "--shards", shards, "--concepts", "red heart", "green apple", "--quick")
    run(*words, "--output", tmp_path)
    assert Image.open(tmp_path / "interpolate.png").size == (11 * 128 + 10 * 2, 3 * 128 + 2 * 2)
    assert "no picture of 'a cloud'" in run(
        "interpolate", "--shards", shards, "--concepts", "red heart", "a cloud", "--output", tmp_path, expect=1
    )


@pytest.mark.slow
def test_the_plane(tmp_path: Path) -> None:
    """All three ways back end near the data; of N(0, I) the mean distance from them is 0.4."""
    told = run("toy", "--output", tmp_path, "--quick")
    far = [float(word) for word in re.findall(r"on the mean (\d\.\d+) from", told)]
    assert len(far) == 3 and max(far) < 0.2
    Image.open(tmp_path / "toy.png").load()
    assert getattr(Image.open(tmp_path / "toy.gif"), "n_frames", 1) == 11


def test_grids(tmp_path: Path) -> None:
    """The Gaussian's part, and with a tiny model its own: Euler's figure, and a deviation."""
    words = ("--count", 0, "--output", tmp_path, "--spacings", "Karras", "--evaluations", 10)
    table = run("grids", *words, "--samplers", "ddim", "DPM++ 2M", "deis:order=3", "dpmpp_2m_sde")
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in table.splitlines()[2:]}
    assert (
        list(rows) == ["ddim", "DPM++ 2M", "deis:order=3", "dpmpp_2m_sde"]
        and (tmp_path / "grids.md").read_text() == table
    )
    assert float(rows["ddim"][2].strip(" |")) == pytest.approx(0.171, abs=2e-4)
    assert float(rows["dpmpp_2m_sde"][2].strip(" |")) == pytest.approx(0.08, abs=0.02)
    assert "ode is not compared here" in run("grids", *words, "--samplers", "ode", expect=1)
