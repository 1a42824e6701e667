"""Bytes -> picture and caption, and every way in which they can be bad."""

import io
import json
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import pictures
from ldm.data import samples
from ldm.data.samples import decode, decode_picture
from ldm.data.shards import BadSample, Record, ShardReader, index_shard

from .shard_maker import picture, write_tar


def record(**fields: bytes) -> Record:
    return Record("k", "x.tar", fields)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_become_rgb(kind, mode):
    made = decode_picture(picture(1, (5, 7), kind, mode))
    assert made.mode == "RGB" and made.size == (5, 7)


def test_alpha_is_composited_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    for content in (encoded(clear, "PNG"), encoded(clear, "WEBP", lossless=True)):
        assert list(np.asarray(decode_picture(content)).reshape(-1, 3).tolist()) == [[255, 255, 255], [255, 0, 0]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert np.asarray(decode_picture(encoded(half, "PNG"))).max() == 127
    gray = Image.new("LA", (1, 1), (0, 0))
    assert np.asarray(decode_picture(encoded(gray, "PNG"))).min() == 255
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    assert np.asarray(decode_picture(encoded(palette, "PNG", transparency=0))).min() == 255


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to be upright
    assert decode_picture(encoded(image, "JPEG", exif=exif)).size == (2, 4)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(decode_picture(encoded(deep, "PNG")))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_broken_pictures_do_not_decode(kind):
    good = picture(1, (64, 64), kind)
    for content in (good[: len(good) // 2], good[:20], b"not a picture", b"\0" * 100):
        with pytest.raises(BadSample, match="does not decode"):
            decode_picture(content)


def test_noise_in_a_picture_never_raises_anything_else():
    rng = random.Random(0)
    for kind in ("PNG", "WEBP", "JPEG"):
        good = picture(2, (32, 32), kind)
        for _ in range(100):
            spoiled = bytearray(good)
            for _ in range(rng.randint(1, 20)):
                spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
            try:
                decode_picture(bytes(spoiled))
            except BadSample:
                continue


def test_other_formats_are_not_opened():
    with pytest.raises(BadSample, match="does not decode"):
        decode_picture(encoded(Image.new("RGB", (2, 2)), "GIF"))


def test_a_decompression_bomb_is_refused_before_it_is_inflated():
    for side in (10_000, 20_000):  # between Pillow's warning and its error, and beyond both
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        with pytest.raises(BadSample, match=f"more than {pictures.MAX_PIXELS} pixels"):
            decode_picture(b"\x89PNG\r\n\x1a\n" + chunk + data)


def test_a_picture_in_a_shard_has_its_size_behind_a_large_text(tmp_path):
    texts = PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    texts.add_text("prompt", "x" * samples.HEAD)
    content = encoded(Image.new("RGB", (40, 30)), "PNG", pnginfo=texts)
    index = index_shard(write_tar(tmp_path / "a.tar", [("a.png", content), ("a.txt", b"red")]))
    assert samples.picture_size(ShardReader([index]), 0, 0) == (30, 40)


def test_captions_come_from_txt_then_json_and_variants_are_drawn():
    png = picture()
    meta = json.dumps({"caption": "j", "captions": ["a", " b ", "", 3, "c"]}).encode()
    rng = random.Random(0)
    assert decode(record(png=png, txt=b" \xef\xbb\xbft\n".strip(), json=meta), "txt", rng).caption == "t"
    assert decode(record(png=png, json=meta), "txt", rng).caption == "j"
    assert decode(record(png=png, json=b'{"captions": ["a"]}'), "txt", rng).caption == "a"
    drawn = {decode(record(png=png, txt=b"t", json=meta), "variants", rng).caption for _ in range(50)}
    assert drawn == {"a", "b", "c"}
    assert decode(record(png=png, txt=b"t"), "variants", rng).caption == "t"
    assert decode(record(png=png, txt="gr\u00fcn".encode(), json=meta), "txt", rng).meta["caption"] == "j"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"txt": b"  \n"}, "the caption is empty"),
        ({"txt": "gr\u00fcn".encode("latin-1")}, "the caption is not UTF-8"),
        ({"txt": "x".encode("utf-16")}, "the caption is not UTF-8"),
        ({"json": b"{}"}, "no caption"),
        ({"json": b'{"caption": 3}'}, "no caption"),
        ({"json": b'{"caption": " "}'}, "the caption is empty"),
        ({"txt": b"t", "json": b"{"}, "the json does not parse"),
        ({"txt": b"t", "json": b"\xff\xfe\xfa"}, "the json does not parse"),
        ({"txt": b"t", "json": b"[" * 100_000}, "the json does not parse"),
        ({"txt": b"t", "json": b"[1]"}, "the json is not an object"),
    ],
)
def test_bad_captions_say_why(fields, reason):
    with pytest.raises(BadSample, match=reason):
        decode(record(png=picture(), **fields), "txt", random.Random(0))
