"""Training of Stable Diffusion XL's kind: two towers, sizes and crops of the real pictures, dropout of each tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import sample, write_tar  # tests/ is the root of the tests' packages
from torch import Tensor

import ldm
from ldm.adapters import use
from ldm.checkpoints import native, sdxl
from ldm.checkpoints.foreign import where_to
from ldm.checkpoints.opening import open_checkpoint, open_towers
from ldm.checkpoints.textual_inversion import read_embeddings
from ldm.conditioning.clip import TextTower
from ldm.conditioning.encoder import Encoder
from ldm.config import (
    AutoencoderConfig,
    DataConfig,
    DiffusionLossConfig,
    DiffusionTraining,
    EmbeddingTraining,
    EncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    load,
)
from ldm.data.latent_writing import LatentSources, LatentWriter
from ldm.data.latents import LatentLoader, latent_fingerprint
from ldm.diffusion.levels import draw_levels
from ldm.diffusion.schedule import make_schedule
from ldm.errors import UserError
from ldm.jobs import Ask, Settings
from ldm.jobs.adapters import Adapter
from ldm.networks import make_network
from ldm.training.draws import Draws
from ldm.training.embedding import embedding_stage
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
    told = EncoderConfig(pooled=True, sizes=16, empty="zeros")
    encoder = Encoder(open_towers(towers[0], towers[1]).load_towers(), told)
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


def test_the_larger_recipe_is_a_network_of_251_million_that_others_can_hold() -> None:
    config = load(DiffusionTraining, RECIPE.with_name("sdxl256.yaml"))
    tower = TextConfig(width=512, heads=8, layers=12, embed_dim=512, layer="penultimate", final_norm=False)
    with torch.device("meta"):
        network = make_network(config.model)
        encoder = Encoder({"text": TextTower(replace(tower, embed_dim=0)), "text_2": TextTower(tower)}, config.encoder)
    assert 250e6 < sum(value.numel() for value in network.parameters()) < 252e6
    model: Any = config.model
    assert (encoder.context_width, encoder.vector_width) == (model.context_width, model.vector_width)
    made = ModelConfig(
        AutoencoderConfig(), replace(tower, embed_dim=0), model, config.schedule, encoder=config.encoder, text_2=tower
    )
    assert where_to(made) == "an original file and a diffusers directory"


def test_a_new_word_for_both_towers(towers: list[str], tmp_path: Path) -> None:
    """The vectors of both learn and nothing else does; the file is read as what was trained."""
    model = recipe(towers)
    run(diffusion_stage(model, 0, 1, CPU), model.loop, tmp_path / "xl", model)
    words = [f"init={tmp_path / 'xl'}", "word=<thing>", "begin_with=heart", "vectors=2", "optimizer.rate=0.01"]
    plain = ["data.size=16", "data.streams=4", "data.workers=0", "loop.steps=2", "loop.threads=1", "sample.prompts=[a]"]
    config = load(EmbeddingTraining, None, [*words, *plain, f"data.shards={ICONS}/train-*.tar"])
    stage = embedding_stage(config, 0, 1, CPU)
    network = {key: value.clone() for key, value in stage.model.unet.state_dict().items()}
    tables: dict[str, Any] = {name: tower.token_embedding for name, tower in stage.model.towers.items()}
    start = {name: table.extra.clone() for name, table in tables.items()}
    loaded: dict[str, Any] = open_checkpoint(tmp_path / "xl").load_towers()
    for name, tower in loaded.items():
        (piece,) = tower.tokenizer().encode("heart")
        assert torch.equal(start[name], tower.token_embedding.weight[[piece, piece]])
    run(stage, config.loop, tmp_path / "word", config)
    assert all(torch.equal(value, network[key]) for key, value in stage.model.unet.state_dict().items())
    (word,) = read_embeddings(tmp_path / "word" / "embedding.safetensors")
    assert word.word == "<thing>" and word.second is not None
    for name, vectors in (("text", word.vectors), ("text_2", word.second)):
        assert torch.equal(vectors, tables[name].extra) and not torch.equal(vectors, start[name]), name
    drawing = ldm.load(tmp_path / "xl", device="cpu")
    made = use.apply(drawing, [Adapter("embedding", str(tmp_path / "word" / "embedding.safetensors"))])
    assert not any("alone" in told for told in made.told)
    for given, wanted in zip(
        made.encoder.tokens(["a <thing>"]), stage.model.encoder.tokens(["a <thing>"]), strict=True
    ):
        assert torch.equal(given, wanted) and int((given >= 49408).sum()) == 2


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a score in their json, one of them without."""
    folder = tmp_path_factory.mktemp("scored")
    members = [part for i in range(16) for part in sample(f"{i:05d}", i, aesthetic=i / 2)]
    write_tar(folder / "train-0000.tar", [*members, *sample("00016", 16)])
    return folder


def refiner(towers: list[str], scored: Path, *words: str) -> DiffusionTraining:
    told = ["encoder.score=true", "encoder.empty=encoded", "model.context_width=64", "model.vector_width=144"]
    data = [f"data.shards={scored}/train-*.tar", "data.score=aesthetic", "data.caption=txt", "data.streams=1"]
    return recipe([towers[1], ""], *told, *data, "loss.lowest=0.2", *words)


def test_a_refiner_is_told_the_scores_of_its_pictures(towers: list[str], scored: Path, tmp_path: Path) -> None:
    """Half the number of the sample, here; a picture without one is passed over. What is drawn is told one too."""
    config = refiner(towers, scored)
    stage = diffusion_stage(config, 0, 1, CPU)
    batch = next(iter(stage.batches))
    _, told = stage.inputs(batch, Draws(0, 0, batch.key))
    assert batch.score == [int(key[-5:]) / 2 for key in batch.key]
    asks = [
        Ask(text, None, tuple(size), tuple(crop), score=score)
        for text, size, crop, score in zip(
            batch.caption, batch.size.tolist(), batch.crop.tolist(), batch.score, strict=True
        )
    ]
    assert told.vector is not None and told.vector.shape == (8, 64 + 5 * 16)
    wanted = stage.model.encoder([replace(ask, target=(16, 16)) for ask in asks]).vector
    assert wanted is not None and torch.equal(told.vector, wanted)
    other = stage.model.encoder([replace(ask, target=(16, 16), score=9.5) for ask in asks]).vector
    assert other is not None and not torch.equal(other[:, -16:], wanted[:, -16:])
    run(stage, config.loop, tmp_path / "run", config)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert model.config.encoder.score
    settings = Settings(steps=2, width=16, height=16)
    low, high = (model.txt2img("a", settings=replace(settings, score=score)) for score in (1.0, 9.0))
    assert not torch.equal(low, high)


def test_scores_go_with_latents(scored: Path, tmp_path: Path) -> None:
    data = DataConfig(shards=f"{scored}/*.tar", size=16, score="aesthetic", streams=1, workers=0)
    sources = LatentSources(data)
    writer = LatentWriter(tmp_path / "latents", {"text": "some"}, sources.fingerprint, flipped=False)
    for batch in sources.batches(4):
        count = len(batch.key)
        writer.add(batch, torch.zeros(count, 6, 16, 16), None, [torch.zeros(1, 16, 64)] * count)
    writer.finish()
    cached = LatentLoader(replace(data, shards=str(tmp_path / "latents")), 8, 0, 1, 0, {"text": "some"})
    batch = next(iter(cached))
    assert batch.score == [int(key[-5:]) / 2 for key in batch.key]


def test_latents_are_read_as_the_model_of_init_reads_texts(towers: list[str], tmp_path: Path) -> None:
    """Which says that pooled text is among them, where the settings say nothing of it."""
    stage = diffusion_stage(recipe(towers), 0, 1, CPU)
    stage.export(tmp_path / "xl", True)
    data = DataConfig(shards=f"{ICONS}/train-*.tar", size=16, streams=1, workers=0)
    prints = latent_fingerprint(None, open_towers(*towers), data, stage.model.encoder.config)
    sources = LatentSources(data)
    writer = LatentWriter(tmp_path / "latents", prints, sources.fingerprint, flipped=False)
    for batch in sources.batches(64):
        count = len(batch.key)
        texts = [torch.zeros(1, 16, 128)] * count, [torch.ones(1, 64)] * count
        writer.add(batch, torch.zeros(count, 6, 16, 16), None, *texts)
    writer.finish()
    words = [f"init={tmp_path / 'xl'}", f"latents={tmp_path / 'latents'}", "sample.prompts=[]", "loop.global_batch=4"]
    plain = ["data.size=16", "data.streams=1", "data.workers=0", f"data.shards={data.shards}"]
    stage = diffusion_stage(load(DiffusionTraining, None, [*words, *plain]), 0, 1, CPU)
    batch = next(iter(stage.batches))
    _, told = stage.inputs(batch, Draws(0, 0, batch.key))
    assert told.vector is not None and bool((told.vector[:, :64] == 1).all())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text_2="], "the text tower's width is 64; set model.context_width=64"),
        (["encoder.sizes=0"], "model.vector_width is 160"),
        (["text="], "text names no first one"),
        (["encoder.score=true"], r"data\.score is not set; say data\.score=FIELD"),
        (["data.score=stars"], r"is told an aesthetic score, and this one is not"),
        (["encoder.empty=nothing"], "choose one of encoded, zeros"),
        (["model.depths=[1]"], "depths has 1 numbers for 2 levels"),
    ],
)
def test_what_does_not_fit_is_a_sentence(towers: list[str], words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        diffusion_stage(recipe(towers, *words), 0, 1, CPU)
