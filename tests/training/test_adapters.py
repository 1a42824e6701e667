"""Going on from a model: all its weights, a LoRA of them, or a new word. What is not trained does not move."""

from __future__ import annotations

import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints.small_models import SMALL, random_states  # tests/ is the root of the tests' packages
from safetensors.torch import load_file, save_file

import ldm
from ldm.adapters import use
from ldm.api import PromptNotice
from ldm.checkpoints import export, native
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_metadata
from ldm.checkpoints.textual_inversion import read_embeddings
from ldm.config import (
    DiffusionLossConfig,
    DiffusionTraining,
    EmbeddingTraining,
    LoraConfig,
    OptimizerConfig,
    UNetConfig,
)
from ldm.errors import UserError
from ldm.jobs.adapters import Adapter
from ldm.training.draws import Draws
from ldm.training.embedding import embedding_stage
from ldm.training.stage_two import DiffusionStage, diffusion_stage

from .test_scripts import fails
from .toys import CPU, DATA, LOOP, SHIPPED_SIZE, run

LONG = replace(LOOP, steps=12, global_batch=8, save_every=6)
PLAIN = DiffusionTraining(
    data=replace(DATA, size=32),
    loss=DiffusionLossConfig(caption_dropout=0.0),
    optimizer=OptimizerConfig(rate=1e-2),
    loop=LONG,
)


def frozen(stage: DiffusionStage) -> dict[str, torch.Tensor]:
    assert stage.model.text is not None and stage.model.codec.autoencoder is not None
    parts = {"text": stage.model.text, "autoencoder": stage.model.codec.autoencoder}
    return {f"{part}.{name}": v.clone() for part, module in parts.items() for name, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_of_a_model_travels_in_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """And is taken up by a training that goes on from it, unless that sets its own."""
    own = DiffusionLossConfig(weight="min_snr", min_snr_gamma=3.0, levels="lognormal", offset_noise=0.1)
    config = replace(PLAIN, init=str(tiny_checkpoint), loss=own, loop=replace(LONG, steps=1, ema=0.0))
    run(diffusion_stage(config, 0, 1, CPU), config.loop, tmp_path / "run", config)
    assert native.read_config(tmp_path / "run").loss == own
    further = replace(PLAIN, init=str(tmp_path / "run"), loss=DiffusionLossConfig())
    assert diffusion_stage(further, 0, 1, CPU).course.loss == own
    word = EmbeddingTraining(init=str(tmp_path / "run"), data=PLAIN.data, loop=replace(LONG, ema=0.0))
    assert embedding_stage(word, 0, 1, CPU).course.loss == replace(own, caption_dropout=0.0)
    other = replace(further, loss=DiffusionLossConfig(weight="snr"))
    assert diffusion_stage(other, 0, 1, CPU).course.loss == DiffusionLossConfig(weight="snr")


def test_a_lora_of_a_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It learns; the model's own weights stay; the file draws what the training's network drew; resuming is exact."""
    config = replace(PLAIN, init=str(tiny_checkpoint), lora=LoraConfig(rank=2, alpha=4.0, layers="transformer"))
    stage = diffusion_stage(config, 0, 1, CPU)
    with torch.no_grad():
        before, loss = frozen(stage), stage.validate()["validation/loss"]
    run(stage, LONG, tmp_path / "run", config)
    stored = open_checkpoint(tiny_checkpoint).load("unet").state_dict()
    assert same(frozen(stage), before) and same(dict(stage.model.unet.state_dict()), dict(stored))
    with torch.no_grad():
        assert stage.validate()["validation/loss"] < 0.96 * loss
    assert not (tmp_path / "run" / "model.json").exists()
    said = read_metadata(tmp_path / "run" / "lora.safetensors")
    assert {"ss_network_dim": "2", "ss_network_alpha": "4", "ss_learning_rate": "0.01"}.items() <= said.items()
    assert {
        "ss_steps": "12",
        "ss_seed": str(LONG.seed),
        "modelspec.architecture": "latent-diffusion/lora",
    }.items() <= said.items()
    assert said["ss_sd_model_name"] == tiny_checkpoint.name
    assert said["ldm.base_hash"] == said["ss_new_sd_model_hash"] == open_checkpoint(tiny_checkpoint).base_hash

    model = ldm.load(tiny_checkpoint, device="cpu").adapted({tmp_path / "run" / "lora.safetensors": 1.0})
    assert not model.notices  # it is for this model
    lora = stage.players["unet"].module
    average = torch.load(next((tmp_path / "run" / "state").glob("*12.pt")), weights_only=True)["averages"]["unet"]
    lora.load_state_dict(average["average"])
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([50.0]), torch.randn(1, 16, 32)
    with torch.no_grad():
        drawn = model.unet(x, t, context)
        assert torch.allclose(drawn, stage.model.unet.eval()(x, t, context), atol=1e-4)
        assert not torch.allclose(drawn, open_checkpoint(tiny_checkpoint).load("unet")(x, t, context), atol=1e-2)

    half = replace(config, loop=replace(LONG, steps=6))
    run(diffusion_stage(half, 0, 1, CPU), half.loop, tmp_path / "resumed", half)
    run(diffusion_stage(config, 0, 1, CPU), LONG, tmp_path / "resumed", config)
    names = ("run", "resumed")
    one, two = (ldm.checkpoints.reading.read_tensors(tmp_path / name / "lora.safetensors") for name in names)
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_all_weights_of_a_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = replace(PLAIN, init=str(tiny_checkpoint), loop=replace(LONG, steps=1, ema=0.0))
    stage = diffusion_stage(config, 0, 1, CPU)
    assert same(dict(stage.model.unet.state_dict()), dict(open_checkpoint(tiny_checkpoint).load("unet").state_dict()))
    run(stage, config.loop, tmp_path, config)
    made = native.read_config(tmp_path)
    assert made == replace(native.read_config(tiny_checkpoint), image_size=32, loss=config.loss)
    assert not same(
        dict(open_checkpoint(tmp_path).load("unet").state_dict()),
        dict(open_checkpoint(tiny_checkpoint).load("unet").state_dict()),
    )


def test_a_new_word(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its vectors learn and nothing else does; what is exported is what was trained, and prompts may use it."""
    config = EmbeddingTraining(
        init=str(tiny_checkpoint),
        word="<thing>",
        vectors=2,
        begin_with="heart",
        data=replace(DATA, size=32),
        optimizer=OptimizerConfig(rate=3e-2),
        loop=replace(LONG, ema=0.0),
    )
    stage = embedding_stage(config, 0, 1, CPU)
    tower = ldm.load(tiny_checkpoint, device="cpu").text
    assert tower.rows is not None
    (piece,) = tower.tokenizer().encode("heart")
    start = tower.token_embedding.weight[tower.rows[[piece, piece]]]
    assert torch.equal(stage.model.text.token_embedding.extra, start)

    before = frozen(stage)
    unet = {name: value.clone() for name, value in stage.model.unet.state_dict().items()}
    run(stage, config.loop, tmp_path, config)
    after = frozen(stage)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"text.token_embedding.extra"}
    assert same(dict(stage.model.unet.state_dict()), unet)
    (word,) = read_embeddings(tmp_path / "embedding.safetensors")
    assert word.word == "<thing>" and torch.equal(word.vectors, stage.model.text.token_embedding.extra)
    said = read_metadata(tmp_path / "embedding.safetensors")
    assert said["modelspec.trigger_phrase"] == "<thing>" and said["ss_learning_rate"] == "0.03"
    assert said["modelspec.architecture"] == "latent-diffusion/textual-inversion"
    assert said["ldm.base_hash"] == open_checkpoint(tiny_checkpoint).base_hash
    model = ldm.load(tiny_checkpoint, device="cpu")
    model = use.apply(model, [Adapter("embedding", str(tmp_path / "embedding.safetensors"))])
    assert not any("another model" in notice for notice in model.notices)
    drawn = model.txt2img("a <thing>", steps=1)
    assert not torch.equal(drawn, model.txt2img("a heart heart", steps=1))

    batch = next(iter(embedding_stage(config, 0, 1, CPU).batches))  # always the same, so that the loss has to fall
    word_module = stage.players["word"].module
    optimizer = torch.optim.Adam(word_module.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        ((_, loss, _),) = stage.losses(batch, Draws(0, 0, batch.key), 0, {"word": word_module})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.rank=4"], "name it with init=PATH"),
        (["init=icons", "autoencoder=x"], "leave out autoencoder="),
        (["init=nowhere"], "there is no model 'nowhere'"),
        (["init_set=[parameterization=eps]"], "name that with init=PATH"),
        (["init=icons", "init_set=[parameterization]"], "take words of the form key=value"),
        (
            ["init=icons", f"data.size={SHIPPED_SIZE}", "parameterization=eps"],
            "the model icons is v; leave it out, or say init_set=[parameterization=",
        ),
        (
            ["init=icons", f"data.size={SHIPPED_SIZE}", "schedule.kind=cosine"],
            "schedule.kind is cosine, and that of the model icons is scaled_lin",
        ),
        (["init=icons", "init_set=[image_size=256]", "data.size=64"], "set data.size=256, or init_set=[image_size=64]"),
    ],
)
def test_what_does_not_go_together(words: list[str], said: str, tmp_path: Path, monkeypatch, capsys) -> None:
    assert said in fails("diffusion", [*words, f"output={tmp_path / 'run'}"], monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_a_foreign_model_says_in_the_plan_what_was_assumed_of_it(tmp_path: Path) -> None:
    """And init_set goes before that, for the target, the exported model and the word alike."""
    export.write(tmp_path / "sd.safetensors", SMALL, random_states(SMALL), "original")
    save_file(load_file(tmp_path / "sd.safetensors"), tmp_path / "sd.safetensors")  # without our config in its metadata
    config = replace(PLAIN, init=str(tmp_path / "sd.safetensors"))
    stage = diffusion_stage(config, 0, 1, CPU)
    notes = [line for line in stage.describe() if line.startswith("note ")]
    assert (
        len(notes) == 2
        and "no pictures are drawn" in notes[1]
        and "assumed by its kind" in notes[0]
        and "parameterization=v" in notes[0]
    )
    assert stage.model.config.parameterization == "v"
    with pytest.raises(UserError, match="is v; leave it out, or say init_set"):
        diffusion_stage(replace(config, parameterization="eps"), 0, 1, CPU)
    stated = replace(config, init_set=("parameterization=eps", "image_size=32"), parameterization="eps")
    stage = diffusion_stage(stated, 0, 1, CPU)
    assert stage.model.config.parameterization == stage.model.law.parameterization.name == "eps"
    assert "parameterization" not in "".join(line for line in stage.describe() if line.startswith("note "))
    word = EmbeddingTraining(init=config.init, init_set=stated.init_set, begin_with="cat", data=config.data)
    assert embedding_stage(word, 0, 1, CPU).model.law.parameterization.name == "eps"


def test_settings_that_make_no_sense(tiny_checkpoint: Path) -> None:
    config = EmbeddingTraining(init=str(tiny_checkpoint), data=replace(DATA, size=32))
    for changes, said in (
        ({"init": ""}, "init=PATH"),
        ({"templates": ("a picture",)}, "has {} once"),
        ({"vectors": 15}, "room for 1 to 14"),
        ({"begin_with": " "}, "no piece"),
        ({"word": "two words"}, "white space"),
    ):
        with pytest.raises(UserError, match=said):
            embedding_stage(replace(config, **changes), 0, 1, CPU)
    lora = LoraConfig(rank=2, layers="all of them")
    with pytest.raises(UserError, match="choose one of"):
        diffusion_stage(replace(PLAIN, init=str(tiny_checkpoint), lora=lora, model=UNetConfig()), 0, 1, CPU)


def test_the_scripts(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    words = [f"init={tiny_checkpoint}", f"data.shards={DATA.shards}", "data.size=32", "data.streams=4"]
    words += ["data.workers=0", "loop.steps=1", "loop.global_batch=4", "loop.threads=1"]
    for stage, more, made in (
        ("embedding", ["word=<it>", "begin_with=heart", "sample.steps=1", "templates=['a {}']"], "embedding"),
        ("diffusion", ["lora.rank=8"], "lora"),
    ):
        script = Path(__file__).parents[2] / "scripts" / f"train_{stage}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *words, *more, f"output={tmp_path / stage}"])
        with warnings.catch_warnings():
            warnings.simplefilter("error", PromptNotice)  # of words that the tower does not know: the plan says it once
            runpy.run_path(str(script), run_name="__main__")
        told = capsys.readouterr().out
        assert "finished at step 1" in told
        assert (tmp_path / stage / f"{made}.safetensors").exists()
        drawn = (tmp_path / stage / "samples" / "00000001.png").exists()
        assert drawn == (made == "embedding")  # of its templates, where no prompts are given; else the plan says so
        assert drawn == ("no pictures are drawn on the way, for sample.prompts is empty" not in told)
