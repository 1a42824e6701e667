"""Training end to end, as a user starts it: the commands through accelerate's launcher, and then a picture."""

import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ldm

ROOT = Path(__file__).parents[2]
ICONS = ROOT / "tests" / "fixtures" / "icons"
DATA = [f"data.shards={ICONS}/train-*.tar", f"data.validation={ICONS}/val-*.tar"]
QUIET = ["--quiet", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
SECONDS = 40  # that each tiny recipe may take on two cores


def launch(folder: Path, stage: str, *words: str, processes: int = 1, recipe: str = "tiny") -> str:
    """scripts/train_STAGE.py with its tiny recipe, or another; what it printed. The module is accelerate-launch."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []  # means torchrun, on CPUs too
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *QUIET, *several, "--num_processes", str(processes)]
    script = [str(ROOT / "scripts" / f"train_{stage}.py"), "--config", str(ROOT / "configs" / stage / f"{recipe}.yaml")]
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "no-settings-of-this-user"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "passive",  # threads that wait by spinning would be counted as if they worked
    }
    done = subprocess.run([*launcher, *script, *DATA, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_from_shards_to_a_picture(tmp_path):
    """Autoencoder with discriminator, CLIP, diffusion model, a picture; each command within its time."""
    ae, clip, model = (tmp_path / name for name in ("ae", "clip", "ldm"))
    spent = [cpu_seconds()]
    said = launch(tmp_path, "autoencoder", f"output={ae}")
    spent.append(cpu_seconds())
    assert said.index("batch       8 = 1 processes x 1 accumulation x 8 micro-batch") < said.index("step       4")
    lines = log(ae)
    assert "discriminator" not in lines[0] and "adversarial_weight" in lines[-2]
    assert lines[-1]["validation/psnr"] > lines[0].get("validation/psnr", 0)
    assert [path.name for path in (ae / "samples").iterdir()] == ["00000024.png"]

    launch(tmp_path, "clip", f"output={clip}", "loop.steps=4")
    spent.append(cpu_seconds())
    launch(tmp_path, "diffusion", f"autoencoder={ae}", f"text={clip}", f"output={model}")
    spent.append(cpu_seconds())
    losses = [line["loss"] for line in log(model) if "loss" in line]
    assert losses[-1] < losses[0]
    assert sorted(path.name for path in (model / "samples").iterdir()) == ["00000012.png", "00000024.png"]
    assert max(after - before for before, after in itertools.pairwise(spent)) < 2 * SECONDS

    drawn = ldm.load(model, device="cpu").txt2img("a red heart, noto emoji", cfg=2.0, steps=4, seed=7)
    assert drawn.shape == (1, 3, 64, 64) and drawn.abs().max() <= 1 and float(drawn.std()) > 0.01


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An autoencoder and a text tower to train stage two on, each trained by two processes."""
    folder = tmp_path_factory.mktemp("stages")
    for stage in ("autoencoder", "clip"):
        said = launch(folder, stage, f"output={folder / stage}", processes=2)
        assert " = 2 processes x 1 accumulation x " in said
        assert said.count("finished at step") == 1  # one of the two speaks
    return folder / "autoencoder", folder / "clip"


@pytest.mark.slow
def test_two_processes_on_latents_encoded_beforehand(stages, tmp_path):
    ae, clip = stages
    recipe = str(ROOT / "configs" / "diffusion" / "tiny.yaml")
    words = [f"autoencoder={ae}", f"text={clip}", f"latents={tmp_path / 'latents'}"]
    tool = [sys.executable, str(ROOT / "tools" / "precompute_latents.py"), "--config", recipe, *DATA, *words]
    subprocess.run(tool, check=True, capture_output=True)
    said = launch(tmp_path, "diffusion", *words, f"output={tmp_path / 'ldm'}", processes=2)
    assert "precomputed" in said and " = 2 processes x 1 accumulation x 6 micro-batch" in said
    drawn = ldm.load(tmp_path / "ldm", device="cpu").txt2img("a pizza", steps=2)
    assert bool(drawn.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_two_processes_are_one_that_accumulates_twice(stage, stages, tmp_path):
    """Weights, optimizer steps, discriminator and logged losses: the same run, to 1e-5."""
    words = ["loop.steps=6", "loop.log_every=2", "loop.threads=1", "loop.ema=0", "loss.adversarial_start=2"]
    if stage == "diffusion":
        words = [*words[:-1], f"autoencoder={stages[0]}", f"text={stages[1]}"]
    half = {"autoencoder": 4, "diffusion": 6}[stage]
    one, two = tmp_path / "one", tmp_path / "two"
    said = launch(tmp_path, stage, *words, f"output={one}", f"loop.micro_batch={half}")
    assert f"= 1 processes x 2 accumulation x {half} micro-batch" in said
    said = launch(tmp_path, stage, *words, f"output={two}", processes=2)
    assert f"= 2 processes x 1 accumulation x {half} micro-batch" in said

    part = {"autoencoder": "autoencoder", "diffusion": "unet"}[stage]
    a, b = (load_file(folder / f"{part}.safetensors") for folder in (one, two))
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=0, atol=1e-5)
    for line, other in zip(log(one), log(two), strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"images_per_s", "waiting"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_class_conditional_pixel_model_and_a_classifier_that_steers_it(tmp_path):
    """Labels from the shards' json, no text tower and no autoencoder; then the classes are drawn, guided both ways."""
    model, classifier = tmp_path / "classes", tmp_path / "classifier"
    words = ["model.in_channels=3", "model.out_channels=3", "model.context_width=0", "model.classes=2"]
    words += ["encoder.labels=[noto, fluent-flat]", "data.label=source", "data.size=16", "loop.steps=12"]
    said = launch(tmp_path, "diffusion", *words, "sample.prompts=[]", f"output={model}")
    assert "finished at step 12" in said
    assert log(model)[-1]["validation/loss"] > 0

    tool = [sys.executable, str(ROOT / "tools" / "train_noisy_classifier.py"), "--model", str(model)]
    tool += ["--shards", f"{ICONS}/train-*.tar", "--label", "source", "--pictures", "2", "--views", "1"]
    tool += ["--channels", "16", "--steps", "4", "--batch", "8", "--output", str(classifier)]
    subprocess.run(tool, check=True, capture_output=True)

    script = [sys.executable, str(ROOT / "scripts" / "txt2img.py"), "--model", str(model), "--steps", "4"]
    script += ["--label", "noto", "--label", "fluent-flat", "--cfg", "2", "--device", "cpu"]
    steered = ["--classifier", str(classifier), "--classifier-class", "noto", "--classifier-scale", "5"]
    for more, folder in (([], tmp_path / "plain"), (steered, tmp_path / "steered")):
        done = subprocess.run([*script, *more, "--out", str(folder)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    pictures = {
        name: [np.array(Image.open(tmp_path / name / f"0000{i}.png")) for i in (0, 1)] for name in ("plain", "steered")
    }
    assert pictures["plain"][0].shape == (16, 16, 3)
    assert all((a != b).any() for a, b in zip(pictures["plain"], pictures["steered"], strict=True))
    drawn = ldm.load(model, device="cpu").txt2img(label=["noto", "fluent-flat"], seed=[0, 0], steps=4)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.slow
def test_two_towers_a_base_and_a_refiner(stages, tmp_path):
    """Stable Diffusion XL's kind: trained on cached latents and on pictures; one draws, the other ends."""
    ae, clip = stages
    words = [f"autoencoder={ae}", f"text={clip}", f"text_2={clip}"]
    recipe = str(ROOT / "configs" / "diffusion" / "sdxl_tiny.yaml")
    cached = [*words, "data.crop=center", "data.buckets=0", f"latents={tmp_path / 'latents'}"]
    tool = [sys.executable, str(ROOT / "tools" / "precompute_latents.py"), "--config", recipe, *DATA, *cached]
    subprocess.run(tool, check=True, capture_output=True)
    said = launch(tmp_path, "diffusion", *cached, f"output={tmp_path / 'base'}", recipe="sdxl_tiny")
    assert "precomputed" in said and "of each tower 0.1" in said
    lowest = [*words, "loss.lowest=0.2", "sample.prompts=[]", f"output={tmp_path / 'refiner'}"]
    assert "the lowest 20% of the levels alone" in launch(tmp_path, "diffusion", *lowest, recipe="sdxl_tiny")

    script = [sys.executable, str(ROOT / "scripts" / "txt2img.py"), "--model", str(tmp_path / "base"), "--steps", "5"]
    script += ["--prompt", "a pizza", "--device", "cpu"]
    refined = ["--refiner", str(tmp_path / "refiner"), "--refine-below", "0.6", "--crop", "8", "0"]
    for more, folder in (([], "plain"), (refined, "refined")):
        done = subprocess.run([*script, *more, "--out", str(tmp_path / folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    made = tmp_path / "refined" / "00000.png"
    again = [*script[:2], "--reproduce", str(made), "--device", "cpu", "--out", str(tmp_path / "again")]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0 and "differ" not in done.stderr, done.stderr
    pictures = [np.array(Image.open(tmp_path / name / "00000.png")) for name in ("plain", "refined", "again")]
    assert (pictures[0] != pictures[1]).any() and (pictures[1] == pictures[2]).all()
