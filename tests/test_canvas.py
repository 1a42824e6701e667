"""What is drawn of a picture: its own pixels stay as they were in the file, whatever part of it is drawn and how."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ldm import canvas, generate, pictures, redraw
from ldm.api import LatentDiffusion, PictureNotice, assemble
from ldm.errors import UserError
from ldm.guidance import windows
from ldm.image_io import to_pil
from ldm.inputs import as_images
from ldm.jobs import Request, Settings
from ldm.start import Noise, Picture
from ldm.unet import UNet

PLAN = Settings(steps=2, cfg=1.0).plan()


def noisy(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture in which all 256 levels come up."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def area(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., rows, columns] = 1
    return mask


def drawn(model: LatentDiffusion, made: canvas.Canvas, strength: float = 1.0, count: int = 1) -> Tensor:
    requests = [Request("a cat", seed=seed) for seed in range(count)]
    return made.finish(generate.draw(model, requests, PLAN, picture=made.start(strength, count)))


# ---------------------------------------------------------------- strength and size


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m", "heun", "lcm"])
def test_at_strength_1_it_is_txt2img_and_at_0_the_round_trip(tiny_model: LatentDiffusion, sampler: str) -> None:
    image = as_images(noisy(32, 32))
    again = tiny_model.img2img(image, "a cat", strength=1, steps=3, seed=4, sampler=sampler)
    assert torch.equal(again, tiny_model.txt2img("a cat", steps=3, seed=4, sampler=sampler))
    same = tiny_model.img2img(image, "a cat", strength=0, steps=3, seed=4, sampler=sampler)
    with torch.no_grad():
        assert torch.equal(same, tiny_model.codec.decode(tiny_model.codec.encode(image)))


def test_all_steps_are_run_and_strength_is_continuous(tiny_model: LatentDiffusion) -> None:
    image, requests, plan = as_images(noisy(32, 32)), [Request("a cat")], Settings(steps=20, cfg=1.0).plan()

    def of(strength: float) -> Tensor:
        steps = list(generate.sample(tiny_model, requests, plan, start=Picture(image, strength)))
        assert len(steps) == 20
        return steps[-1].x

    near, far = (float((of(0.5) - of(0.5 + change)).abs().max()) for change in (1e-4, 0.1))
    assert 0 < near < 0.05 * far, "0.834 and 0.843 are two pictures, and near each other"


@pytest.mark.parametrize(("height", "width"), [(33, 47), (64, 65), (9, 32), (10, 11)])
def test_any_size_is_drawn_and_comes_back_as_it_was(tiny_model: LatentDiffusion, height: int, width: int) -> None:
    image = noisy(height, width)
    with pytest.warns(PictureNotice, match=f"{width} x {height} pixels.*multiples of 4.*cropped back"):
        assert tiny_model.img2img(image, "a cat", steps=2, cfg=1).shape == (1, 3, height, width)
    mask = np.zeros((height, width), bool)
    mask[: height // 2] = True
    with pytest.warns(PictureNotice):
        painted = tiny_model.img2img(image, "a cat", mask=mask, strength=1, steps=2, cfg=1)
    assert np.array_equal(np.array(to_pil(painted[0]))[~mask], image[~mask])


def test_a_picture_that_is_too_small(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="the picture is 7 x 40 pixels; choose one of 8 or more either way"):
        tiny_model.img2img(noisy(40, 7), "a cat", steps=2)


# ---------------------------------------------------------------- masks


@settings(deadline=None, max_examples=30)
@given(pixels=st.integers(0, 9), seed=st.integers(0, 99))
def test_a_feathered_edge_rises_to_the_inside(pixels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    top, left = random.integers(0, 20, 2)
    mask = area(40, 40, slice(top, top + random.integers(1, 20)), slice(left, left + random.integers(1, 20)))
    soft = canvas.feathered(mask, pixels)
    assert bool((soft[mask == 0] == 0).all()) and bool((soft[mask == 1] > 0).all()) and float(soft.max()) <= 1
    assert torch.equal(canvas.feathered(torch.ones(1, 1, 8, 8), pixels), torch.ones(1, 1, 8, 8)), "no edge there"
    assert float(canvas.feathered(mask, 10**9).max()) < 1e-6, "at once, whatever the number"


def test_a_feathered_edge_is_a_ramp() -> None:
    mask = area(9, 40, slice(None), slice(10, 40))
    ramp = canvas.feathered(mask, 3)[0, 0, 4, 8:16]
    torch.testing.assert_close(ramp, torch.tensor([0, 0, 0.25, 0.5, 0.75, 1, 1, 1]))


@pytest.mark.parametrize("only_masked", [None, 0, 3])
@pytest.mark.parametrize("feather", [0, 2])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_bytes_outside_the_mask_stay(
    tiny_model: LatentDiffusion, tmp_path: Path, only_masked: int | None, feather: int, strength: float
) -> None:
    image, mask = noisy(48, 64), area(48, 64, slice(10, 17), slice(30, 45))
    made = canvas.make(as_images(image), mask, feather=feather, only_masked=only_masked, size=(32, 32))
    painted = drawn(tiny_model, made, strength, count=2)
    assert painted.shape == (2, 3, 48, 64) and not torch.equal(painted[0], painted[1])
    to_pil(painted[0]).save(tmp_path / "a.png")
    levels, outside = np.array(Image.open(tmp_path / "a.png")), mask[0, 0].numpy() == 0
    assert np.array_equal(levels[outside], image[outside])
    assert float((levels[~outside] != image[~outside]).mean()) > 0.5


def test_a_network_of_nine_channels_is_given_mask_and_picture_of_any_size(tiny_model: LatentDiffusion) -> None:
    assert tiny_model.config.unet
    config = dataclasses.replace(tiny_model.config.unet, in_channels=9)
    unet = UNet(config).eval().requires_grad_(False)
    model = assemble(dataclasses.replace(tiny_model.config, unet=config), tiny_model.codec, tiny_model.towers, unet)
    image, mask = noisy(30, 42), area(30, 42, slice(8, 20), slice(8, 20))
    made = canvas.make(as_images(image), mask, feather=2)
    painted, outside = np.array(to_pil(drawn(model, made)[0])), mask[0, 0].numpy() == 0
    assert np.array_equal(painted[outside], image[outside]) and not np.array_equal(painted, image)


@pytest.mark.parametrize(
    ("mask", "padding", "box", "size"),
    [
        (area(100, 100, slice(40, 50), slice(40, 50)), 3, (37, 53, 37, 53), (32, 32)),  # enlarged twofold
        (area(100, 100, slice(0, 4), slice(0, 4)), 2, (0, 6, 0, 6), (32, 32)),  # at the picture's corner
        (area(100, 100, slice(50, 52), slice(10, 30)), 0, (41, 61, 10, 30), (32, 32)),  # made as high as wide
        (area(100, 100, slice(98, 100), slice(10, 30)), 0, (80, 100, 10, 30), (32, 32)),
        (area(100, 100, slice(0, 80), slice(0, 90)), 5, (0, 95, 0, 95), (95, 95)),  # large enough as it is
        (area(10, 100, slice(2, 4), slice(20, 80)), 0, (0, 10, 20, 80), (10, 60)),  # no room to be square
    ],
)
def test_the_neighbourhood_of_a_mask(
    mask: Tensor, padding: int, box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    (rows, columns), found = canvas.neighbourhood(mask, padding, (32, 32))
    assert (rows.start, rows.stop, columns.start, columns.stop) == box and found == size


def test_a_picture_is_extended_by_what_is_drawn(tiny_model: LatentDiffusion) -> None:
    image = noisy(32, 32)
    made = canvas.make(as_images(image), extend=(4, 40, 0, 8))  # 40 is more than the picture has to reflect
    assert made.mask is not None and made.image.shape == (1, 3, 40, 76)
    painted = np.array(to_pil(drawn(tiny_model, made)[0]))
    assert np.array_equal(painted[:32, 4:36], image)
    again = canvas.make(as_images(image), area(32, 32, slice(0, 5), slice(0, 5)), extend=(0, 4, 0, 0))
    assert again.mask is not None and float(again.mask.sum()) == 25 + 4 * 32, "a mask of one's own is drawn too"


def test_what_is_transparent_is_the_mask() -> None:
    levels = np.concatenate([noisy(8, 8), np.full((8, 8, 1), 255, np.uint8)], axis=2)
    image, mask = canvas.cut_out(pictures.upright(Image.fromarray(levels)))
    assert mask is None and torch.equal(image, as_images(levels[..., :3]))
    levels[:2, :, 3], levels[2:4, :, 3] = 0, 51
    image, mask = canvas.cut_out(pictures.upright(Image.fromarray(levels)))
    assert mask is not None and mask[0, 0, :, 0].tolist() == pytest.approx([1, 1, 0.8, 0.8, 0, 0, 0, 0])
    assert torch.equal(image[..., 2:, :], as_images(levels[2:, :, :3])) and bool((image[..., :2, :] == 1).all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": torch.zeros(1, 1, 32, 32)}, "black everywhere"),
        ({"feather": 3}, "no mask to feather"),
        ({"only_masked": 3}, "no mask to feather"),
        ({"mask": torch.ones(1, 1, 32, 32), "feather": -1}, "feather is -1"),
        ({"mask": torch.ones(1, 1, 32, 32), "only_masked": -1, "size": (32, 32)}, "only_masked is -1"),
        ({"extend": (1, 2)}, "extend is"),
        ({"extend": (0, -2, 0, 0)}, "extend is"),
        ({"extend": (0, 10**6, 0, 0)}, "extend it less"),
    ],
)
def test_canvases_that_make_no_sense(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        canvas.make(torch.zeros(1, 3, 32, 32), **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- windows


def test_windows_are_the_denoiser_where_it_looks_at_a_point_alone() -> None:
    x, sigma = torch.randn(2, 4, 21, 16, dtype=torch.float64), torch.tensor(2.0)
    seen = []

    def pointwise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.sin() / sigma

    torch.testing.assert_close(windows(pointwise, 8, 2)(x, sigma), x.sin() / sigma, rtol=0, atol=1e-6)
    assert set(seen) == {(2, 4, 8, 8)}


def test_a_large_picture_is_drawn_in_windows(tiny_model: LatentDiffusion) -> None:
    image, seen = as_images(noisy(64, 48)), []
    hook = tiny_model.unet.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[2:])))
    try:
        made = generate.draw(tiny_model, [Request("a cat")], PLAN, picture=Picture(image, 0.5, window=32))
        whole = generate.draw(tiny_model, [Request("a cat")], PLAN, picture=Picture(image, 0.5, window=64))
    finally:
        hook.remove()
    assert made.shape == (1, 3, 64, 48) and set(seen) == {(8, 8), (16, 12)}
    assert torch.equal(whole, generate.draw(tiny_model, [Request("a cat")], PLAN, picture=Picture(image, 0.5)))
    with pytest.raises(UserError, match="a window of 30 pixels does not fit"):
        generate.draw(tiny_model, [Request("a cat")], PLAN, picture=Picture(image, 0.5, window=30))


def test_both_starts_have_notices(tiny_model: LatentDiffusion) -> None:
    assert Noise().notices(tiny_model) == Picture(torch.zeros(1, 3, 32, 32)).notices(tiny_model) == ()


def test_one_side_asked_of_a_narrow_picture_makes_no_endless_other() -> None:
    assert redraw.size_of((40, 30), (None, 20)) == (15, 20) and redraw.size_of((40, 30), (60, None)) == (60, 80)
    for asked in ((None, 16_000), (16_000, 16_000)):
        with pytest.raises(UserError, match="choose a smaller --width or --height"):
            redraw.size_of((10, 10_000), asked)
