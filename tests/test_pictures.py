"""Whatever Pillow may hand over becomes upright RGB in 8 bits, within bounded memory, or is refused in a sentence."""

from __future__ import annotations

import io
import os
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm import image_io, pictures
from ldm.data.samples import decode_picture
from ldm.data.shards import BadSample
from ldm.errors import UserError

MEGABYTE = 10**6


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def with_chunk(png: bytes, name: bytes, body: bytes, last: bool) -> bytes:
    """`png` with one more chunk: behind the header, or before the end."""
    at = len(png) - 12 if last else 33
    return png[:at] + chunk(name, body) + png[at:]


LARGE = zlib.compress(b"x" * 50 * MEGABYTE)
BESIDE = {
    "a compressed text": (b"zTXt", b"workflow\0\0" + LARGE),
    "an international text": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "a plain text": (b"tEXt", b"prompt\0" + b"x" * 5 * MEGABYTE),
    "a colour profile": (b"iCCP", b"profile\0\0" + LARGE),
    "a text that is no zlib": (b"zTXt", b"workflow\0\7" + b"x" * 100),
    "a profile that is no zlib": (b"iCCP", b"profile\0\7" + b"x" * 100),
    "a broken animation": (b"fcTL", b"x" * 30),
}


@pytest.fixture(autouse=True)
def _less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's bound of all texts together is 64 MiB; the tests need not write so many."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2 * MEGABYTE)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("what", BESIDE)
def test_what_is_beside_the_picture_never_refuses_it(what: str, last: bool, tmp_path: Path) -> None:
    red = Image.new("RGB", (40, 30), "red")
    turned = Image.Exif()
    turned[pictures.ORIENTATION] = 6
    content = with_chunk(encoded(red, exif=turned), *BESIDE[what], last)
    tracemalloc.start()
    picture = decode_picture(content)
    assert tracemalloc.get_traced_memory()[1] < 3 * len(content) + 5 * MEGABYTE  # and not what it unpacks to
    tracemalloc.stop()
    assert picture.size == (30, 40) and picture.getcolors() == [(1200, (255, 0, 0))]
    assert pictures.size(content) == (40, 30)
    (tmp_path / "a.png").write_bytes(content)
    assert pictures.read(tmp_path / "a.png").size == (30, 40)


def test_a_broken_sum_of_a_text_is_none_of_the_picture() -> None:
    content = with_chunk(encoded(Image.new("RGB", (4, 4), "red")), b"tEXt", b"a\0b", last=False)
    at = content.index(b"a\0b")
    assert decode_picture(content[:at] + b"c" + content[at + 1 :]).getpixel((0, 0)) == (255, 0, 0)
    at = content.index(b"IDAT") + 8
    with pytest.raises(BadSample, match="does not decode"):
        decode_picture(content[:at] + b"\0\0\0\0" + content[at + 4 :])


def test_settings_are_read_beside_large_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image_io.save_png(torch.zeros(3, 4, 6), path, {"prompt": "a cat", "seed": 7})
    for what in BESIDE:
        (tmp_path / "b.png").write_bytes(with_chunk(path.read_bytes(), *BESIDE[what], last=True))
        assert image_io.read_metadata(tmp_path / "b.png") == {"prompt": "a cat", "seed": 7}
    (tmp_path / "b.png").write_bytes(
        with_chunk(encoded(Image.new("L", (4, 4))), b"zTXt", b"ldm\0\0" + LARGE, last=True)
    )
    with pytest.raises(UserError, match="carries no settings"):
        image_io.read_metadata(tmp_path / "b.png")
    header = chunk(b"IHDR", (20_000).to_bytes(4, "big") * 2 + b"\1\0\0\0\0")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))
    with pytest.raises(UserError, match="more than 89478485 pixels"):
        image_io.read_metadata(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("1", 1, 255),
        ("L", 100, 100),
        ("LA", (0, 0), 255),
        ("La", (0, 0), 255),
        ("RGBA", (0, 0, 0, 0), 255),
        ("RGBa", (0, 0, 0, 0), 255),
        ("RGBX", (9, 9, 9, 0), 9),
        ("CMYK", (0, 0, 0, 255), 0),
        ("YCbCr", (100, 128, 128), 100),
        ("HSV", (0, 0, 100), 100),
        ("I;16", 257 * 100, 100),
        ("I", 65535, 255),
    ],
)
def test_every_mode_becomes_rgb(mode: str, pixel: Any, expected: int) -> None:
    made = pictures.rgb(pictures.upright(Image.new(mode, (3, 2), pixel)))
    assert made.mode == "RGB" and made.size == (3, 2) and made.getcolors() == [(6, (expected,) * 3)]


def test_sixteen_bits_round_to_nearest() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    made = np.asarray(pictures.upright(Image.fromarray(levels)))
    assert np.array_equal(made, (levels / 257).round())


def test_modes_of_unknown_range_are_refused() -> None:
    for picture in (Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 70_000), Image.new("I", (2, 2), -1)):
        with pytest.raises(pictures.BadPicture, match="convert it to 8 bits"):
            pictures.upright(picture)


def test_the_callers_picture_stays_as_it_was() -> None:
    given = Image.new("RGBA", (4, 2), (255, 0, 0, 128))
    given.getexif()[pictures.ORIENTATION] = 6
    given = Image.open(io.BytesIO(encoded(given, exif=given.getexif())))
    assert pictures.rgb(pictures.upright(given)).size == (2, 4)
    assert given.size == (4, 2) and given.mode == "RGBA" and given.getexif()[pictures.ORIENTATION] == 6


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_turns_nothing(kind: str) -> None:
    content = encoded(Image.new("RGB", (4, 2)), kind, exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert decode_picture(content).size == (4, 2) and pictures.size(content) == (2, 4)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.gif")
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "vast.png", "wb") as file:
        file.truncate(pictures.MAX_BYTES + 1)
    for name, words in {
        "missing.png": "there is no picture",
        "a\0b": "there is no picture",
        ".": "a folder",
        "empty.png": "does not decode",
        "text.png": "does not decode",
        "a.gif": "give a sound PNG, JPEG or WebP",
        "pipe": "no file of at most 1024 MiB",
        "vast.png": "no file of at most 1024 MiB",
    }.items():
        with pytest.raises(UserError, match=words):
            pictures.read(f"{tmp_path}/{name}")
