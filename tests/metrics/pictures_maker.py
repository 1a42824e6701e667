"""Shards of toy pictures that have a concept and a style: a concept is a colour, a style what is drawn on it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.writing import write_shard

COLOURS = {"red heart": (220, 40, 40), "green apple": (40, 190, 60), "blue fish": (50, 60, 210)}
STYLES = ("noto emoji", "flat emoji", "emojitwo")


def toy_shard(path: Path, side: int = 32, pairs: Sequence[tuple[str, str]] = ()) -> str:
    """One picture of each concept in each style, or of these pairs alone; returns the shard's path."""
    rng = np.random.default_rng(0)
    records = []
    for style in STYLES:
        for name, colour in COLOURS.items():
            if pairs and (name, style) not in pairs:
                continue
            pixels = np.full((side, side, 3), 255.0)
            pixels[6:-6, 6:-6] = np.array(colour) + rng.normal(0, 12, (side - 12, side - 12, 3))
            content = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "PNG")
            meta = {"name": name, "style": style, "mode": "plain"}
            texts = {"txt": f"a {name}, {style}".encode(), "json": json.dumps(meta).encode()}
            records.append((f"{len(records):04d}", {"png": content.getvalue(), **texts}))
    write_shard(path, records)
    return str(path)
