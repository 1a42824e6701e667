"""Training of Stable Diffusion XL's kind: two towers, sizes and crops of the real pictures, dropout of each tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ldm
from ldm.checkpoints import native, sdxl
from ldm.checkpoints.opening import open_checkpoint, open_towers
from ldm.conditioning.clip import TextTower
from ldm.conditioning.encoder import Encoder
from ldm.config import (
    DiffusionLossConfig,
    DiffusionTraining,
    EncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    load,
)
from ldm.diffusion.levels import draw_levels
from ldm.diffusion.schedule import make_schedule
from ldm.errors import UserError
from ldm.jobs import Ask, Settings
from ldm.training.draws import Draws
from ldm.training.stage_two import diffusion_stage

from .toys import CPU, ICONS, run

RECIPE = Path(__file__).parents[2] / "configs" / "diffusion" / "sdxl_tiny.yaml"
KEYS = [f"sample{i}" for i in range(64)]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two text towers with random weights, as train_clip.py would leave them."""
    paths = []
    for i in range(2):
        path = tmp_path_factory.mktemp(f"clip{i}")
        torch.manual_seed(i)
        config = TextConfig(context_length=16, width=64, heads=2, layers=2, embed_dim=64)
        native.save(path, ModelConfig(text=config), {"text": TextTower(config)})
        paths.append(str(path))
    return paths


def recipe(towers: list[str], *words: str) -> DiffusionTraining:
    plain = [
        "model.in_channels=3",
        "model.out_channels=3",
        "data.size=16",
        "data.buckets=8",
        f"data.shards={ICONS}/train-*.tar",
    ]
    quick = ["loop.steps=2", "loop.global_batch=8", "loop.threads=1", "sample.prompts=[]"]
    return load(DiffusionTraining, RECIPE, [f"text={towers[0]}", f"text_2={towers[1]}", *plain, *quick, *words])


def test_a_network_is_told_what_the_pictures_were(towers: list[str]) -> None:
    """As the encoder says it of the same sizes: those of the picture in its shard, of the crop, of the bucket."""
    stage = diffusion_stage(recipe(towers), 0, 1, CPU)
    batch = next(iter(stage.batches))
    _, told = stage.inputs(batch, Draws(0, 0, batch.key))
    height, width = batch.image.shape[2:]
    rows = zip(batch.caption, batch.size.tolist(), batch.crop.tolist(), strict=True)
    asks = [Ask(text, None, tuple(size), tuple(crop), (height, width)) for text, size, crop in rows]
    wanted = stage.model.encoder(asks)
    assert told.context is not None and told.vector is not None and wanted.context is not None
    assert told.context.shape == (8, 16, 128) and told.vector.shape == (8, 64 + 6 * 16)
    assert torch.equal(told.context, wanted.context) and torch.equal(told.vector, wanted.vector)
    assert batch.size.min() > 16  # the icons are larger than the pictures that are trained on
    first, second = stage.model.towers.values()
    tokens = first.tokenize(batch.caption)[0]
    assert torch.equal(told.context[..., :64], first(tokens)) and torch.equal(told.context[..., 64:], second(tokens))
    assert torch.equal(told.vector[:, :64], second.features(tokens)) and first.text_projection is None


def test_each_tower_is_silent_by_itself(towers: list[str]) -> None:
    encoder = Encoder(open_towers(*towers).load_towers(), EncoderConfig(pooled=True, sizes=16, empty="zeros"))
    texts = encoder.texts(["a red heart"] * len(KEYS))
    draws = Draws(0, 0, KEYS)
    rows = {name: draws.uniform(f"dropout of {name}") >= 0.5 for name in encoder.towers}
    made = encoder.without(texts, rows)
    assert made.context is not None and made.pooled is not None and texts.context is not None
    for name, part in (("text", made.context[..., :64]), ("text_2", made.context[..., 64:]), ("text_2", made.pooled)):
        assert torch.equal(part.flatten(1).any(dim=1), rows[name]), name
    assert torch.equal(made.context[rows["text"] & rows["text_2"]], texts.context[rows["text"] & rows["text_2"]])
    both = (
        rows["text"].double().mean(),
        rows["text_2"].double().mean(),
        (rows["text"] & rows["text_2"]).double().mean(),
    )
    assert all(abs(float(share) - wanted) < 0.25 for share, wanted in zip(both, (0.5, 0.5, 0.25), strict=True))


def test_dropout_of_towers_leaves_the_sizes(towers: list[str]) -> None:
    stage = diffusion_stage(recipe(towers, "loss.tower_dropout=1"), 0, 1, CPU)
    batch = next(iter(stage.batches))
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, told: object) -> Tensor:
        seen.extend([told.context, told.vector])  # type: ignore[attr-defined]
        return x

    list(stage.losses(batch, Draws(0, 0, batch.key), 0, {"unet": network}))  # type: ignore[dict-item]
    context, vector = seen
    assert not context.any() and not vector[:, :64].any() and bool(vector[:, 64:].any())


def test_a_refiner_is_trained_on_the_lowest_levels() -> None:
    schedule = make_schedule(ScheduleConfig())
    uniform = torch.linspace(0, 1 - 1e-9, 5000, dtype=torch.float64)
    drawn = draw_levels(DiffusionLossConfig(lowest=0.2), schedule, uniform)
    assert torch.equal(drawn.unique(), schedule.sigmas[:200])
    assert torch.equal(draw_levels(DiffusionLossConfig(), schedule, uniform).unique(), schedule.sigmas)
    flow = make_schedule(ScheduleConfig("flow"))
    assert float(flow.t(draw_levels(DiffusionLossConfig(lowest=0.2), flow, uniform)).max()) <= 201
    with pytest.raises(UserError, match=r"loss\.lowest"):
        draw_levels(DiffusionLossConfig(lowest=0.2, levels="lognormal"), schedule, uniform)


def test_a_trained_model_draws_and_goes_where_xl_goes(towers: list[str], tmp_path: Path) -> None:
    config = recipe(towers)
    stage = diffusion_stage(config, 0, 1, CPU)
    run(stage, config.loop, tmp_path / "run", config)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert list(model.towers) == ["text", "text_2"]
    settings = Settings(steps=2, width=16, height=16)
    there, cropped = (model.txt2img("a pizza", settings=replace(settings, crop=crop)) for crop in (None, (5, 3)))
    assert bool(there.isfinite().all()) and not torch.equal(there, cropped)
    checkpoint = open_checkpoint(tmp_path / "run")
    assert sdxl.unsayable(checkpoint.config) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text_2="], "the text tower's width is 64; set model.context_width=64"),
        (["encoder.sizes=0"], "model.vector_width is 160"),
        (["text="], "text names no first one"),
        (["encoder.score=true"], "aesthetic score"),
        (["encoder.empty=nothing"], "choose one of encoded, zeros"),
        (["model.depths=[1]"], "depths has 1 numbers for 2 levels"),
    ],
)
def test_what_does_not_fit_is_a_sentence(towers: list[str], words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        diffusion_stage(recipe(towers, *words), 0, 1, CPU)
