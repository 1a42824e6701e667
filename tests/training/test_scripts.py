"""What a user does wrong, in the training scripts themselves: one line on stderr, exit code 1, nothing left behind."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config import ClipTraining, load
from ldm.training.command import asked

from .toys import ICONS

ROOT = Path(__file__).parents[2]


def fails(stage: str, words: list[str], monkeypatch, capsys) -> str:
    """Run scripts/train_STAGE.py with its tiny recipe in this process; its sentence."""
    script = ROOT / "scripts" / f"train_{stage}.py"
    recipe = ROOT / "configs" / stage / "tiny.yaml"
    monkeypatch.setattr(sys, "argv", [str(script), "--config", str(recipe), f"data.shards={ICONS}/train-*.tar", *words])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_an_unknown_key_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train_diffusion.py", "loop.step=3", f"output={tmp_path}/run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: the arguments: unknown setting 'loop.step'; did you mean 'loop.steps'?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loop.sample_evry=3"], "unknown setting 'loop.sample_evry'; did you mean 'loop.sample_every'?"),
        (["loop.micro_batch=3"], "loop.global_batch=8 is not 1 processes times a multiple of loop.micro_batch=3"),
        (["loop.global_batch=6"], "the global batch 6 is not a multiple of data.streams=4"),
        (["loop.log_every=0"], "loop.log_every must be at least 1, not 0"),
        (["loop.precision=half"], "loop.precision must be one of auto, fp32, bf16, fp16, not 'half'"),
        (["optimizer.law=cosin"], "optimizer.law must be one of constant, cosine, linear, not 'cosin'"),
        (["data.shards=nowhere-*.tar"], "nowhere-*.tar"),
        (["data.size=63"], "multiples of 4"),
        (["loss.perceptual_net=vgg"], "there is no perceptual network 'vgg'"),
        (["model.kind=identity"], "the identity codec has nothing to train"),
        (["steps"], "'steps' is not of the form key=value"),
        (["--resume", "never"], "--resume is 'never'; there are auto"),
    ],
)
def test_stage_one(words, said, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    assert said in fails("autoencoder", [*words, f"output={output}"], monkeypatch, capsys)
    assert not output.exists()


def test_no_output(monkeypatch, capsys):
    assert "no output folder; say output=runs/NAME" in fails("autoencoder", [], monkeypatch, capsys)


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    said = fails("autoencoder", [f"output={tmp_path}/file/run"], monkeypatch, capsys)
    assert f"output={tmp_path}/file/run cannot be a folder, since {tmp_path}/file is a file" in said


def test_a_run_is_not_trained_over(tmp_path, monkeypatch, capsys):
    (tmp_path / "state").mkdir()
    said = fails("clip", [f"output={tmp_path}"], monkeypatch, capsys)
    assert f"{tmp_path} holds a run already; add --resume auto" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["autoencoder=nowhere"], "nowhere"),
        ([], "the U-Net has 4 input and 4 output channels but latents have 3; set model.in_channels=3"),
        (["model.in_channels=3", "model.out_channels=3", "schedule.kind=steep"], "steep"),
        (["latents=nowhere", "model.in_channels=3", "model.out_channels=3"], "nowhere"),
    ],
)
def test_stage_two(words, said, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    words = ["model.context_width=0", *words, f"output={output}"]
    assert said in fails("diffusion", words, monkeypatch, capsys)
    assert not output.exists()


def test_words_and_options_may_come_in_any_order(monkeypatch):
    recipe = str(ROOT / "configs" / "clip" / "tiny.yaml")
    words = ["output=a", "--resume", "auto", "loop.steps=7", "--config", recipe, "data.size=64"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    found = asked(ClipTraining, "about")
    assert found.settings == load(ClipTraining, recipe, ["output=a", "loop.steps=7", "data.size=64", "resume=auto"])
    assert {"output", "resume", "loop.steps", "data.size", "model.width"} <= found.said
    assert "data.flip" not in found.said and "model" not in found.said


@pytest.mark.parametrize("stage", ["autoencoder", "clip", "diffusion", "embedding"])
def test_help_and_what_is_wrong_come_before_torch(stage, tmp_path):
    """All settings with their comments, and a value outside its range, in the time of a script without torch."""
    code = """import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    for words, status, said in (
        (["--help"], 0, "  optimizer.rate="),
        (["optimizer.rate=nan"], 1, "error: the arguments: optimizer.rate must be above 0, not nan"),
    ):
        command = [sys.executable, "-c", code, ROOT / "scripts" / f"train_{stage}.py", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == status and said in done.stdout + done.stderr
        assert done.stderr.endswith("False\n")
