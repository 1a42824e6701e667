"""What earlier versions wrote stays readable: a small one of each kind, in tests/fixtures/written."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import provenance
from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import AutoencoderTraining, DataConfig, DiffusionTraining, load
from ldm.data.latents import LatentLoader, latent_fingerprint
from ldm.guidance.noisy_classifier import load_noisy_classifier
from ldm.model import CheckpointNotice
from ldm.training.exporting import export_state
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import diffusion_stage

from .toys import CPU, log_of, run

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARDS = [f"data.shards={FIXTURES}/icons/train-*.tar", f"data.validation={FIXTURES}/icons/val-*.tar"]
MODEL = "c5a2bf7397b94851"  # the beginnings of fingerprints, as the version that wrote them told them
AUTOENCODER = "a76aad0a5eddd416"
TEXT = "4ab1051baa92d812"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(FIXTURES / "written" / "written.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("name", "layout", "fingerprint"),
    [
        ("ldm", "native directory", MODEL),
        ("single.safetensors", "native file", MODEL),
        ("ae", "native directory", AUTOENCODER),
        ("text", "native directory", TEXT),
    ],
)
def test_a_model_is_the_one_it_was(written: Path, name: str, layout: str, fingerprint: str) -> None:
    found = open_checkpoint(written / name)
    assert found.layout == layout and native.fingerprint(found.tensors()).startswith(fingerprint)
    for part in found.parts:
        found.load(part)  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore:the text tower does not know")
def test_a_picture_is_drawn_again_from_its_recipe(written: Path) -> None:
    path = written / "png" / "00000.png"
    recipe = provenance.read(path)
    assert (recipe.request.prompt, recipe.request.seed, recipe.settings.steps) == ("a red heart", 7, 2)
    model = ldm.load(written / "ldm", device="cpu")
    assert recipe.hash == model.hash
    assert not [told for told in provenance.differences(recipe, model) if "last bits" not in told]
    shown = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    picture = model.txt2img(recipe.request.prompt, seed=recipe.request.seed, settings=recipe.settings)[0]
    assert torch.allclose(picture, shown, atol=2.5 / 127.5)  # levels; the rounding, and other hardware's


def test_a_lora_and_a_word_go_over_their_model(written: Path) -> None:
    model = ldm.load(written / "ldm", device="cpu")
    lora, word = written / "lora" / "lora.safetensors", written / "word" / "embedding.safetensors"
    with pytest.warns(CheckpointNotice, match="<odd>"):
        changed = model.adapted({lora: 1.0}, [word])
    assert [each.kind for each in changed.adapters] == ["lora", "embedding"] and changed.hash == model.hash
    assert changed.txt2img("<odd>", steps=1, cfg=1.0).isfinite().all()


def test_a_classifier_gives_the_same_logits(written: Path) -> None:
    classifier = load_noisy_classifier(written / "classifier").eval()
    z = torch.linspace(-1, 1, 2 * 8 * 8).reshape(1, 2, 8, 8)
    assert torch.allclose(classifier(z, torch.tensor([1.0])), torch.tensor([[-0.0520, 0.3405]]), atol=1e-3)


def test_latents_are_of_the_same_networks_and_pictures(written: Path) -> None:
    parts = open_checkpoint(written / "ae"), open_checkpoint(written / "text")
    made = latent_fingerprint(*parts, DataConfig(shards=f"{FIXTURES}/icons/val-*.tar", size=16))
    assert made == json.loads((written / "latents" / "latents.json").read_text())["fingerprint"]
    data = DataConfig(shards=str(written / "latents"), size=16, flip=True, streams=1, workers=0)
    batch = next(iter(LatentLoader(data, 12, 0, 1, 0, made)))
    assert batch.moments.shape == (12, 4, 4, 4) and batch.context.shape == (12, 8, 8)
    assert bool(batch.moments.isfinite().all()) and len(set(batch.key)) == 12


def test_a_run_of_stage_one_goes_on(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "ae", tmp_path / "run"))
    words = [*SHARDS, f"output={folder}", "loop.steps=3"]
    config = load(AutoencoderTraining, folder / "config.json", words)
    export_state(folder, tmp_path / "again", words=SHARDS)
    again, left = (open_checkpoint(path) for path in (tmp_path / "again", folder))
    assert native.fingerprint(again.tensors()).startswith(AUTOENCODER)
    assert again.config.autoencoder and left.config.autoencoder
    assert again.config.autoencoder.scale == pytest.approx(left.config.autoencoder.scale, rel=0.01)
    run(AutoencoderStage(config, 0, 1, CPU), config.loop, folder, config)
    assert [line["step"] for line in log_of(folder)][-1] == 3 and (folder / "state" / "00000003.pt").exists()
    assert not native.fingerprint(open_checkpoint(folder).tensors()).startswith(AUTOENCODER)


def test_a_run_of_stage_two_goes_on(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "ldm", tmp_path / "run"))
    parts = [f"autoencoder={written / 'single.safetensors'}", f"text={written / 'text'}"]
    words = [*SHARDS, *parts, f"output={folder}", "loop.steps=3", "sample.steps=1"]
    config = load(DiffusionTraining, folder / "config.json", words)
    export_state(folder, tmp_path / "again", words=[*SHARDS, *parts])
    assert native.fingerprint(open_checkpoint(tmp_path / "again").tensors()).startswith(MODEL)
    run(diffusion_stage(config, 0, 1, CPU), config.loop, folder, config)
    assert [line["step"] for line in log_of(folder)][-1] == 3 and (folder / "state" / "00000003.pt").exists()
