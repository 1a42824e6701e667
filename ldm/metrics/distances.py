"""How far two sets of pictures are apart, on their features (N, D). The formulas are torch-fidelity's."""

from __future__ import annotations

from torch import Tensor

from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (N, D), (M, D): |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    Heusel et al. 2017, equation 6. It is biased upwards when N or M is small: only figures of equal counts compare,
    and below D pictures the covariances are singular. Raises UserError for fewer than 2 pictures.
    """
    declare_missing_operators()  # torch-fidelity imports torchvision
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    if min(len(a), len(b)) < 2:
        raise UserError(f"a Frechet distance of {len(a)} and {len(b)} pictures has no covariance; give at least 2")
    statistics = [fid_features_to_statistics(features.double().cpu()) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel(a: Tensor, b: Tensor, subsets: int = 100, size: int = 100, seed: int = 2020) -> tuple[float, float]:
    """Kernel distance (KID): mean and deviation over `subsets` random subsets of `size` pictures of each set.

    The unbiased estimate of MMD^2 with the kernel (x y / D + 1)^3 (Binkowski et al. 2018, section 4), so sets of
    different counts compare. Raises UserError if a set has fewer pictures than a subset takes.
    """
    declare_missing_operators()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if min(len(a), len(b)) < size:
        raise UserError(
            f"subsets of {size} pictures were asked for, of sets of {len(a)} and {len(b)}; choose a smaller subset"
        )
    found = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
