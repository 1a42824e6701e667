"""All pictures of a command as one moving picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import provenance
from ldm.commands.drawing import After, Drawn, number_of
from ldm.commands.order import Order

if TYPE_CHECKING:
    from ldm.api import LatentDiffusion


def film(kinds: Sequence[str], fps: float, back: bool) -> After | None:
    """Writes the pictures as films of these kinds; `back`: to the end and back again, so that it has no end."""

    def write(model: LatentDiffusion, order: Order, drawn: Sequence[Drawn], folder: Path) -> None:
        from ldm import animation

        images, requests, paths = zip(*drawn, strict=True)
        record = provenance.record_sheet(model, order.settings, requests)
        shown = [*images, *images[-2:0:-1]] if back else images
        for kind in dict.fromkeys(kinds):
            print(animation.save(shown, folder, kind, fps, record, number_of(paths[0])))

    return write if kinds else None
