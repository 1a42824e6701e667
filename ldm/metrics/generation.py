"""Stage two, measured: the pictures of a model, or a folder or shards of pictures, against real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.metrics import protocol
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing, draw, evaluations
from ldm.metrics.extraction import extract
from ldm.metrics.features import FeatureSpace
from ldm.metrics.figures import Measures, alone, between
from ldm.metrics.sources import RESIZE, Source
from ldm.model import Model


@dataclass(frozen=True, eq=False)
class Against:
    """What pictures are measured against, in which spaces, and where features are kept."""

    real: Source
    held_out: Source | None
    spaces: Sequence[FeatureSpace]
    measures: Measures
    cache: Path
    bar: bool = False

    def check(self, count: int, captioned: bool) -> None:
        """Raises UserError for figures that need more than `count` drawn pictures."""
        self.measures.check_spaces(self.spaces, captioned)
        for space in self.spaces:
            self.measures.check_counts(space, count, len(self.real))
            if self.held_out:
                self.measures.check_counts(space, count, len(self.held_out), held_out=True)

    def measured(
        self, drawn: Source, size: int, crew: Crew, kept: Path | None = None
    ) -> tuple[dict[str, float], Source, Against]:
        """The figures of `drawn`, and both sides without the pictures that did not decode.

        All processes make features, the first one tells the figures (the others get none). `kept`: the folder of the
        features of `drawn`; None: beside those of the real sides. Raises UserError for sets that are too small.
        """
        sides = [(drawn, kept or self.cache), (self.real, self.cache)]
        sides += [(self.held_out, self.cache)] if self.held_out else []
        made = [
            [extract(side, size, space, folder, crew, bar=self.bar) for side, folder in sides] for space in self.spaces
        ]
        found: dict[str, float] = {}
        for features in made if crew.main else []:
            found |= between(features[0], features[1], self.measures)
            if self.held_out:
                found |= between(features[0], features[2], self.measures, held_out=True)
            found |= alone(features[0], drawn, self.measures)
        whole = [side.only(features.rows) for (side, _), features in zip(sides, made[0], strict=True)]
        return found, whole[0], replace(self, real=whole[1], held_out=whole[2] if self.held_out else None)

    def protocol(self, drawn: Source, size: int, drawing: Mapping[str, Any] | None) -> dict[str, Any]:
        """All that the figures depend on beside the subject."""
        return {
            "command": "generation",
            "pictures": len(drawn),
            "drawing": dict(drawing) if drawing else None,
            "size": size,
            "resize": RESIZE,
            "reference": self.real.protocol(),
            "held_out": self.held_out.protocol() if self.held_out else None,
            "spaces": [space.protocol() for space in self.spaces],
            "measures": self.measures.protocol(self.spaces),
        }

    def sources(self) -> dict[str, str]:
        """What the real sides were called when they were given."""
        return {"reference": self.real.name, **({"held_out": self.held_out.name} if self.held_out else {})}


def evaluate_model(
    model: Model, drawing: Drawing, against: Against, folder: Path, crew: Crew, weights: str = "auto"
) -> dict[str, Any]:
    """Draw what is missing in `folder`, measure it; the result with its protocol.

    Features of the drawn are kept in a folder beside it. `weights`: what `ldm.load` was asked for. Raises UserError,
    before anything is drawn if the counts alone tell.
    """
    drawing.check()
    against.check(drawing.count, drawing.captions != () and all(drawing.captions))
    drawn = draw(model, drawing, folder, crew, against.bar)
    side = drawing.settings.width or model.config.image_size
    figures, drawn, against = against.measured(drawn, side, crew, folder.parent / "features")
    made = against.protocol(drawn, side, drawing.protocol(model))
    subject = {**protocol.subject_of(model, weights), "pictures": drawn.digest}
    sources = {"captions": drawing.captions_from, **against.sources()}
    return protocol.result(figures, subject, made, sources=sources, cost={"evaluations": evaluations(folder)})


def evaluate_pictures(drawn: Source, size: int, against: Against, crew: Crew) -> dict[str, Any]:
    """The same of pictures that are there already, brought to `size` pixels. Raises UserError."""
    if size < 1:
        raise UserError(f"pictures of {size} pixels were asked for; choose a --size of at least 1")
    against.check(len(drawn), drawn.captioned)
    figures, drawn, against = against.measured(drawn, size, crew)
    made = against.protocol(drawn, size, None)
    subject = {"name": drawn.name, "pictures": drawn.digest}
    return protocol.result(figures, subject, made, sources=against.sources())
