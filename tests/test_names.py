"""A model has one name, whoever is told it: each command reads every format, and says of a run why it is no model."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints.small_models import SMALL, random_states  # tests/ is the root of the tests' packages
from torch import Tensor
from training.toys import CPU, DATA, ICONS

from ldm.checkpoints import export, native
from ldm.checkpoints.adapter_words import drawing_in
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_metadata
from ldm.config import AutoencoderTraining, DiffusionTraining, Halve, LoopConfig, ModelConfig, UNetConfig, load
from ldm.data.latents import LatentLoader
from ldm.errors import UserError
from ldm.find import SHIPPED, SHIPPED_LORAS, find
from ldm.training.stage_two import diffusion_stage

ROOT = Path(__file__).parents[1]
WHOLE = ("native", "native.safetensors", "original.safetensors", "original.ckpt", "diffusers")
AUTOENCODERS = (*WHOLE, "vae", "vae.safetensors", "diffusers/vae", "diffusers/vae/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return random_states(SMALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, states: Mapping[str, dict[str, Tensor]]) -> Path:
    """A folder with one small model in every format that is read, and its autoencoder alone."""
    folder = tmp_path_factory.mktemp("models")
    native.save(folder / "native", SMALL, states)
    native.save(folder / "native.safetensors", SMALL, states)
    export.write(folder / "original.safetensors", SMALL, states, "original")
    original = open_checkpoint(folder / "original.safetensors").parts["unet"].source
    torch.save({"state_dict": {name: original[name].clone() for name in original}}, folder / "original.ckpt")
    export.write(folder / "diffusers", SMALL, states, "diffusers")
    alone = {"autoencoder": states["autoencoder"]}
    native.save(folder / "vae", ModelConfig(SMALL.autoencoder), alone)
    export.write(folder / "vae.safetensors", ModelConfig(SMALL.autoencoder), alone, "original")
    return folder


def called(script: str, *words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a script run with these words."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# ---------------------------------------------------------------- every format, every command


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_part_of_any_format_becomes_a_network(models: Path, states: Mapping[str, dict[str, Tensor]], name: str):
    checkpoint = open_checkpoint(models / name).only("autoencoder")
    codec = checkpoint.load("autoencoder")
    assert codec.autoencoder is not None and codec.config.scale == (0.18215,)
    found = codec.autoencoder.state_dict()
    assert all(torch.equal(found[key], value) for key, value in states["autoencoder"].items())
    with pytest.raises(UserError, match="has no U-Net, only its autoencoder; name a checkpoint that has one"):
        checkpoint.load("unet")


def test_what_concerns_other_parts_is_left_unsaid(models: Path):
    """A whole file of unknown origin does not say what it predicts; its autoencoder and text tower do not care."""
    whole = open_checkpoint(models / "original.ckpt")
    assert "parameterization" in whole.assumed
    assert whole.only("autoencoder").notices == ()
    (notice,) = whole.only("text").notices
    assert "text.padding=zero" in notice and "parameterization" not in notice


@pytest.mark.parametrize("name", WHOLE)
def test_training_takes_its_autoencoder_and_text_tower_from_any_format(models: Path, name: str):
    assert SMALL.text is not None
    config = DiffusionTraining(
        autoencoder=str(models / name),
        text=str(models / name),
        model=UNetConfig(channels=32, multipliers=(1,), blocks=1, attention_levels=(0,), heads=1, context_width=64),
        data=replace(DATA, size=8),
        loop=LoopConfig(global_batch=4),
    )
    stage = diffusion_stage(config, 0, 1, CPU)
    made = stage.model.config
    assert made.autoencoder == SMALL.autoencoder and made.text is not None and made.text.width == SMALL.text.width
    assert sum("assumed by its kind" in line for line in stage.describe()) == (name == "original.ckpt")
    assert stage.model.text is not None and stage.model.text.encode(["a red heart"]).shape == (1, 77, 64)


def test_the_shipped_model_lends_its_parts_by_name():
    shipped = native.read_config(SHIPPED["icons"])
    assert shipped.autoencoder and shipped.text
    channels, width = shipped.autoencoder.latent_channels, shipped.text.width
    config = DiffusionTraining(
        autoencoder="icons",
        text="icons",
        model=UNetConfig(channels, channels, 32, (1,), 1, (0,), heads=1, context_width=width),
        data=replace(DATA, size=16),
        loop=LoopConfig(global_batch=4),
    )
    assert diffusion_stage(config, 0, 1, CPU).model.codec.factor == shipped.autoencoder.factor


def test_what_ships_is_what_its_recipes_make():
    shipped, configs = native.read_config(SHIPPED["icons"]), ROOT / "configs"
    recipe = load(DiffusionTraining, configs / "diffusion" / "icons.yaml")
    stage_one = load(AutoencoderTraining, configs / "autoencoder" / "icons.yaml").model
    assert (shipped.unet, shipped.encoder, shipped.loss) == (recipe.model, recipe.encoder, recipe.loss)
    assert (shipped.schedule, shipped.parameterization) == (recipe.schedule, recipe.parameterization)
    assert (shipped.drawing.cfg, shipped.drawing.steps) == (recipe.sample.cfg, recipe.sample.steps)
    assert shipped.image_size == recipe.data.size and shipped.autoencoder is not None
    assert replace(shipped.autoencoder, shift=stage_one.shift, scale=stage_one.scale) == stage_one

    four, words = load(DiffusionTraining, configs / "diffusion" / "four.yaml"), read_metadata(SHIPPED_LORAS["four"])
    assert words["ldm.base_hash"] == open_checkpoint("icons").base_hash
    assert four.lora is not None and isinstance(four.objective, Halve)
    assert words["ss_network_dim"] == str(four.lora.rank) and words["ss_learning_rate"] == f"{four.optimizer.rate:g}"
    drawing = drawing_in(words, "four")
    assert drawing is not None and (drawing.cfg, drawing.steps) == (1.0, four.objective.steps)


def test_parts_are_fetched_by_name_as_models_are(models: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("ldm.checkpoints.hub.fetch", lambda name: asked.append(name) or models / "diffusers" / "vae")
    assert open_checkpoint("hf:someone/vae").only("autoencoder").load("autoencoder").factor == 2
    assert asked == ["someone/vae"]


def test_latents_of_a_foreign_file_are_those_of_its_converted_parts(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--autoencoder", models / "vae.safetensors", "--text", models / "original.safetensors"]
    words += ["--shards", f"{ICONS}/val-*.tar", "--size", 8, "--output", tmp_path / "latents"]
    assert called("tools/precompute_latents.py", *words, monkeypatch=monkeypatch) == 0
    config = DiffusionTraining(
        autoencoder=str(models / "native"),
        text=str(models / "native.safetensors"),
        latents=str(tmp_path / "latents"),
        model=UNetConfig(channels=32, multipliers=(1,), blocks=1, attention_levels=(0,), heads=1, context_width=64),
        data=replace(DATA, shards=f"{ICONS}/val-*.tar", size=8),
        loop=LoopConfig(global_batch=4),
    )
    assert isinstance(diffusion_stage(config, 0, 1, CPU).batches, LatentLoader)


@pytest.mark.parametrize("name", ["vae.safetensors", "diffusers", "original.ckpt"])
def test_figures_of_an_autoencoder_of_any_format(
    models: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["autoencoder", "--model", models / name, "--shards", f"{ICONS}/val-*.tar", "--size", 16]
    assert called("scripts/evaluate.py", *words, monkeypatch=monkeypatch) == 0
    assert "f = 2, 4 latent channels" in capsys.readouterr().out


def test_a_noisy_classifier_for_a_foreign_model(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--model", models / "original.safetensors", "--shards", f"{ICONS}/train-*.tar", "--size", 16]
    words += ["--label", "source", "--pictures", 2, "--views", 1, "--channels", 8, "--steps", 1, "--batch", 4]
    code = called(
        "tools/train_noisy_classifier.py", *words, "--output", tmp_path / "classifier", monkeypatch=monkeypatch
    )
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "classifier").is_dir()


# ---------------------------------------------------------------- what a training left


def run_folder(path: Path, steps: int, *saved: int) -> Path:
    """A training's folder as `loop.steps` and its states leave it."""
    (path / "state").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"output": str(path), "loop": {"steps": steps}}))
    for step in saved:
        (path / "state" / f"{step:08d}.pt").write_bytes(b"not looked at")
    return path


def test_a_run_that_has_not_finished_says_so(tmp_path: Path):
    run = run_folder(tmp_path / "run", 24, 6, 12)
    how = f"tools/export_state.py {run} NEW_FOLDER"
    with pytest.raises(
        UserError, match=r"has not finished \(its last state is of step 12 of 24\).*--resume auto"
    ) as said:
        find(run)
    assert how in str(said.value)
    for inside in (run / "state", run / "state" / "00000012.pt"):
        with pytest.raises(UserError, match="not a model") as said:
            find(inside)
        assert how in str(said.value)
    (run / "config.json").unlink()  # one that somebody copied without its settings
    with pytest.raises(UserError, match=r"its last state is of step 12\)"):
        find(run)


def test_a_state_that_lies_elsewhere(tmp_path: Path):
    torch.save({"modules": {"unet": {"conv_in.weight": torch.zeros(3)}}, "averages": {}}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt is what a training goes on from \(tools/export_state\.py"):
        open_checkpoint(tmp_path / "best.pt")


def test_a_run_that_has_just_begun(tmp_path: Path):
    with pytest.raises(UserError, match="has not saved a state yet"):
        find(run_folder(tmp_path / "run", 24))


@pytest.mark.parametrize(("file", "option"), [("lora.safetensors", "--lora"), ("embedding.safetensors", "--embedding")])
def test_a_run_whose_end_is_no_model(tmp_path: Path, file: str, option: str):
    run = run_folder(tmp_path / "run", 24, 24)
    (run / file).write_bytes(b"")
    with pytest.raises(UserError, match=f"goes over a model; say {option} {run / file}"):
        find(run)


def test_a_model_that_its_run_has_left_behind(tmp_path: Path, states: Mapping[str, dict[str, Tensor]]):
    """It was finished, told to do more, and stopped on the way: the model is still that of its first end."""
    run = run_folder(tmp_path / "run", 24, 24)
    native.save(run, ModelConfig(SMALL.autoencoder), {"autoencoder": states["autoencoder"]})
    assert open_checkpoint(run).notices == ()
    (run / "state" / "00000024.pt").rename(run / "state" / "00000030.pt")
    (run / "state" / "00000030.pt").touch()
    assert open_checkpoint(run).notices == ()  # not told to do more
    (run / "config.json").write_text(json.dumps({"loop": {"steps": 48}}))
    with pytest.MonkeyPatch.context() as patch:  # a state that goes between two looks
        patch.setattr("ldm.checkpoints.run_folder.saved_steps", lambda _: [27])
        assert "has gone on" in open_checkpoint(run).notices[0]
    (notice,) = open_checkpoint(run).only("autoencoder").notices
    assert "has gone on since its model was written (its last state is of step 30 of 48)" in notice


def test_folders_of_others_are_not_taken_for_runs(tmp_path: Path):
    (tmp_path / "state").mkdir()
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert find(tmp_path) == tmp_path and find(tmp_path / "state") == tmp_path / "state"
    assert find("icons") == SHIPPED["icons"]


@pytest.mark.parametrize(
    "words",
    [
        ["scripts/txt2img.py", "--prompt", "x", "--model", "RUN"],
        ["scripts/txt2img.py", "--prompt", "x", "--vae", "RUN"],
        ["scripts/txt2img.py", "--prompt", "x", "--guide-model", "RUN"],
        ["scripts/evaluate.py", "autoencoder", "--shards", "x.tar", "--model", "RUN"],
        ["scripts/evaluate.py", "likelihood", "--shards", "x.tar", "--model", "RUN"],
        ["scripts/train_diffusion.py", "output=OUT", "init=RUN"],
        ["scripts/train_diffusion.py", "output=OUT", "autoencoder=RUN"],
        ["scripts/train_diffusion.py", "output=OUT", "text=RUN"],
        ["scripts/train_embedding.py", "output=OUT", "init=RUN"],
        ["tools/precompute_latents.py", "autoencoder=RUN", "text=icons", "latents=OUT", "data.shards=x.tar"],
        ["tools/convert_checkpoint.py", "RUN", "OUT"],
        ["tools/inspect_checkpoint.py", "RUN"],
        ["tools/reconstruct_ema.py", "RUN", "--width", "0.1", "--output", "OUT"],
        ["tools/train_noisy_classifier.py", "--model", "RUN", "--shards", "x.tar", "--output", "OUT"],
        ["tools/experiments.py", "interpolate", "--model", "RUN", "--shards", "x.tar", "--output", "OUT"],
        ["tools/benchmark.py", "load", "--model", "RUN"],
    ],
    ids=lambda words: " ".join(words[0].split("/")[-1:] + [w for w in words[1:] if "RUN" in w or w == "load"]),
)
def test_every_command_says_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = run_folder(tmp_path / "run", 24, 12)
    words = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in words]
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    assert called(*words, monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has not finished (its last state is of step 12 of 24)" in said
    assert not (tmp_path / "out").exists()


def test_a_name_is_looked_up_without_torch():
    code = "import sys, ldm.find; ldm.find.find('icons'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
