"""What scripts/evaluate.py measures, on few pictures, while a model is trained."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from ldm.config import DataConfig, FiguresConfig
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing, draw
from ldm.metrics.extraction import CACHE, extract
from ldm.metrics.features import FeatureSpace
from ldm.metrics.figures import Measures
from ldm.metrics.generation import Against
from ldm.metrics.sources import Source, captions_of, open_source
from ldm.metrics.spaces import make_space
from ldm.model import Model

SUBSET = 1000  # of the kernel distance, or as many pictures as there are


def watch(model: Model, config: FiguresConfig, data: DataConfig, settings: Settings) -> dict[str, float]:
    """Kernel distance, precision, recall, density and coverage of `config.pictures` pictures of the model, by name.

    They are drawn by `settings` and, in what these leave open, as the model is meant to be drawn, with the captions of
    the real pictures in turn and the seeds 0, 1, ..., the same at every call, so that a run's figures compare with each
    other; with those of another count they do not. The real pictures are read once, and their features kept for the
    next call. Raises UserError for settings that cannot work.
    """
    against, drawing = ready(config, data, settings, model.device.type)
    crew = Crew()
    decoded = len(extract(against.real, data.size, against.spaces[0], CACHE, crew))
    against = replace(against, measures=replace(against.measures, subset=min(against.measures.subset, decoded)))
    against.check(drawing.count, captioned=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return against.measured(draw(model, drawing, folder / "pictures", crew), data.size, crew, folder)[0]


def ready(config: FiguresConfig, data: DataConfig, settings: Settings, device: str) -> tuple[Against, Drawing]:
    """What `watch` compares with, and what it draws; raises UserError for settings that cannot work, at little cost."""
    shards = config.reference or data.validation
    if not shards:
        raise UserError(
            "figures.pictures needs real pictures to compare with; set figures.reference or data.validation"
        )
    space = _space(config.space, device)
    real = _reference(shards, tuple((field, tuple(values)) for field, values in data.where.items()))
    drawing = Drawing(captions_of(real), settings, config.pictures).check()
    kinds = ("kernel", "neighbours", *(("captions",) if space.text is not None else ()))
    measures = Measures(kinds, subset=min(drawing.count, len(real), SUBSET)).check()
    against = Against(real, None, [space], measures, CACHE)
    against.check(drawing.count, captioned=True)
    return against, drawing


@functools.lru_cache(maxsize=1)
def _space(name: str, device: str) -> FeatureSpace:
    """Built once in a run."""
    return make_space(name, device)


@functools.lru_cache(maxsize=1)
def _reference(shards: str, where: tuple[tuple[str, tuple[str, ...]], ...]) -> Source:
    """Opened once in a run: to know its pictures each is read, and their contents hashed."""
    return open_source(shards, "figures.reference", dict(where))
