"""Stage two, measured: the pictures of a model, or a folder or shards of pictures, against real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from ldm.model import LatentDiffusion


@dataclass(frozen=True, eq=False)
class Against:
    """What pictures are measured against, in which spaces, and where features are kept."""

    real: Source
    held_out: Source | None
    spaces: Sequence[FeatureSpace]
    measures: Measures
    cache: Path
    batch_size: int = 4  # of the feature networks; small ones fit a CPU's caches, a GPU likes 64
    bar: bool = False

    def figures(self, drawn: Source, size: int, crew: Crew) -> dict[str, float]:
        """Those of `drawn`; all processes make features, the first one tells the figures (the others get none).

        Raises UserError for sets that are too small.
        """
        sides = [drawn, self.real, *([self.held_out] if self.held_out else [])]
        made = [
            [extract(side, size, space, self.cache, crew, self.batch_size, self.bar) for side in sides]
            for space in self.spaces
        ]
        found: dict[str, float] = {}
        for features in made if crew.main else []:
            found |= between(features[0], features[1], self.measures)
            if self.held_out:
                found |= between(features[0], features[2], self.measures, held_out=True)
            found |= alone(features[0], drawn, self.measures)
        if crew.main and not found:
            raise UserError("none of the figures asked for is defined in these spaces; ask for others, or other spaces")
        return found

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
            "measures": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.measures).items()},
        }


def evaluate_model(
    model: LatentDiffusion, drawing: Drawing, against: Against, folder: Path, crew: Crew, weights: str = "auto"
) -> dict[str, Any]:
    """Draw what is missing in `folder`, measure it; the result with its protocol."""
    drawn = draw(model, drawing, folder, crew, against.bar)
    side = drawing.settings.width or model.config.image_size
    figures = against.figures(drawn, side, crew)
    made = against.protocol(drawn, side, drawing.protocol(model))
    subject = {**protocol.subject_of(model, weights), "pictures": drawn.digest}
    return protocol.result(figures, subject, made, cost={"evaluations": evaluations(folder)})


def evaluate_pictures(drawn: Source, size: int, against: Against, crew: Crew) -> dict[str, Any]:
    """The same of pictures that are there already."""
    figures = against.figures(drawn, size, crew)
    return protocol.result(figures, {"name": drawn.name, "pictures": drawn.digest}, against.protocol(drawn, size, None))
