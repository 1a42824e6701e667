"""Training end to end, as a user starts it: the commands through accelerate's launcher, and then a picture."""

import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ldm

ROOT = Path(__file__).parents[2]
ICONS = ROOT / "tests" / "fixtures" / "icons"
DATA = [f"data.shards={ICONS}/train-*.tar", f"data.validation={ICONS}/val-*.tar"]
QUIET = ["--quiet", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
SECONDS = 40  # that each tiny recipe may take on two cores


def launch(folder: Path, stage: str, *words: str, processes: int = 1) -> str:
    """scripts/train_STAGE.py with its tiny recipe; what it printed. The module is the command accelerate-launch."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []  # means torchrun, on CPUs too
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *QUIET, *several, "--num_processes", str(processes)]
    script = [str(ROOT / "scripts" / f"train_{stage}.py"), "--config", str(ROOT / "configs" / stage / "tiny.yaml")]
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
