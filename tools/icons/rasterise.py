"""Drawing -> RGBA master, lossless WebP, square.

resvg draws (deterministic, no system fonts); where it refuses a file, librsvg through pyvips does. Finished chunks lie
in the work folder under a name that is the hash of everything they are made of, so a build that was stopped goes on
where it was, and one whose package, size or renderer changed does not reuse what is no longer true.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.errors import UserError
from ldm.files import atomic_write_bytes

from .drawings import Drawing
from .parallel import ordered_map

_CHUNK = 256  # drawings in a file of the cache
_OPAQUE_SHARE = 0.005  # of the pixels; with fewer the picture is blank
_COLOURED = 0.02  # share of a clip-art drawing's pixels that must have a colour: line art has none
_RECIPE = 2  # to be raised when the rendering below changes


def render_all(drawings: Sequence[Drawing], size: int, work: Path, processes: int) -> list[bytes | None]:
    """The WebP of each drawing, None where it cannot be drawn or is blank; what is in `work` is not drawn again.

    Args:
        size: side of the square in pixels.
        work: the cache; chunks go to work/renders.
        processes: 1 draws in this process.
    Raises UserError if no renderer is installed.
    """
    engines = _engines()
    if not engines:
        raise UserError("no SVG renderer is installed; run pip install -e '.[icons]'")
    chunks = [
        members[first : first + _CHUNK]
        for _, group in groupby(drawings, key=lambda drawing: drawing.source)
        for members in [list(group)]
        for first in range(0, len(members), _CHUNK)
    ]
    paths = [work / "renders" / f"{_fingerprint(chunk, size, engines)}.bin" for chunk in chunks]
    wanted = [(chunk, path) for chunk, path in zip(chunks, paths, strict=True) if not path.exists()]
    draw = partial(_render_chunk, size=size)
    with tqdm(total=len(drawings), unit=" drawings", desc="rendering", disable=None) as progress:
        progress.update(len(drawings) - sum(len(chunk) for chunk, _ in wanted))
        for (chunk, path), made in zip(
            wanted, ordered_map(draw, (chunk for chunk, _ in wanted), processes), strict=True
        ):
            _keep(path, made)
            progress.update(len(chunk))
    return [webp for path in paths for webp in _kept(path)]


def render(drawing: Drawing, size: int) -> bytes | None:
    """One drawing as lossless WebP, `size` pixels square; None if it cannot be drawn, is blank or is line art."""
    picture = _picture(drawing, size)
    if picture is None:
        return None
    pixels = np.asarray(picture)
    solid = pixels[..., 3] >= 128
    if solid.mean() < _OPAQUE_SHARE or (drawing.spill and not _is_coloured(pixels[solid])):
        return None
    return lossless_webp(picture)


def lossless_webp(picture: Image.Image) -> bytes:
    """WebP that decodes to the same pixels (transparent ones aside); 2.4 ms at 128 px, 7 % larger than at 11 ms."""
    out = io.BytesIO()
    picture.save(out, "WEBP", lossless=True, quality=20, method=2)
    return out.getvalue()


def thumbnail(webp: bytes, side: int) -> np.ndarray:
    """(side, side, 3) uint8: the picture on white, small, for comparing."""
    picture = Image.open(io.BytesIO(webp)).convert("RGBA")
    canvas = Image.new("RGB", picture.size, (255, 255, 255))
    canvas.paste(picture, mask=picture.getchannel("A"))
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX))


# ---------------------------------------------------------------- one picture


def _picture(drawing: Drawing, size: int) -> Image.Image | None:
    if drawing.file is not None:
        try:
            return _square(Image.open(drawing.file).convert("RGBA"), size)
        except (OSError, SyntaxError):
            return None  # torn or no picture: counted by the caller as not drawn
    if not drawing.spill:
        drawn = _draw(drawing.svg, size)
        return _square(drawn, size) if drawn is not None else None
    larger = _with_larger_page(drawing.svg)
    drawn = _draw(larger, 4 * size) if larger is not None else None
    box = drawn.getchannel("A").getbbox() if drawn is not None else None
    return _square(drawn.crop(box), size) if drawn is not None and box is not None else None


def _square(picture: Image.Image, size: int) -> Image.Image:
    """The picture in the middle of a transparent square, its longer side as long as the square's."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    canvas.paste(picture, ((size - width) // 2, (size - height) // 2))
    return canvas


def _is_coloured(pixels: np.ndarray) -> bool:
    """Whether enough of (N, 4) pixels are further than 24 of 255 from gray."""
    rgb = pixels[:, :3].astype(int)
    return bool((rgb.max(axis=1) - rgb.min(axis=1) > 24).mean() > _COLOURED)


_UNITS = {"": 1.0, "px": 1.0, "pt": 4 / 3, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}


def _with_larger_page(svg: str) -> str | None:
    """The document with a page of twice the side around the same middle; None if it does not say how large it is."""
    root = re.search(r"<(?:svg:)?svg\b[^>]*>", svg)
    if root is None:
        return None
    tag = root[0]
    found = {name: value for name, _, value in re.findall(r"\s(viewBox|width|height)\s*=\s*(['\"])(.*?)\2", tag)}
    box = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", found.get("viewBox", ""))]
    if len(box) != 4:
        sides = [re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", found.get(name, "")) for name in ("width", "height")]
        if any(side is None or side[2] not in _UNITS for side in sides):
            return None
        box = [0.0, 0.0, *(float(side[1]) * _UNITS[side[2]] for side in sides if side is not None)]
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return None
    bare = re.sub(r"\s(viewBox|width|height|overflow|preserveAspectRatio)\s*=\s*(['\"]).*?\2", "", tag)
    page = (
        f' viewBox="{left - width / 2} {top - height / 2} {2 * width} {2 * height}" width="{width}" height="{height}"'
    )
    opening = bare.removesuffix(">").removesuffix("/") + page + ' overflow="visible">'
    return svg[: root.start()] + opening + svg[root.end() :]


# ---------------------------------------------------------------- renderers


@cache
def _engines() -> tuple[str, ...]:
    """Names with versions of the renderers that are installed, the preferred one first."""
    found = []
    for package in ("resvg_py", "pyvips"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _draw(svg: str, size: int) -> Image.Image | None:
    """SVG text -> RGBA picture whose longer side is `size`, by the first renderer that takes it."""
    for engine in _engines():
        try:
            drawn = _by_resvg(svg, size) if engine.startswith("resvg") else _by_librsvg(svg, size)
        except _refusals():
            continue
        return drawn.convert("RGBA")
    return None


@cache
def _refusals() -> tuple[type[Exception], ...]:
    """What the renderers raise for a document they cannot draw."""
    kinds: list[type[Exception]] = [ValueError, OSError, RuntimeError]
    if any(engine.startswith("pyvips") for engine in _engines()):
        import pyvips

        kinds.append(pyvips.Error)
    return tuple(kinds)


def _by_resvg(svg: str, size: int) -> Image.Image:
    import resvg_py

    width, height = _proportions(svg)
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size if width >= height else None,
        height=size if width < height else None,
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(png)))


def _by_librsvg(svg: str, size: int) -> Image.Image:
    import pyvips

    drawn = pyvips.Image.thumbnail_buffer(svg.encode(), size, height=size)
    return Image.open(io.BytesIO(drawn.write_to_buffer(".png")))


def _proportions(svg: str) -> tuple[float, float]:
    found = re.search(r"viewBox\s*=\s*['\"]\s*\S+[\s,]+\S+?[\s,]+([\d.]+)[\s,]+([\d.]+)", svg)
    return (float(found[1]), float(found[2])) if found else (1.0, 1.0)


# ---------------------------------------------------------------- the cache


def _render_chunk(chunk: Iterable[Drawing], size: int) -> list[bytes | None]:
    return [render(drawing, size) for drawing in chunk]


def _fingerprint(chunk: Iterable[Drawing], size: int, engines: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps([_RECIPE, size, engines, importlib.metadata.version("pillow")]).encode())
    for drawing in chunk:
        picture = drawing.file.read_bytes() if drawing.file is not None else drawing.svg.encode()
        digest.update(f"{drawing.source} {drawing.id} {drawing.spill} {len(picture)} ".encode() + picture)
    return digest.hexdigest()[:32]


def _keep(path: Path, drawn: Sequence[bytes | None]) -> None:
    """A line of JSON with the lengths (-1: not drawn), then the files end to end."""
    lengths = [-1 if webp is None else len(webp) for webp in drawn]
    atomic_write_bytes(path, json.dumps(lengths).encode() + b"\n" + b"".join(webp or b"" for webp in drawn))


def _kept(path: Path) -> list[bytes | None]:
    head, _, body = path.read_bytes().partition(b"\n")
    found: list[bytes | None] = []
    at = 0
    for length in json.loads(head):
        found.append(None if length < 0 else body[at : at + length])
        at += max(0, length)
    return found
