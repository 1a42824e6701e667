"""The perceptual distance: zero for equal pictures, ordered by damage, frozen."""

import builtins
import functools
import urllib.error

import pytest
import torch
import torch.nn.functional as F

from ldm.autoencoder.perceptual import build_perceptual
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError


@pytest.fixture(scope="module")
def distance():
    return build_perceptual("efficientnet-lite0")


@pytest.fixture
def image() -> torch.Tensor:
    """(2, 3, 64, 64): discs of two colours on white"""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = ((x**2 + y**2) < 0.5).float()
    colours = torch.tensor([[0.9, -0.8, -0.7], [-0.6, 0.1, 0.9]])[:, :, None, None]
    return disc * colours + (1 - disc)


def test_equal_pictures_are_at_distance_zero(distance, image):
    assert distance(image, image).tolist() == [0.0, 0.0]


def test_more_damage_is_farther(distance, image):
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    little, much, other = (distance(b, image) for b in (image + 0.02 * noise, image + 0.2 * noise, image.flip(0)))
    assert (little > 0).all() and (much > 2 * little).all() and (other > 0.05).all() and (much < 4).all()


def test_blur_weighs_more_than_as_much_brightness(distance, image):
    blurred = F.avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)
    brighter = image - (blurred - image).abs().mean()
    assert (distance(blurred, image) > distance(brighter, image)).all()


def test_gradients_flow_to_the_first_picture_only(distance, image):
    a, b = (image + 0.1).requires_grad_(), image.clone().requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().max() > 0
    assert b.grad is None


def test_it_stays_frozen(distance, image):
    before = distance(image, image.flip(0))
    distance.train()
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert torch.equal(distance(image, image.flip(0)), before)


def test_float32_under_autocast(distance, image):
    before = distance(image, image.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        after = distance(image.bfloat16(), image.flip(0).bfloat16())
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 70), (128, 96)])
def test_any_size(distance, height, width):
    a, b = torch.zeros(1, 3, height, width), torch.ones(1, 3, height, width)
    assert distance(a, b).shape == (1,) and distance(a, b).isfinite().all()


def test_folding_the_norms_changes_nothing(distance, image):
    """The first taps against the classifier as its package runs it."""
    from ldm.autoencoder.perceptual import IMAGENET_MEAN, IMAGENET_STD, efficientnet_lite0

    network = efficientnet_lite0().eval()
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        x = network._swish(network._bn0(network._conv_stem(((image + 1) / 2 - mean) / std)))
        for block in network._blocks[:3]:
            x = block(x)
    torch.testing.assert_close(distance.features(image)[1], F.normalize(x, dim=1), rtol=1e-3, atol=1e-4)


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match="efficientnet-lite0"):
        build_perceptual("vgg19")


def test_lpips_missing_is_one_sentence(monkeypatch):
    original = builtins.__import__

    def without_lpips(name, *rest, **named):
        if name == "lpips":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_lpips)
    with pytest.raises(UserError, match="pip install"):
        build_perceptual("lpips")


@pytest.fixture
def lpips():
    declare_missing_operators()
    return pytest.importorskip("lpips")


def test_lpips_has_the_same_interface(monkeypatch, lpips, image):
    """With a random backbone, since the trained one is a download."""
    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
    distance = build_perceptual("lpips").train()
    a, b = image.flip(0).requires_grad_(), image.clone().requires_grad_()
    found = distance(a, b)
    found.sum().backward()
    assert found.shape == (2,) and (found > 0).all()
    assert a.grad is not None and a.grad.abs().max() > 0 and b.grad is None
    assert not any(module.training for module in distance.modules())
    assert distance(image, image).tolist() == [0.0, 0.0]


def test_lpips_without_its_backbone_is_one_sentence(monkeypatch, lpips):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(UserError, match="efficientnet-lite0"):
        build_perceptual("lpips")
