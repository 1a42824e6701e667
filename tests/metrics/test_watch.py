"""A training run can ask for the figures of evaluation, by the same code."""

from dataclasses import replace

import pytest
import torch

import ldm.metrics.watch as watching
from ldm.checkpoints import native
from ldm.conditioning.clip import TextTower
from ldm.config import DataConfig, DiffusionTraining, FiguresConfig, ModelConfig, SampleConfig, TextConfig
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing, draw
from ldm.metrics.features import FeatureSpace
from ldm.metrics.figures import Measures
from ldm.metrics.generation import Against, evaluate_pictures
from ldm.metrics.sources import open_source, read_captions
from ldm.metrics.watch import watch
from ldm.training.stage_two import diffusion_stage

from .pictures_maker import toy_shard

SAMPLE, DRAWN = SampleConfig(cfg=2.0, steps=2), Settings(2.0, 2)
NAMES = {"KD[toy]", "KD[toy] deviation", "precision[toy]", "recall[toy]", "density[toy]", "coverage[toy]"}


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """Nine captioned pictures; a space that takes no time and a cache of its own."""

    def toy_space(name, device):
        return FeatureSpace("toy", 12, lambda image: torch.nn.functional.adaptive_avg_pool2d(image, 2).flatten(1))

    monkeypatch.setattr(watching, "make_space", toy_space)
    for kept in (watching._space, watching._reference):
        kept.cache_clear()
    monkeypatch.setattr(watching, "CACHE", tmp_path / "cache")
    yield toy_shard(tmp_path / "toy.tar")
    for kept in (watching._space, watching._reference):
        kept.cache_clear()


def test_the_figures_are_those_of_evaluation(tiny_model, shard, tmp_path):
    found = watch(tiny_model, FiguresConfig(pictures=8), DataConfig(validation=shard, size=32), DRAWN)
    drawing = Drawing(read_captions(shard), DRAWN, 8)
    drawn, real = draw(tiny_model, drawing, tmp_path / "drawn", Crew()), open_source(shard, "--reference")
    measures = Measures(("kernel", "neighbours"), subset=8)
    against = Against(real, None, [watching.make_space("toy", "cpu")], measures, tmp_path / "other")
    assert found == evaluate_pictures(drawn, 32, against, Crew())["figures"]


def test_the_network_is_built_and_the_reference_read_once(tiny_model, shard, monkeypatch):
    built, make, read = [], watching.make_space, watching.open_source
    monkeypatch.setattr(watching, "make_space", lambda name, device: (built.append(name), make(name, device))[1])
    monkeypatch.setattr(watching, "open_source", lambda name, *more: (built.append(name), read(name, *more))[1])
    for _ in range(2):
        watch(tiny_model, FiguresConfig(pictures=6), DataConfig(validation=shard, size=32), DRAWN)
    assert built == ["efficientnet-lite0", shard]


def test_the_same_at_every_call(tiny_model, shard):
    config, data = FiguresConfig(pictures=8), DataConfig(validation=shard, size=32)
    first = watch(tiny_model, config, data, DRAWN)
    assert first.keys() == NAMES
    assert watch(tiny_model, config, data, DRAWN) == first
    with pytest.raises(UserError, match=r"set figures\.reference or data\.validation"):
        watch(tiny_model, config, DataConfig(size=32), DRAWN)


def test_a_run_tells_them_at_its_validations(shard, tmp_path):
    config = TextConfig(context_length=16, width=32, heads=2, layers=1, embed_dim=16, vocabulary=49408)
    torch.manual_seed(0)
    native.save(tmp_path / "clip", ModelConfig(text=config), {"text": TextTower(config)})
    training = DiffusionTraining(text=str(tmp_path / "clip"), sample=SAMPLE)
    training = replace(
        training,
        model=replace(
            training.model,
            in_channels=3,
            out_channels=3,
            channels=32,
            multipliers=(1, 1),
            blocks=1,
            attention_levels=(1,),
            heads=2,
            context_width=32,
        ),
        data=DataConfig(shards=shard, size=16, streams=1, workers=0),
        loop=replace(training.loop, global_batch=2),
        figures=FiguresConfig(pictures=7, reference=shard),
    )
    with torch.no_grad():
        found = diffusion_stage(training, 0, 1, torch.device("cpu")).validate()
    assert found.keys() == NAMES
    assert diffusion_stage(replace(training, figures=FiguresConfig()), 0, 1, torch.device("cpu")).validate() == {}
