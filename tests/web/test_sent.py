"""Pictures that a client sends: drawn again, or a part of them, as the commands do; bounded before they are opened."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm import canvas, provenance
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.web.drawing import Stop, draw
from ldm.web.job import read
from ldm.web.limits import Limits
from web.conftest import Answer, Server, pixels, serving


def png(width: int = 48, height: int = 40, seed: int = 0, mode: str = "RGB") -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(levels).convert(mode).save(content, "PNG")
    return content.getvalue()


def spot(width: int = 48, height: int = 40) -> bytes:
    levels = np.zeros((height, width), np.uint8)
    levels[8:20, 12:30] = 255
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    return content.getvalue()


def parts(server: Server, job: dict[str, Any], accept: str = "image/png", **files: bytes) -> Answer:
    content = f'--xx\r\nContent-Disposition: form-data; name="job"\r\n\r\n{json.dumps({"steps": 2} | job)}\r\n'.encode()
    for name, file in files.items():
        head = f'--xx\r\nContent-Disposition: form-data; name="{name}"; filename="/etc/{name}"\r\n\r\n'
        content += head.encode() + file + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=xx", "Accept": accept}
    return server.ask("/api/draw", content + b"--xx--\r\n", headers)


def test_a_picture_drawn_again_is_the_librarys(server: Server, tiny_model: Any):
    image = png(seed=3)
    answer = parts(server, {"prompt": "a cat", "seed": 4, "cfg": 2}, image=image)
    settings = Settings(steps=2, cfg=2, prompt_syntax="weighted")
    drawn = tiny_model.img2img(Image.open(io.BytesIO(image)), "a cat", seed=4, strength=0.75, settings=settings)
    assert np.array_equal(pixels(answer.body), np.asarray(ldm.to_pil(drawn[0])))
    recipe = provenance.read(answer.body)
    assert recipe.begin.strength == 0.75 and set(recipe.inputs) == {"init"} and recipe.settings.width == 48
    told = server.ask("/api/recipe", answer.body).json
    assert told["settings"]["strength"] == 0.75 and "began with a picture" in told["notices"][0]


def test_in_json_pictures_are_base64(server: Server):
    image, mask = png(), spot()
    job = {"seed": 4, "steps": 2}
    whole = server.draw(**job, image=b64encode(image).decode(), mask=b64encode(mask).decode())
    assert whole.body == parts(server, job, image=image, mask=mask).body
    assert "base64" in server.draw(**job, image="/etc/passwd!").error


@pytest.mark.parametrize("more", [{}, {"feather": 3}, {"only_masked": 4}, {"strength": 0.5}])
def test_outside_the_mask_every_byte_stays(server: Server, more: dict[str, Any]):
    image, mask = png(seed=1), spot()
    drawn = pixels(parts(server, {"seed": 1} | more, image=image, mask=mask).body)
    outside = np.asarray(Image.open(io.BytesIO(mask))) == 0
    assert np.array_equal(drawn[outside], pixels(image)[outside])
    assert (drawn[~outside] != pixels(image)[~outside]).mean() > 0.5


def test_what_lies_beyond_the_edges_is_drawn_and_the_picture_stays(server: Server):
    image = png(seed=2)
    drawn = pixels(parts(server, {"seed": 1, "extend": [0, 16, 8, 0]}, image=image).body)
    assert drawn.shape == (48, 64, 3) and np.array_equal(drawn[8:, :48], pixels(image))


def test_feathering_ends_with_the_time(shelf: Any, monkeypatch: pytest.MonkeyPatch):
    """It has begun, and does not come to its end."""
    worn: list[int] = []
    pool, stop = canvas.F.max_pool2d, Stop(600)

    def slow(*given: Any, **more: Any) -> Any:
        worn.append(1)
        stop._end = 0.0  # as after so many seconds
        return pool(*given, **more)

    monkeypatch.setattr(canvas.F, "max_pool2d", slow)
    job = read({"steps": 2, "feather": 3}, {"image": png(), "mask": spot()})
    with pytest.raises(UserError, match="longer than 600 seconds"):
        draw(job, shelf, stop, lambda _: None)
    assert len(worn) == 1


def test_previews_show_the_whole_picture(server: Server, monkeypatch: pytest.MonkeyPatch):
    from base64 import b64decode

    monkeypatch.setattr("ldm.web.drawing.OFTEN", 0.0)
    monkeypatch.setattr("ldm.web.drawing.SHARE", 1e9)
    image = png(seed=2)
    events = parts(server, {"only_masked": 4, "steps": 4}, "text/event-stream", image=image, mask=spot()).events
    shown = next(data["previews"][0] for name, data in events if name == "walked" and data["previews"])
    preview = Image.open(io.BytesIO(b64decode(shown)))
    assert preview.size == (48, 40)
    near = abs(np.asarray(preview).astype(float) - pixels(image)).mean(2)
    assert near[24:].mean() < near[8:20, 12:30].mean()  # JPEG, so not to the byte


@pytest.mark.parametrize(
    ("job", "files", "said"),
    [
        ({}, {"mask": spot()}, "mask is of a picture to begin from"),
        ({"extend": [0, 8, 0, 0]}, {}, "extend is of a picture"),
        ({"strength": 0.5}, {}, "strength is of a picture"),
        ({}, {"image": b"no picture"}, "image: the picture does not decode"),
        ({}, {"image": png()[:300]}, "image: the picture does not decode"),
        ({}, {"image": png(), "mask": spot(40, 40)}, "not of the picture's size"),
        ({}, {"image": png(), "mask": png(mode="L")[:99]}, "mask: the picture does not decode"),
        ({"strength": 2}, {"image": png()}, "strength is 2"),
        ({"extend": [1, 2]}, {"image": png()}, "extend is 1,2"),
        ({"extend": [0, 0, 0, 2000]}, {"image": png()}, "limit is 1024"),
        ({"enlarge": 16, "width": 1000}, {"image": png()}, "limit is 1024"),
        ({"enlarge": 16, "width": 1000, "strength": 0.5}, {}, "limit is 1024"),
        ({"enlarge": 16, "width": 32, "height": 1000, "strength": 0.5}, {}, "limit is 1024"),
        ({"feather": 129}, {"image": png(), "mask": spot()}, "limit is 128"),
        ({"feather": 10**9}, {"image": png(), "mask": spot()}, "feather"),
        ({"width": 1000, "only_masked": 4}, {"image": png(8, 400), "mask": spot(8, 400)}, "would be drawn"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_pictures_that_make_no_sense(server: Server, job: dict[str, Any], files: dict[str, bytes], said: str):
    answer = parts(server, job, **files)
    assert answer.status == 400 and said in answer.error, answer.body


def test_a_mask_of_nothing_is_told(server: Server):
    content = io.BytesIO()
    Image.new("L", (48, 40)).save(content, "PNG")
    assert "nothing to draw" in parts(server, {}, image=png(), mask=content.getvalue()).error


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(shelf: Any):
    content = io.BytesIO()
    Image.new("1", (9000, 9000)).save(content, "PNG")
    with serving(shelf, limits=Limits(most_pixels=10**6)) as server:
        assert "81,000,000 pixels" in parts(server, {}, image=content.getvalue()).error
        assert parts(server, {}, image=png()).status == 200
