"""Picture -> tensor: range, geometry, and draws that do not depend on the settings."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.transforms import check, prepare, square, to_tensor
from ldm.errors import UserError


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_the_range_is_minus_one_to_one_and_the_layout_channels_first():
    pixels = np.array([[[0, 127, 255], [255, 0, 0]]], np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 1, 2) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[:, 0, 1].tolist() == [1, -1, -1]
    assert torch.equal(((tensor + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 300), (3, 5), (1, 60_000)])
def test_any_shape_becomes_the_square(size):
    tensor = prepare(ramp(*size), 8, "center", False, random.Random(0)).image
    assert tensor.shape == (3, 8, 8) and tensor.min() >= -1 and tensor.max() <= 1


def test_a_picture_of_the_right_size_is_not_touched():
    picture = ramp(8, 8)
    assert square(picture, 8) is picture


def test_the_crop_is_the_middle_or_anywhere_along_the_longer_side():
    picture = ramp(300, 100)
    center = np.asarray(square(picture, 50))
    assert abs(center[..., 0].mean() - 127.5) < 1 and center[..., 1].min() < 5 and center[..., 1].max() > 250
    assert np.asarray(square(picture, 50, 0.0))[..., 0].max() < 90
    places = [prepare(picture, 4, "random", False, random.Random(seed)).image[0].mean().item() for seed in range(40)]
    assert min(places) < -0.5 and max(places) > 0.5


def test_reducing_averages():
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (64, 32))).convert("RGB")
    assert prepare(stripes, 8, "center", False, random.Random(0)).image.abs().max() < 0.05


def test_half_are_mirrored_and_the_crop_does_not_notice():
    picture = ramp(300, 100)
    for crop in ("center", "random"):
        flips = 0
        for seed in range(100):
            plain = prepare(picture, 8, crop, False, random.Random(seed)).image
            maybe = prepare(picture, 8, crop, True, random.Random(seed)).image
            assert torch.equal(maybe, plain) or torch.equal(maybe, plain.flip(-1))
            flips += not torch.equal(maybe, plain)
        assert 30 < flips < 70


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"data.size is 0"):
        check(0, "center")
    with pytest.raises(UserError, match=r"data.crop is 'centre'; it must be one of center, random"):
        check(8, "centre")
