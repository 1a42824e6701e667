"""What scripts/evaluate.py measures, on few pictures, while a model is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ldm.config import DataConfig, FiguresConfig, SampleConfig
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing, draw
from ldm.metrics.extraction import CACHE, extract
from ldm.metrics.features import make_space
from ldm.metrics.figures import Measures, alone, between
from ldm.metrics.sources import open_source, read_captions
from ldm.model import LatentDiffusion

SUBSET = 1000  # of the kernel distance, or as many pictures as there are


def watch(model: LatentDiffusion, config: FiguresConfig, data: DataConfig, sample: SampleConfig) -> dict[str, float]:
    """Kernel distance, precision, recall, density and coverage of `config.pictures` pictures of the model, by name.

    They have the captions of the real pictures in turn and the seeds 0, 1, ..., the same at every call, so that a run's
    figures compare with each other; with those of another count they do not. The real pictures' features are kept
    for the next call. Raises UserError for settings that cannot work.
    """
    shards = config.reference or data.validation
    if not shards:
        raise UserError("figures.pictures asks for real ones to compare with; set figures.reference or data.validation")
    space = make_space(config.space, model.device.type)
    real = open_source(shards, "figures.reference", data.where)
    drawing = Drawing(read_captions(shards, data.where), Settings(sample.cfg, sample.steps), config.pictures)
    batch_size = 4 if model.device.type == "cpu" else 64
    with tempfile.TemporaryDirectory() as name:
        folder, crew = Path(name), Crew()
        drawn = draw(model, drawing, folder / "pictures", crew)
        made = extract(drawn, data.size, space, folder, crew, batch_size)
        kept = extract(real, data.size, space, CACHE, crew, batch_size)
        measures = Measures(("kernel", "neighbours", "captions"), subset=min(len(made), len(kept), SUBSET)).check()
        return between(made, kept, measures) | alone(made, drawn, measures)
