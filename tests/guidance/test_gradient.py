"""Guidance by gradients: limits, costs, the interval, and the similarity of CLIP features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.guidance import classifier_guidance, clip_guidance, cosine_similarity

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def level(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


class Counted:
    """x -> x / 2 (or x's sum for each picture), counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return x / 2

    def value(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        self.calls += 1
        return x.flatten(1).sum(dim=1)


def test_the_rules_on_known_gradients() -> None:
    """log p = sum x has the gradient 1; through D = x / 2 and decode = 3 x it is 3 / 2. Both times scale sigma^2."""
    network, judge = Counted(), Counted()
    found = classifier_guidance(network.denoise, judge.value, 0.1)(X, level(2))
    torch.testing.assert_close(found, X / 2 + 0.1 * 4)
    found = clip_guidance(network.denoise, lambda latent: 3 * latent, judge.value, 0.1)(X, level(2))
    torch.testing.assert_close(found, X / 2 + 0.1 * 4 * 1.5)
    assert (network.calls, judge.calls) == (2, 2)  # one evaluation each


def test_at_scale_zero_and_outside_the_interval_nothing_is_judged() -> None:
    for scale, interval in ((0.0, None), (1.0, (3.0, 9.0)), (1.0, (0.5, 1.0))):
        network, judge = Counted(), Counted()
        assert torch.equal(classifier_guidance(network.denoise, judge.value, scale, interval)(X, level(2)), X / 2)
        clip = clip_guidance(network.denoise, torch.tanh, judge.value, scale, interval)
        assert torch.equal(clip(X, level(2)), X / 2)
        assert (network.calls, judge.calls) == (2, 0)
    for rule in (
        lambda interval: classifier_guidance(Counted().denoise, Counted().value, 1.0, interval),
        lambda interval: clip_guidance(Counted().denoise, torch.tanh, Counted().value, 1.0, interval),
    ):
        with pytest.raises(UserError, match="low < high"):
            rule((2.0, 2.0))


def test_a_gradient_that_is_not_finite_stays_outside_the_interval() -> None:
    """A picture at a level that the classifier cannot read keeps its x0 beside one that is guided."""
    sigma = torch.tensor([1.0, 1e200], dtype=torch.float64)  # its square is infinite
    found = classifier_guidance(Counted().denoise, Counted().value, 1.0, (0.1, 10.0))(X, sigma)
    torch.testing.assert_close(found, torch.stack([X[0] / 2 + 1, X[1] / 2]))


def test_saturated_pixels_pull_nowhere() -> None:
    """A decoder that clamps, as the codec does, has no gradient where it clamps."""
    x = torch.tensor([-9.0, -0.5, 0.5, 9.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    guided = clip_guidance(lambda x, sigma: x, lambda latent: latent.clamp(-1, 1), Counted().value, 1.0)
    torch.testing.assert_close(guided(x, level(1)) - x, torch.tensor([0.0, 1, 1, 0]).double().reshape(1, 1, 2, 2))


# ---------------------------------------------------------------- CLIP


def test_the_cosine_with_the_caption() -> None:
    """Features are the mean colours, so the cosines are those of colours; pictures of other sizes are brought to 8."""
    seen = []

    def encode(image: Tensor) -> Tensor:
        seen.append(image.shape[-2:])
        return 7 * image.mean(dim=(2, 3))

    red, white = torch.tensor([1.0, 0, 0]), torch.ones(3)
    similarity = cosine_similarity(encode, 8, torch.stack([5 * red, red]))
    for side in (8, 16, 4):
        image = torch.stack([red, white])[:, :, None, None].expand(2, 3, side, side)
        torch.testing.assert_close(similarity(image), torch.tensor([1.0, 1 / math.sqrt(3)]))
    assert seen == [(8, 8)] * 3


def test_the_projects_own_clip_raises_its_own_similarity(tiny_model) -> None:
    """On a random tower and the tiny model: the guided x0-hat fits its caption better, each picture its own."""
    from ldm.conditioning.image_tower import ImageTower
    from ldm.config import ImageTowerConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = ImageTower(ImageTowerConfig(size=32, patch=8, width=32, layers=1, heads=2), 16).eval()
    tower.requires_grad_(False)
    tokens, _ = tiny_model.text.tokenize(["a red heart", "a cat"])
    similarity = cosine_similarity(tower, 32, tiny_model.text.features(tokens))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        from ldm.diffusion import precondition

        context = tiny_model.text.encode(["", ""])
        network = precondition(lambda x_in, t: tiny_model.unet(x_in, t, context), tiny_model.law)
        return network(x, sigma)

    x = 2 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        before = similarity(tiny_model.codec.decode(denoise(x, level(2))))
        guided = clip_guidance(denoise, tiny_model.codec.decode, similarity, 0.5)(x, level(2))
        after = similarity(tiny_model.codec.decode(guided))
    assert bool((after > before + 1e-4).all()), (before, after)
