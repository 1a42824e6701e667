"""Stage one's losses against values computed by hand."""

import pytest
import torch

from ldm.autoencoder.losses import AutoencoderLoss, gradient_l1
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.config import AutoencoderLossConfig


def losses(**settings) -> AutoencoderLoss:
    return AutoencoderLoss(AutoencoderLossConfig(**({"perceptual": 0.0} | settings)))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))


def posterior() -> DiagonalGaussian:
    return DiagonalGaussian(torch.full((2, 4, 4, 4), 2.0), torch.zeros(2, 4, 4, 4))  # KL: 64 * 2 nats a picture


def test_terms_add_up_with_their_weights():
    image, decoded = pair()
    module = losses(l1=2.0, gradient=0.5, kl=0.1)
    total, terms = module.reconstruction(image, decoded, posterior())
    assert set(terms) == {"l1", "gradient", "kl"}
    torch.testing.assert_close(terms["l1"], (image - decoded).abs().mean())
    torch.testing.assert_close(terms["kl"], torch.tensor(128.0))
    expected = 2 * terms["l1"] + 0.5 * terms["gradient"] + 0.1 * 128 / (3 * 16 * 16)
    torch.testing.assert_close(total, expected)


def test_perceptual_term_is_the_mean_distance():
    image, decoded = pair()
    module = losses(l1=0.0, kl=0.0, perceptual=3.0)
    assert module.perceptual is not None
    total, terms = module.reconstruction(image, decoded, posterior())
    assert set(terms) == {"perceptual"}
    torch.testing.assert_close(terms["perceptual"], module.perceptual(decoded, image).mean())
    torch.testing.assert_close(total, 3 * terms["perceptual"])


def test_gradient_term_of_a_ramp():
    image = torch.zeros(1, 3, 4, 4)
    decoded = image + 0.25 * torch.arange(4.0)  # rises to the right, level downwards
    torch.testing.assert_close(gradient_l1(image, decoded), torch.tensor(0.25))
    torch.testing.assert_close(gradient_l1(image, decoded + 7), torch.tensor(0.25))


def test_float32_under_autocast_and_terms_are_detached():
    image, decoded = pair()
    module = losses(gradient=1.0, perceptual=1.0, kl=1e-3)
    expected, _ = module.reconstruction(image, decoded, posterior())
    decoded.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = module.reconstruction(image, decoded, posterior())
    assert total.dtype == torch.float32 and all(not term.requires_grad for term in terms.values())
    torch.testing.assert_close(total, expected)
    total.backward()
    assert decoded.grad is not None and decoded.grad.abs().max() > 0


def test_hinge_values():
    module = losses()
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert module.discriminator(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert module.adversarial(torch.tensor([1.0, 3.0])).item() == -2.0
    assert module.discriminator(torch.full((4,), 1.5), torch.full((4,), -1.5)).item() == 0.0


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = 2.0 * weight.square().sum()  # gradient 4 w, norm 20
    adversarial = 0.5 * weight.sum()  # norm 0.5 sqrt 2
    got = losses().adaptive_weight(reconstruction, adversarial, weight)
    assert got.item() == pytest.approx(20 / (0.5 * 2**0.5 + 1e-4))
    assert not got.requires_grad
    (reconstruction + got * adversarial).backward()  # the graphs are still there
    assert weight.grad is not None


def test_adaptive_weight_is_clamped():
    weight = torch.ones(2, requires_grad=True)
    large, none = 1e6 * weight.sum(), 0.0 * weight.sum()
    module = losses(adaptive_max=10.0)
    assert module.adaptive_weight(large, none, weight).item() == 10.0
    assert module.adaptive_weight(none, large, weight).item() == 0.0


def test_ramp():
    module = losses(adversarial_start=100, adversarial_ramp=50)
    assert [module.ramp(step) for step in (0, 99, 100, 125, 150, 10**6)] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    sudden = losses(adversarial_start=3, adversarial_ramp=0)
    assert [sudden.ramp(step) for step in (2, 3, 4)] == [0.0, 1.0, 1.0]
