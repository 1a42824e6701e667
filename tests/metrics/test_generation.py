"""Evaluation of generated pictures as a user runs it: a model, a folder, a sweep, two results; one process or two."""

import csv
import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm.metrics.spaces as spaces
from ldm.checkpoints import native
from ldm.config import AutoencoderConfig, EncoderConfig, ModelConfig, UNetConfig
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.metrics import protocol
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing
from ldm.metrics.features import FeatureSpace
from ldm.metrics.figures import Measures
from ldm.metrics.generation import Against
from ldm.metrics.sources import open_source
from ldm.metrics.sweep import KINDS, cells, parse_axes, plot, sweep
from ldm.unet import UNet

from .pictures_maker import toy_shard

ROOT = Path(__file__).parents[2]
SMALL = ("--subset", 4, "--subsets", 3, "--neighbours", 2, "--ball", 2)


def toy_space(name: str, device: str = "cpu") -> FeatureSpace:
    """Means over quarters of the picture: 12 numbers."""

    def network(image):
        return torch.nn.functional.adaptive_avg_pool2d(image, 2).flatten(1)

    return FeatureSpace(name, 12, network, hash="0")


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """Run `evaluate.py` with a space that takes no time; (exit code, what it printed, what it complained of)."""
    monkeypatch.setattr(spaces, "make_space", toy_space)

    def call(*words: object) -> tuple[int, str, str]:
        given = [*words, *(("--cache", tmp_path / "cache") if "generation" in words else ())]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, given)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def words(tiny_checkpoint, tmp_path):
    """A model, and nine real pictures with their captions."""
    shard = toy_shard(tmp_path / "toy.tar")
    drawn = ("--model", tiny_checkpoint, "--captions", shard, "--steps", 2, "--cfg", 2, "--batch-size", 4)
    return (*drawn, "--reference", shard, *SMALL, "--space", "toy")


def test_a_model_is_measured_and_said_how(evaluate, words, tmp_path):
    with_frechet = (*words, "--count", 14, "--allow-few", "--held-out", tmp_path / "toy.tar", "--seed", 3)
    code, out, _ = evaluate("generation", *with_frechet, "--out", tmp_path / "a")
    assert code == 0
    made = json.loads((tmp_path / "a" / "figures.json").read_text())
    assert {"FD[toy]", "KD[toy]", "recall[toy]", "coverage[toy] held-out"} <= made["figures"].keys()
    assert "14 pictures against 9 real ones and 9 held out, 32 px" in out and "KD[toy]" in out
    told = made["protocol"]
    assert (told["pictures"], told["size"], told["drawing"]["first_seed"]) == (14, 32, 3)
    assert told["drawing"]["sampler"] == "dpmpp_2m" and told["drawing"]["precision"] == "fp32"
    assert told["reference"]["hash"] == told["held_out"]["hash"] and len(told["reference"]["hash"]) == 64
    assert len(made["subject"]["hash"]) == 64 and made["cost"]["evaluations"] == 4
    shard = str(tmp_path / "toy.tar")
    assert made["sources"] == {"captions": shard, "reference": shard, "held_out": shard}
    assert made["subject"]["weights"] == "the only ones"
    assert told["measures"]["kernel_seed"] == 2020 and "allow_few" not in told["measures"]
    for words in (
        "sampler dpmpp_2m, spacing karras",
        "first seed 3",
        f"hash {told['reference']['hash'][:8]}",
        "resize",
    ):
        assert words in out.partition("measured so:")[2]
    assert len(list((tmp_path / "a" / "features").glob("toy-*"))) == 1  # of the drawn; the real ones' are in the cache
    assert len(list((tmp_path / "cache").glob("toy-*"))) == 1

    # The pictures that were drawn, measured as a folder, have the same figures.
    code, _, _ = evaluate(
        "generation", "--pictures", tmp_path / "a" / "pictures", "--size", 32, "--reference", tmp_path / "toy.tar",
        *SMALL, "--space", "toy", "--allow-few", "--output", tmp_path / "b.json",
    )  # fmt: skip
    assert code == 0
    again = json.loads((tmp_path / "b.json").read_text())
    for name, value in again["figures"].items():
        assert value == pytest.approx(made["figures"][name], rel=1e-9, abs=1e-12)
    assert again["subject"]["pictures"] == made["subject"]["pictures"]

    code, _, err = evaluate("--compare", tmp_path / "a" / "figures.json", tmp_path / "b.json")
    assert code == 1 and "do not compare" in err and "drawing" in err and err.count("\n") == 1
    for flag in ("--ignore", "--besides"):  # the latter is its old name
        words = "--compare", tmp_path / "a" / "figures.json", tmp_path / "b.json", flag, "drawing,held_out"
        code, out, _ = evaluate(*words)
        assert code == 0 and "difference" in out


def test_a_model_of_classes_is_measured_by_its_labels(evaluate, words, tmp_path):
    unet = UNetConfig(3, 3, 32, (1,), 1, (), context_width=0, classes=2)
    codec, labels = AutoencoderConfig(kind="identity", scale=(1.0,)), EncoderConfig(labels=("cat", "dog"))
    native.save(
        tmp_path / "m", ModelConfig(autoencoder=codec, unet=unet, encoder=labels, image_size=16), {"unet": UNet(unet)}
    )
    given = ("--model", tmp_path / "m", "--steps", 1, "--batch-size", 3, "--count", 8)
    given = (*given, "--reference", tmp_path / "toy.tar", *SMALL, "--space", "toy", "--allow-few", "--size", 16)
    code, _, err = evaluate("generation", *given, "--labels", "cat, dog", "--out", tmp_path / "a")
    assert code == 0, err
    told = json.loads((tmp_path / "a" / "figures.json").read_text())["protocol"]["drawing"]
    assert (told["labels"], told["captions"], told["batch_size"]) == (["cat", "dog"], 0, 3)
    requests = Drawing((), Settings(), 3, labels=("cat", "dog")).requests(1, 3)
    assert [(r.prompt, r.label, r.seed) for r in requests] == [("", "dog", 1), ("", "cat", 2), ("", "dog", 3)]
    code, _, err = evaluate("generation", *given, "--labels", "cat,cow", "--out", tmp_path / "b")
    assert code == 1 and "there is no label 'cow'" in err and not (tmp_path / "b").exists()


def test_what_does_not_decode_is_counted_nowhere(evaluate, tmp_path):
    """Neither in what is printed nor in the protocol, whose hash is that of the same pictures without it."""
    made = []
    for name, content in (("whole", None), ("torn", b""), ("odd", b"no picture")):
        for side, count in (("drawn", 6), ("real", 5)):
            folder = tmp_path / name / side
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (40 * i, 9 * count, 0)).save(folder / f"{i}.png")
            if content is not None:
                (folder / "3b.png").write_bytes(content)
                (folder / "3b.txt").write_bytes(b"gr\xfcn")
        code, out, _ = evaluate(
            "generation", "--pictures", tmp_path / name / "drawn", "--size", 8, "--reference", tmp_path / name / "real",
            *SMALL, "--space", "toy", "--figures", "kernel", "--output", tmp_path / f"{name}.json",
        )  # fmt: skip
        assert code == 0 and "6 pictures against 5 real ones, 8 px" in out
        document = json.loads((tmp_path / f"{name}.json").read_text())
        made.append((document["figures"], document["protocol"], document["subject"]["pictures"]))
    assert made[0] == made[1] == made[2]


def test_a_sweep_draws_its_curves(evaluate, words, tmp_path):
    code, out, _ = evaluate(
        "generation",
        *words,
        "--out",
        tmp_path / "s",
        "--figures",
        "kernel,neighbours",
        "--sweep",
        "cfg=1,2",
        "steps=1,3",
    )
    assert code == 0 and "sweep.png" in out
    with open(tmp_path / "s" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cfg"], row["steps"], row["evaluations"]) for row in rows] == [
        ("1", "1", "1"), ("1", "3", "3"), ("2", "1", "2"), ("2", "3", "6"),
    ]  # fmt: skip
    assert all(float(row["precision[toy]"]) <= 1 and row["KD[toy]"] for row in rows)
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "s" / "cfg2-steps3.json").read_text())["sources"]["captions"]
    assert "sampler dpmpp_2m" in out and "cfg 1" not in out.partition("measured so:")[2]
    heads, *lines = (line.split() for line in out.splitlines()[1:6])
    assert heads[:5] == ["cfg", "steps", "pictures", "evaluations", "KD"] and "precision" in heads
    assert [line[:2] for line in lines] == [["1", "1"], ["1", "3"], ["2", "1"], ["2", "3"]]


def test_a_sweep_says_the_weights_it_was_given(tiny_model, tmp_path):
    real = open_source(toy_shard(tmp_path / "toy.tar"), "--reference")
    measures = Measures(("kernel",), subset=4, subsets=2)
    against = Against(real, None, [toy_space("toy")], measures, tmp_path / "cache")
    drawing = Drawing(("a red heart",), Settings(steps=1), 4)
    sweep(tiny_model, drawing, {"cfg": [1.0]}, against, tmp_path / "s", Crew(), "raw")
    assert protocol.read(tmp_path / "s" / "cfg1.json")["subject"]["weights"] == "raw"


def test_a_line_of_the_curves_follows_the_last_axis_alone(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *_, label, **__: drawn.append((label, x, y)))
    monkeypatch.setattr(Axes, "legend", lambda self, **_: None)
    rows = [
        {"steps": steps, "cfg": cfg, "eta": eta, "evaluations": 10 * steps + cfg + eta, "KD[toy]": 0.5}
        for steps in (1, 2) for cfg in (1.0, 3.0) for eta in (1.0, 0.0)
    ]  # fmt: skip
    assert plot(rows, ("steps", "cfg", "eta")).startswith(b"\x89PNG")
    assert [label for label, _, _ in drawn] == ["steps 1 cfg 1", "steps 1 cfg 3", "steps 2 cfg 1", "steps 2 cfg 3"]
    assert drawn[1][1:] == ([13, 14], [0.5, 0.5])


def test_axes():
    assert set(KINDS) <= {field.name for field in fields(Settings)}
    axes = parse_axes(["cfg=1,2.5", "eta=0", "sampler=ddim,euler"])
    assert axes == {"cfg": [1.0, 2.5], "eta": [0.0], "sampler": ["ddim", "euler"]}
    drawing = Drawing(("a red heart",), Settings(cfg_rescale=0.5), 4)
    found = cells(parse_axes(["cfg=1,2.5", "steps=3"]), drawing)
    assert [cell.name for cell in found] == ["cfg1-steps3", "cfg2.5-steps3"]
    assert [cell.drawing.settings.cfg for cell in found] == [1, 2.5]
    assert all(cell.drawing.settings.cfg_rescale == 0.5 and cell.drawing.count == 4 for cell in found)
    for wrong in ("cfg", "cfg=", "cfg=,", "prompt=a", "steps=1.5"):
        with pytest.raises(UserError, match="--sweep"):
            parse_axes([wrong])
    with pytest.raises(UserError, match="steps"):
        cells({"steps": [0]}, drawing)


def test_mistakes_end_in_one_sentence(evaluate, words, tmp_path):
    for given, complaint in (
        (words, "a folder --out"),
        ((*words, "--out", tmp_path / "x", "--count", 9), "--allow-few"),
        ((*words, "--out", tmp_path / "x", "--figures", "fid"), "unknown kind of figures 'fid'"),
        (("--reference", tmp_path / "toy.tar", "--pictures", tmp_path), "--size 64"),
        ((*words, "--out", tmp_path / "x", "--subset", 10, "--allow-few"), "choose a smaller subset"),
        ((*words, "--out", tmp_path / "x", "--ball", 9, "--allow-few"), "9 neighbours need larger sets"),
        ((*words, "--out", tmp_path / "x", "--figures", "kernel,captions"), "captions need a space"),
        ((*words, "--out", tmp_path / "x", "--figures", "score"), "class logits"),
        ((*words, "--out", tmp_path / "x", "--seed", -5), "--seed is -5"),
        ((*words, "--out", tmp_path / "x", "--size", -3), "--size is -3"),
        ((*words, "--out", tmp_path / "x", "--batch-size", 0), "--batch-size is 0"),
        ((*words, "--out", tmp_path / "x", "--sweep", "steps=,"), "--sweep takes"),
        ((*words, "--out", tmp_path / "x", "--sweep", "cfg=1", "--output", "y.json"), "leave --output out"),
        ((*words, "--out", tmp_path / "x", "--sweep", "steps=0"), "0 steps"),
        (("--reference", tmp_path / "toy.tar", "--pictures", tmp_path / "none", "--size", 8), "no file matches"),
    ):
        code, _, err = evaluate("generation", *given)
        assert code == 1 and err.startswith("error: ") and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()  # nothing was drawn before it was refused


def test_pictures_that_are_there_are_not_drawn(evaluate, tmp_path):
    shard = toy_shard(tmp_path / "toy.tar")
    given = ("--reference", shard, "--pictures", shard, *SMALL, "--space", "toy", "--figures", "kernel")
    for wrong, complaint in (
        (("--size", -3), "--size is -3"),
        (("--size", 32, "--cfg", 7.5), "--cfg is of pictures that a model draws"),
        (("--size", 32, "--steps", 30), "--steps is of"),
        (("--size", 32, "--seed", 0), "--seed is of"),
        (("--size", 32, "--count", 9), "--count is of"),
        (("--size", 32, "--weights", "auto"), "--weights is of"),
        (("--size", 32, "--precision", "bf16"), "--precision is of"),
        (("--size", 32, "--batch-size", 16), "--batch-size is of"),
        (("--size", 32, "--out", tmp_path / "x"), "--out is of"),
        (("--size", 32, "--sweep", "cfg=1"), "--sweep is of"),
    ):
        code, _, err = evaluate("generation", *given, *wrong)
        assert code == 1 and complaint in err and err.count("\n") == 1
    code, out, _ = evaluate("generation", *given, "--size", 32)
    assert code == 0 and f"reference {shard}" in out


@pytest.mark.slow
def test_two_processes_give_the_same_figures(tiny_checkpoint, tmp_path):
    """By accelerate-launch, which is that module: the same pictures, byte for byte, and the same figures."""
    shard = toy_shard(tmp_path / "toy.tar")
    made = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = ["--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else [])]
        told = ["generation", "--model", tiny_checkpoint, "--captions", shard, "--steps", 2, "--batch-size", 2]
        told += ["--count", 9, "--reference", shard, *SMALL, "--figures", "kernel,neighbours", "--out", out]
        told += ["--device", "cpu", "--cache", tmp_path / f"cache{processes}"]
        script = str(ROOT / "scripts" / "evaluate.py")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch, script, *map(str, told)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("9 pictures against 9 real ones") == 1
        pictures = {path.name: path.read_bytes() for path in (out / "pictures").rglob("*.png")}
        made.append((pictures, json.loads((out / "figures.json").read_text())["figures"]))
    assert made[0][0] == made[1][0] and len(made[0][0]) == 9
    assert made[1][1] == pytest.approx(made[0][1], rel=1e-9, abs=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read where Linux tells it")
def test_fifty_thousand_pictures_in_two_gibibytes(tmp_path):
    """All figures in Inception's widths and in a joint space's, in a process of its own, whose peak is looked at.

    All the features are held and the tables of pairs are as wide as they are in earnest. What only takes time is less:
    of the rows of our own tables two parts, for the Frechet distance a few pieces, and torch-fidelity's neighbours are
    searched for in few dimensions and among fewer drawn.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2.0, done.stdout


MANY = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.metrics.extraction import Features
from ldm.metrics.features import FeatureSpace
from ldm.metrics.figures import Measures, alone, between
from ldm.metrics.sources import Item, Source

declare_missing_operators()
from torch_fidelity import metric_prc

COUNT, WIDTH, LOGITS, JOINT = 50000, 2048, 1008, 768
CUT = ("density_coverage", "total", "ranks")
split, neighbours = torch.Tensor.split, metric_prc.prc_features_to_metric


def few_rows(self, size, dim=0):
    parts = split(self, size, dim)
    return parts[:2] if sys._getframe(1).f_code.co_name in CUT else parts


def few_dimensions(drawn, real, **words):
    return neighbours(drawn[:2000, :8].contiguous(), real[:, :8].contiguous(), **words)


torch.Tensor.split, metric_prc.prc_features_to_metric = few_rows, few_dimensions
folder, paths = Path(sys.argv[1]), []
for piece in range(98):
    rows = 512 if piece < 97 else COUNT % 512
    made = torch.randn(rows, WIDTH + LOGITS, generator=torch.Generator().manual_seed(piece))
    paths.append(folder / f"{piece}.safetensors")
    save_file({"features": made}, paths[-1])
captions = Source("drawn", tuple(Item("", f"caption {i}", Path()) for i in range(COUNT)), {})


def text(captions):
    return torch.randn(len(captions), JOINT)


def sides(space, pieces=98):
    rows = tuple(range(min(512 * pieces, COUNT)))
    return [Features(space, tuple(part), rows) for part in (paths[:pieces], paths[::-1][-pieces:])]


inception = FeatureSpace("inception", WIDTH, None, LOGITS)
joint = FeatureSpace("joint", JOINT, None, text=text)
found = between(*sides(inception, 5), Measures(("frechet",)))
for space in (inception, joint):
    drawn, real = sides(space)
    found |= between(drawn, real, Measures(("kernel", "neighbours") if space is inception else ("kernel",), subsets=2))
    found |= alone(drawn, captions, Measures(("score", "captions")))
print(found)
# Not ru_maxrss, which begins with what the parent process held: VmHWM begins with this one.
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20)
"""
