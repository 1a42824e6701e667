"""tools/export_state.py: a run that has not finished becomes a model, and which one is said."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ldm
from ldm.checkpoints.opening import open_checkpoint
from ldm.conditioning.image_tower import load_image_tower
from ldm.config import (
    ClipTraining,
    DiffusionTraining,
    EmbeddingTraining,
    ImageTowerConfig,
    LoraConfig,
    ModelConfig,
    SampleConfig,
    TextConfig,
)
from ldm.errors import UserError
from ldm.training.clip import ClipStage
from ldm.training.embedding import embedding_stage
from ldm.training.exporting import export_state
from ldm.training.sharding import MARK
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import diffusion_stage

from .toys import AUTOENCODER, CPU, DATA, LOOP, PIXELS, run

TOOL = Path(__file__).parents[2] / "tools" / "export_state.py"
STOPPED = replace(LOOP, steps=4, save_every=2, keep=4, log_every=2)  # states of steps 2 and 4


def trained(stage: Any, config: Any, folder: Path) -> Path:
    """A run to its end, whose model is what an export of its last state has to be."""
    run(stage(config, 0, 1, CPU), config.loop, folder, config)
    return folder


def same(a: Path, b: Path) -> bool:
    """The same tensors, bit for bit, and the same settings."""
    first, second = open_checkpoint(a), open_checkpoint(b)
    states = first.tensors(), second.tensors()
    return first.config == second.config and all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ldm.checkpoints import native
    from ldm.conditioning.clip import TextTower

    path = tmp_path_factory.mktemp("text")
    config = TextConfig(context_length=16, token_ids=(0, 300, 49406, 49407), width=32, heads=2, layers=1, embed_dim=16)
    native.save(path, ModelConfig(text=config), {"text": TextTower(config)})
    return path


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    config = replace(PIXELS, text=str(text), loop=STOPPED)
    return trained(diffusion_stage, config, tmp_path_factory.mktemp("run") / "diffusion")


@pytest.fixture
def unfinished(diffusion: Path, tmp_path: Path) -> Path:
    """The same run as it would lie there had it been stopped after step 4 of 100."""
    shutil.copytree(diffusion, tmp_path / "run")
    for name in ("model.json", "text.safetensors", "unet.safetensors"):
        (tmp_path / "run" / name).unlink()
    plain = json.loads((tmp_path / "run" / "config.json").read_text())
    plain["loop"]["steps"] = 100
    (tmp_path / "run" / "config.json").write_text(json.dumps(plain))
    return tmp_path / "run"


def test_the_newest_state_is_the_model_that_the_run_left(diffusion: Path, unfinished: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"has not finished \(its last state is of step 4 of 100\)"):
        ldm.load(unfinished)
    said = export_state(unfinished, tmp_path / "model")
    assert said == f"wrote {tmp_path / 'model'}: step 4, the averaged weights"
    assert same(tmp_path / "model", diffusion)
    assert ldm.load(tmp_path / "model", device="cpu").txt2img("a red heart", steps=2).shape == (1, 3, 8, 8)
    assert sorted(path.name for path in unfinished.iterdir()) == ["config.json", "log.jsonl", "state"]  # only read


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_of_any_state_and_either_weights(unfinished: Path, tmp_path: Path, weights: str):
    export_state(unfinished, tmp_path / "model", 2, weights)
    state = torch.load(unfinished / "state" / "00000002.pt", weights_only=True)
    expected = state["modules"]["unet"] if weights == "raw" else state["averages"]["unet"]["average"]
    found = load_file(tmp_path / "model" / "unet.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_shards_of_pictures_may_be_gone(unfinished: Path, tmp_path: Path, text: Path):
    """And what else it named is found where the words say: a run of a cluster is exported on a laptop."""
    moved = shutil.copytree(text, tmp_path / "moved")
    change(unfinished, text="/cluster/text", **{"data.shards": "/cluster/*.tar", "data.validation": "/cluster/v.tar"})
    change(
        unfinished,
        **{
            "latents": "/cluster/latents",
            "sample.prompts": ["a"],
            "figures.pictures": 64,
            "figures.reference": "a.tar",
        },
    )
    with pytest.raises(UserError, match="there is no model '/cluster/text'"):
        export_state(unfinished, tmp_path / "model")
    export_state(unfinished, tmp_path / "model", words=[f"text={moved}"])
    assert open_checkpoint(tmp_path / "model").config.image_size == 8


def test_a_state_that_processes_have_written_in_shares(unfinished: Path, tmp_path: Path, diffusion: Path):
    """As FSDP leaves it: in place of each tensor a record, and its rows in the files of the processes."""
    path = unfinished / "state" / "00000004.pt"
    state = torch.load(path, weights_only=True)
    parts: list[dict[str, Any]] = [{}, {}]

    def spread(tree: Any, name: str) -> Any:
        if isinstance(tree, dict):
            return {key: spread(value, f"{name}/{key}") for key, value in tree.items()}
        if not isinstance(tree, torch.Tensor) or not tree.ndim:
            return tree
        each = -(-len(tree) // 2)
        for rank, part in enumerate(parts):
            part[name] = {"first": min(rank * each, len(tree)), "rows": tree[rank * each : (rank + 1) * each].clone()}
        return {MARK: name, "shape": list(tree.shape)}

    spreading = {name: spread(state[name], name) for name in ("modules", "averages")}
    torch.save({**state, **spreading, "shares": 2}, path)
    path.with_suffix(".sha256").unlink()
    for rank, part in enumerate(parts):
        torch.save(part, unfinished / "state" / f"00000004.{rank}of2.pt")
    export_state(unfinished, tmp_path / "model")
    assert same(tmp_path / "model", diffusion)
    (unfinished / "state" / "00000004.1of2.pt").unlink()
    with pytest.raises(UserError, match=r"of step 4 in .* cannot be read"):
        export_state(unfinished, tmp_path / "torn")


def change(folder: Path, **settings: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    for name, value in settings.items():
        *outer, last = name.split(".")
        inner = plain
        for key in outer:
            inner = inner[key]
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(plain))


def test_an_autoencoder_has_its_scale_measured(tmp_path: Path):
    """Of its own latents at that step; the discriminator and the perceptual network are not needed."""
    folder = trained(AutoencoderStage, replace(AUTOENCODER, loop=STOPPED), tmp_path / "run")
    change(folder, **{"loss.perceptual_net": "lpips", "loss.perceptual": 1.0, "loss.l1": 0.0, "loop.micro_batch": 4})
    export_state(folder, tmp_path / "model")
    assert same(tmp_path / "model", folder)
    export_state(folder, tmp_path / "earlier", 2)
    scales = [open_checkpoint(path).config.autoencoder for path in (tmp_path / "model", tmp_path / "earlier")]
    assert scales[0] and scales[1] and scales[0].scale != scales[1].scale


def test_a_text_tower_has_its_words(tmp_path: Path):
    config = ClipTraining(
        model=TextConfig(context_length=16, width=32, heads=2, layers=1, embed_dim=16),
        image_tower=ImageTowerConfig(size=16, patch=8, width=32, layers=1, heads=2),
        data=DATA,
        loop=STOPPED,
    )
    folder = trained(ClipStage, config, tmp_path / "run")
    change(folder, **{"loop.micro_batch": 4})  # of two processes; accumulating on one is refused in training
    export_state(folder, tmp_path / "model")
    assert same(tmp_path / "model", folder)
    first, second = (load_image_tower(path).state_dict() for path in (folder, tmp_path / "model"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_what_goes_over_a_model(kind: str, tmp_path: Path, tiny_checkpoint: Path):
    shared: dict[str, Any] = {"init": str(tiny_checkpoint), "data": replace(DATA, size=32)}
    if kind == "lora":
        config: Any = DiffusionTraining(lora=LoraConfig(rank=2), loop=STOPPED, **shared)
        folder = trained(diffusion_stage, config, tmp_path / "run")
    else:
        config = EmbeddingTraining(loop=replace(STOPPED, ema=0.0), sample=SampleConfig(prompts=("<new>",)), **shared)
        folder = trained(embedding_stage, config, tmp_path / "run")
        with pytest.raises(UserError, match="keeps no average of its weights"):
            export_state(folder, tmp_path / "none", weights="ema")
    export_state(folder, tmp_path / "out")
    name = f"{kind}.safetensors"
    before, after = load_file(folder / name), load_file(tmp_path / "out" / name)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_not_there(unfinished: Path, tmp_path: Path):
    for words, step, output, folder in (
        ("there are those of steps 2, 4", 3, "new", unfinished),
        ("would be a file; name a folder", 0, "m.safetensors", unfinished),
        ("is the folder of a training", 0, "run", unfinished),
        ("has no config.json", 0, "new", tmp_path),
    ):
        with pytest.raises(UserError, match=words):
            export_state(folder, tmp_path / output, step)
    newest = unfinished / "state" / "00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"of step 4 .* cannot be read"):
        export_state(unfinished, tmp_path / "new", 4)
    change(unfinished, **{"model.channels": 64})
    with pytest.raises(UserError, match=r"is not of the run that its config\.json says"):
        export_state(unfinished, tmp_path / "new", 2)
    (unfinished / "config.json").write_text("{}")
    with pytest.raises(UserError, match="of no training that is known"):
        export_state(unfinished, tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()


def test_the_command(
    unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    newest = unfinished / "state" / "00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])  # damaged: the one before it is taken
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(unfinished), str(tmp_path / "model"), "--weights", "raw"])
    runpy.run_path(str(TOOL), run_name="__main__")
    said = capsys.readouterr()
    assert "00000004.pt cannot be read" in said.err and "step 2, the raw weights" in said.out
