"""How close a decoded picture is to the original: PSNR and SSIM, one number for each picture.

Both are the mean over pictures of the figure of a picture (not the figure of the mean error), on float pictures
that went through no file format; the values of [-1, 1] span a range of 2. The formulas are torchmetrics'.
"""

from __future__ import annotations

from torch import Tensor

from ldm.conditioning.torchvision_ops import declare_missing_operators

RANGE = 2.0  # of the values of an `image`: 1 - (-1)
WINDOW = 11  # side of SSIM's, which follows from its sigma


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], (B,): 10 log10(range^2 / mean error^2).

    Equal pictures give inf.
    """
    declare_missing_operators()  # torchmetrics imports torchvision
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(a.double(), b.double(), RANGE, reduction="none", dim=(1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (B, 3, H, W) in [-1, 1], H and W at least 11, (B,); 1 for equal pictures.

    Wang et al. 2004, equation 13, with that paper's Gaussian window of 11x11 and sigma 1.5; each channel by itself,
    then the mean over channels and over the positions at which the whole window lies inside the picture. (The mean
    that torchmetrics gives by default also counts positions at the border, where it reflects the picture.)
    """
    declare_missing_operators()
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, each = structural_similarity_index_measure(
        a.double(), b.double(), data_range=RANGE, reduction="none", return_full_image=True
    )
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    return each[..., inside, inside].mean(dim=(1, 2, 3))
