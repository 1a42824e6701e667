"""Figures drawn by matplotlib, which is an extra: asked for here alone."""

from __future__ import annotations

import io
from typing import Any

from ldm.errors import UserError


def new_figure(width: float, height: float, dpi: int = 100) -> Any:
    """An empty figure of so many inches; raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need the package matplotlib; install it with pip install -e '.[plot]'") from error
    return Figure((width, height), dpi=dpi, layout="constrained")


def png(figure: Any) -> bytes:
    """The figure as a PNG; equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
