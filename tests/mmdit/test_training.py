"""The transformer is trained and drawn with by the ordinary commands, as any network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import ldm
from ldm.checkpoints import native
from ldm.conditioning.clip import TextTower
from ldm.config import DiffusionTraining, ModelConfig, TextConfig, load
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.loop import carry_out
from ldm.training.stage_two import diffusion_stage

ROOT = Path(__file__).parents[2]
ICONS, RECIPE = ROOT / "tests" / "fixtures" / "icons", ROOT / "configs" / "diffusion" / "mmdit_tiny.yaml"
SMALL = ["model.width=32", "model.depth=2", "model.heads=2", "model.context_width=32", "model.side=4"]
QUICK = [
    "data.where={}",
    "loop.steps=4",
    "loop.global_batch=4",
    "loop.log_every=2",
    "loop.precision=fp32",
    "loop.threads=1",
    "sample.prompts=[a pizza]",
]


def settings(folder: Path, checkpoint: Path, *more: str) -> DiffusionTraining:
    parts = [
        f"autoencoder={checkpoint}",
        f"text={checkpoint}",
        "model.in_channels=4",
        "model.out_channels=4",
        "model.context_width=32",
        "data.size=32",
        "model.side=4",
    ]
    words = [*SMALL, *QUICK, *parts, f"data.shards={ICONS}/train-*.tar", f"output={folder}", *more]
    return load(DiffusionTraining, RECIPE, words)


def test_the_recipe_trains_a_transformer_that_is_loaded_and_drawn_with(tmp_path: Path, tiny_checkpoint: Path) -> None:
    carry_out(settings(tmp_path / "run", tiny_checkpoint), diffusion_stage)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert model.config.unet is not None and model.config.unet.kind == "mmdit"
    assert model.law.parameterization.name == "flow"
    image = model.txt2img("a pizza", steps=3, cfg=2.0, sampler="euler")
    assert image.shape == (1, 3, 32, 32) and bool(image.isfinite().all()) and float(image.std()) > 0
    carry_out(settings(tmp_path / "more", tiny_checkpoint, f"init={tmp_path / 'run'}", *NO_PARTS), diffusion_stage)
    before, after = (ldm.load(tmp_path / name, device="cpu").unet.state_dict() for name in ("run", "more"))
    assert before.keys() == after.keys() and not torch.equal(before["out.weight"], after["out.weight"])
    assert torch.equal(before["positions"], after["positions"])


def test_T5_is_told_and_left_out_by_itself_and_travels_with_the_model(tmp_path: Path, tiny_checkpoint: Path) -> None:
    pytest.importorskip("transformers")
    from ldm.checkpoints import native
    from ldm.checkpoints.opening import open_checkpoint
    from ldm.conditioning import t5_tokenizer
    from ldm.conditioning.t5 import T5Tower
    from ldm.model_config import ModelConfig, T5Config

    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz")]
    document = t5_tokenizer.written(pieces, b"")
    tower = T5Tower(T5Config(30, 48, 2, 8, 32, 2, 32, len(document)))
    tower.tokenizer = torch.frombuffer(bytearray(document), dtype=torch.uint8)
    source = open_checkpoint(tiny_checkpoint)
    texts = tmp_path / "texts"
    native.save(
        texts, ModelConfig(text=source.config.text, t5=tower.config), {"text": source.load("text"), "t5": tower}
    )
    words = [f"text={texts}", "model.streams=2", "model.context_width=48", "encoder.width=48", "encoder.t5_tokens=20"]
    words += ["loss.caption_dropout=0", "loss.tower_dropout=0.464"]
    stage = diffusion_stage(settings(tmp_path / "run", tiny_checkpoint, *words), 0, 1, torch.device("cpu"))
    batch, length = next(iter(stage.batches)), source.config.text.context_length  # type: ignore[union-attr]
    told = [stage.inputs(batch, Draws(step, 0, batch.key), of_towers=0.464)[1].context for step in range(20)]
    kept = torch.cat([torch.stack([c[:, :length].flatten(1).any(1), c[:, length:].flatten(1).any(1)]) for c in told], 1)
    assert told[0].shape == (4, length + 20, 48)
    for each in kept.double().mean(dim=1):
        assert 0.3 < float(each) < 0.77  # 80 draws of 0.536, deviation 0.056
    assert len(set(zip(*kept.tolist(), strict=True))) == 4  # each without the other, both, and none

    carry_out(settings(tmp_path / "run", tiny_checkpoint, *words), diffusion_stage)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert model.encoder.t5 is not None and bytes(model.encoder.t5.tokenizer.numpy()) == document
    assert bool(model.txt2img("a pizza", steps=2, sampler="euler").isfinite().all())
    without = [word for word in words if "t5_tokens" not in word and "encoder.width" not in word]
    without = [word.replace("context_width=48", "context_width=32") for word in without]
    other = diffusion_stage(settings(tmp_path / "other", tiny_checkpoint, *without), 0, 1, torch.device("cpu"))
    assert other.model.encoder.t5 is None


NO_PARTS = ["autoencoder=", "text=", "model={}", "parameterization=", "schedule={}"]


def test_of_classes_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    classes = ["text=", "model.context_width=0", "model.classes=2", "data.label=source", "sample.prompts=[]"]
    classes += ["encoder.labels=[noto, fluent-flat]"]
    carry_out(settings(tmp_path / "run", tiny_checkpoint, *classes), diffusion_stage)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert math.isfinite(float(model.txt2img(label="noto", steps=2).sum()))


TWO = [  # as Stable Diffusion 3, small: two streams, a vector, zeros in the place of T5
    "model.streams=2",
    "model.vector_width=128",
    "model.context_width=160",
    "encoder.pooled=true",
    "encoder.width=160",
    "encoder.t5_tokens=4",
    "schedule.shift=3",
    "loss.caption_dropout=0",
]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two text towers that project, with random weights."""
    paths = []
    for i in range(2):
        path = tmp_path_factory.mktemp(f"clip{i}")
        torch.manual_seed(i)
        config = TextConfig(context_length=16, width=64, heads=2, layers=2, embed_dim=64)
        native.save(path, ModelConfig(text=config), {"text": TextTower(config)})
        paths.append(str(path))
    return paths


def test_two_streams_learn_from_two_towers_that_are_dropped_one_by_one(
    tmp_path: Path, tiny_checkpoint: Path, towers: list[str]
) -> None:
    words = [*TWO, f"text={towers[0]}", f"text_2={towers[1]}", "loss.tower_dropout=0.464"]
    config = settings(tmp_path / "run", tiny_checkpoint, *words)
    stage = diffusion_stage(config, 0, 1, torch.device("cpu"))
    assert "of each tower 0.464" in "\n".join(stage.describe())
    batch, silent = next(iter(stage.batches)), {"text": 0, "text_2": 0}
    for step in range(12):
        draws = Draws(0, step, batch.key)
        _, told = stage.inputs(batch, draws, of_towers=0.464)
        assert told.context is not None and told.vector is not None and told.context.shape == (4, 16 + 4, 160)
        assert not told.context[:, :, 128:].any() and not told.context[:, 16:].any()  # width of T5, tokens of T5
        for i, name in enumerate(silent):
            own = told.context[:, :16, 64 * i : 64 * (i + 1)].flatten(1).any(dim=1)
            assert torch.equal(own, told.vector[:, 64 * i : 64 * (i + 1)].any(dim=1)), "pooled goes with its tower"
            assert torch.equal(own, draws.uniform(f"dropout of {name}") >= 0.464)
            silent[name] += int((~own).sum())
    assert all(10 <= count <= 35 for count in silent.values()), silent  # 22 of 48 are expected, deviation 3.5
    carry_out(config, diffusion_stage)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert list(model.towers) == ["text", "text_2"] and model.config.encoder.t5_tokens == 4
    weights = model.unet.state_dict()
    changed = [key for key, value in weights.items() if "context" in key and bool(value.any())]
    assert any(".context.modulation" in key for key in changed) and any("vector_embedding" in key for key in weights)
    one, other = (model.txt2img(text, steps=2, cfg=2.0, sampler="euler") for text in ("a pizza", "a red heart"))
    assert bool(one.isfinite().all()) and not torch.equal(one, other)


def test_settings_of_the_other_network_are_refused_by_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"unknown setting 'model\.multipliers'"):
        settings(tmp_path, tiny_checkpoint, "model.multipliers=[1,2]")
    with pytest.raises(UserError, match=r"model\.heads"):
        diffusion_stage(settings(tmp_path, tiny_checkpoint, "model.heads=5"), 0, 1, torch.device("cpu"))
