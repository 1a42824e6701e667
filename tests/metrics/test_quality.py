"""PSNR and SSIM against numbers worked out by hand."""

import math

import pytest
import torch

from ldm.metrics.quality import psnr, ssim


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_error():
    a = torch.zeros(2, 3, 16, 16)
    b = torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), -0.02)])
    # 10 log10(2^2 / 0.2^2) = 20, and a tenth of the error is 20 dB more
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0], dtype=torch.float64), atol=1e-5, rtol=0)


def test_psnr_of_equal_pictures_is_infinite():
    assert psnr(noise(1, 3, 8, 8), noise(1, 3, 8, 8)).item() == math.inf


def test_ssim_of_flat_pictures_compares_their_means_alone():
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25)
    c1 = (0.01 * 2) ** 2
    by_hand = (2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert ssim(a, b).item() == pytest.approx(by_hand, abs=1e-12)


def test_ssim_of_one_window_written_out():
    """In an 11 x 11 picture the window fits once: the formula is a handful of weighted sums."""
    a, b = noise(1, 1, 11, 11, seed=1).double(), noise(1, 1, 11, 11, seed=2).double()
    b = 0.7 * a + 0.3 * b
    bell = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = torch.tensor([[u * v for v in bell] for u in bell], dtype=torch.float64)
    weight /= weight.sum()
    mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
    var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
    covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    by_hand = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    by_hand /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    assert ssim(a, b).item() == pytest.approx(by_hand.item(), abs=1e-12)


def test_ssim_is_the_mean_over_windows_and_channels():
    """A picture of 12 columns holds two windows: its figure is the mean of the two, and of three channels."""
    a, b = noise(1, 3, 11, 12, seed=3), noise(1, 3, 11, 12, seed=4)
    parts = [ssim(a[:, c : c + 1, :, i : i + 11], b[:, c : c + 1, :, i : i + 11]) for i in (0, 1) for c in range(3)]
    torch.testing.assert_close(ssim(a, b), torch.stack(parts).mean(dim=0))


def test_ssim_is_one_of_equal_pictures_and_small_of_unrelated_ones():
    a, b = noise(1, 3, 32, 32), noise(1, 3, 32, 32, seed=5)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-12)
    assert abs(ssim(a, b).item()) < 0.1


def test_each_picture_has_its_own_figure():
    a, b = noise(3, 3, 24, 24), noise(3, 3, 24, 24, seed=3)
    for measure in (psnr, ssim):
        alone = torch.cat([measure(a[i : i + 1], b[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(measure(a, b), alone)


def test_both_agree_with_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a = noise(3, 3, 40, 33, seed=1)
    b = (0.8 * a + 0.3 * noise(3, 3, 40, 33, seed=2)).clamp(-1, 1)
    for x, y, found_psnr, found_ssim in zip(a.double(), b.double(), psnr(a, b), ssim(a, b), strict=True):
        pair = x.numpy(), y.numpy()
        assert found_psnr.item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=2), abs=1e-5)
        wang = structural_similarity(
            *pair, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert found_ssim.item() == pytest.approx(wang, abs=1e-6)
