"""How close a decoded picture is to the original: PSNR and SSIM, one number for each picture.

Both are the mean over pictures of the figure of a picture (not the figure of the mean error), on float pictures
that went through no file format; the values of [-1, 1] span a range of 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RANGE = 2.0  # of the values of an `image`: 1 - (-1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], (B,): 10 log10(range^2 / mean error^2).

    Equal pictures give inf.
    """
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(RANGE**2 / error)


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5, k1: float = 0.01, k2: float = 0.03) -> Tensor:
    """Structural similarity of images (B, 3, H, W) in [-1, 1], (B,); 1 for equal pictures.

    Wang et al. 2004, equation 13, with that paper's Gaussian window of 11x11 and sigma 1.5; each channel by itself,
    then the mean over channels and over the positions at which the whole window lies inside the picture, which must be
    as large. (torchmetrics also counts positions at the border, where it reflects the picture.)
    """
    offset = torch.arange(window, dtype=torch.float64, device=a.device) - (window - 1) / 2
    bell = torch.exp(-0.5 * (offset / sigma) ** 2)
    bell = bell / bell.sum()

    def local_mean(x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H - window + 1, W - window + 1), the window applied along rows, then columns."""
        channels = x.shape[1]
        x = F.conv2d(x, bell.view(1, 1, window, 1).expand(channels, 1, window, 1), groups=channels)
        return F.conv2d(x, bell.view(1, 1, 1, window).expand(channels, 1, 1, window), groups=channels)

    a, b = a.double(), b.double()
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = local_mean(a * a) - mean_a**2
    variance_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (k1 * RANGE) ** 2, (k2 * RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))
