"""One way to draw a curve, for all studies."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import atomic_write_bytes


@contextmanager
def figure(path: Path, x: str, y: str, size: tuple[float, float] = (6.0, 4.0)) -> Iterator[Any]:
    """matplotlib's axes, labelled; written to `path` as PNG at the end. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need the package matplotlib; install it with pip install 'ldm[plot]'") from error
    drawing = Figure(size, dpi=130, layout="constrained")
    axes = drawing.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    yield axes
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue())
