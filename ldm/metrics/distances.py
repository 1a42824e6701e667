"""How far two sets of pictures are apart, on features (N, D). Where a kept library has the formula, it is used."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError
from ldm.metrics.moments import Moments

KERNEL_SEED = 2020  # of the kernel distance's subsets, as torch-fidelity has it
SCORE_SEED = 2020  # of the order in which pictures are put into the Inception Score's parts, likewise
CMMD_SIGMA = 10.0  # of the Gaussian kernel on unit vectors, as in the paper; the figure is given times 1000
ROWS = 256  # of the table of all pairs that are held at once
COLUMNS = 4096  # of it that are made at once: for these many pictures torch.cdist copies the features


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (N, D), (M, D); see `frechet_of`."""
    return frechet_of(Moments.of(a), Moments.of(b))


def frechet_of(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); Heusel et al. 2017, equation 6, by torch-fidelity.

    It is biased upwards when the counts are small: only figures of equal counts compare, and below D pictures the
    covariances are singular. Raises UserError for fewer than 2 pictures.
    """
    declare_missing_operators()  # torch-fidelity imports torchvision
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if min(a.count, b.count) < 2:
        raise UserError(f"a Frechet distance needs at least 2 pictures on each side, not {a.count} and {b.count}")
    statistics = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel(a: Tensor, b: Tensor, subsets: int = 100, size: int = 100, seed: int = KERNEL_SEED) -> tuple[float, float]:
    """Kernel distance (KID): mean and deviation over `subsets` random subsets of `size` pictures of each set.

    The unbiased estimate of MMD^2 with the kernel (x y / D + 1)^3 (Binkowski et al. 2018, section 4), so sets of
    different counts compare. Raises UserError if a set has fewer pictures than a subset takes.
    """
    declare_missing_operators()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    check_subset(len(a), len(b), size)
    rng, found = np.random.RandomState(seed), []
    for _ in range(subsets):  # float64 for one subset at a time: of all features it would be gigabytes
        chosen = [x[torch.from_numpy(rng.choice(len(x), size, replace=False))].double() for x in (a, b)]
        estimate = kid_features_to_metric(*chosen, kid_subsets=1, kid_subset_size=size, verbose=False)
        found.append(estimate[KEY_METRIC_KID_MEAN])
    return float(np.mean(found)), float(np.std(found))


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL between p(y | x) and p(y) over the logits (N, K): mean and deviation over `splits` parts.

    Salimans et al. 2016, section 4, by torch-fidelity. The parts are those of a shuffled order, always the same, and
    each has its own p(y): as many parts as pictures give 1. It looks at no real picture. Raises UserError for fewer
    pictures than parts.
    """
    declare_missing_operators()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    check_splits(len(logits), splits)
    count, found = len(logits), []
    order = torch.from_numpy(np.random.RandomState(SCORE_SEED).permutation(count))
    for i in range(splits):  # each by itself, or float64 tables of all of them would be held
        part = logits[order[i * count // splits : (i + 1) * count // splits]]
        found.append(isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN])
    return float(np.mean(found)), float(np.std(found))


def precision_recall(drawn: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of the drawn that lie among the real, and of the real that lie among the drawn (Kynkaanniemi et al. 2019).

    A feature vector lies among a set if it is no further from one of its members than that one's `neighbours`-th
    nearest other member: the balls are closed, as in that paper's equation 1. Raises UserError for smaller
    sets.
    """
    declare_missing_operators()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    check_neighbours(len(drawn), len(real), neighbours)
    # In parts, or the table of all pairs would be held whole.
    found = prc_features_to_metric(
        drawn.float(), real.float(), prc_neighborhood=neighbours, prc_batch_size=ROWS, save_cpu_ram=True, verbose=False
    )
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])


def density_coverage(drawn: Tensor, real: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """Naeem et al. 2020, equations 4 and 6, on balls around the real pictures only, so that outliers among the drawn
    widen nothing. A ball reaches to its picture's `neighbours`-th nearest other real one and is open, as in the code of
    the authors: a drawn picture at just that distance lies outside.

    Density: in how many balls a drawn picture lies on the mean, over `neighbours` (1 for equal laws, may be more).
    Coverage: the share of balls that hold a drawn picture. Raises UserError for smaller sets.
    """
    check_neighbours(len(drawn), len(real), neighbours)
    drawn, real = drawn.float(), real.float()
    inside, covered = 0, 0
    for part in real.split(ROWS):
        radius = _pairs(part, real).kthvalue(neighbours + 1, dim=1, keepdim=True).values
        held = _pairs(part, drawn) < radius
        inside += int(held.sum())
        covered += int(held.any(dim=1).sum())
    return inside / (neighbours * len(drawn)), covered / len(real)


def cmmd(a: Tensor, b: Tensor, sigma: float = CMMD_SIGMA) -> float:
    """CLIP maximum mean discrepancy of joint-space features (N, D), (M, D), times 1000 (Jayasumana et al. 2024).

    The unbiased estimate of MMD^2 (equation 4 there) with the kernel exp(-|x - y|^2 / (2 sigma^2)) on unit vectors. The
    authors' own code has the biased estimate, which counts each picture with itself and so is larger by about
    1000 (1 - mean kernel) (1 / N + 1 / M): with few pictures its figures do not compare with these.
    Needs no Gaussian to fit and far fewer pictures than a Frechet distance. Raises UserError for fewer than 2 pictures.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"the kernel distance of {len(a)} and {len(b)} pictures is not defined; give at least 2")
    return 1000 * gaussian_mmd(F.normalize(a, dim=1), F.normalize(b, dim=1), sigma)


def gaussian_mmd(a: Tensor, b: Tensor, sigma: float) -> float:
    """Unbiased estimate of MMD^2 between (N, D) and (M, D), the kernel exp(-|x - y|^2 / (2 sigma^2)), in float64."""

    def total(x: Tensor, y: Tensor) -> float:
        parts = (_pairs(part.double(), y).square_().mul_(-1 / (2 * sigma**2)) for part in x.split(ROWS))
        return sum(float(part.exp_().sum()) for part in parts)

    n, m = len(a), len(b)
    within = (total(a, a) - n) / (n * (n - 1)) + (total(b, b) - m) / (m * (m - 1))  # a picture and itself: exp(0)
    return within - 2 * total(a, b) / (n * m)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """100 times the mean of max(cosine, 0) between features of pictures and of their captions, both (N, D).

    Hessel et al. 2021, equation 1, with the weight 100 that is usual since, not the paper's 2.5.
    """
    parts = zip(images.split(ROWS), texts.split(ROWS), strict=True)
    cosines = [F.cosine_similarity(image.double(), text.double(), dim=1) for image, text in parts]
    return 100 * float(torch.cat(cosines).clamp(min=0).mean())


def retrieval(images: Tensor, texts: Tensor, own: Tensor) -> tuple[float, float]:
    """Share of pictures (N, D) whose caption, texts[own[i]] of (K, D), is the nearest, and among the nearest five.

    The R-precision of Xu et al. 2018 among all K. A tie counts against the picture: a caption that two others are as
    near as is third. So of five captions or fewer all are among the nearest five.
    """
    places = ranks(images, own, F.normalize(texts.double(), dim=1))
    return float((places == 0).double().mean()), float((places < 5).double().mean())


def ranks(features: Tensor, concepts: Tensor, prototypes: Tensor) -> Tensor:
    """How many prototypes (K, D) are nearer to each feature (N, D) than that of its own concept (N,): 0 is a hit, (N,).

    A tie counts against the picture, so a constant feature scores 0, not 100 %. Computed in the prototypes' precision.
    """
    found = []
    for part, own in zip(features.split(ROWS), concepts.split(ROWS), strict=True):
        cosines = F.normalize(part.to(prototypes.dtype), dim=1) @ prototypes.T
        found.append((cosines >= cosines.gather(1, own.unsqueeze(1))).sum(dim=1) - 1)
    return torch.cat(found)


def check_subset(drawn: int, real: int, size: int) -> None:
    """Raises UserError for sets of so many pictures that are smaller than a subset; the others likewise."""
    if min(drawn, real) < size:
        asked = f"subsets of {size} pictures were asked for"
        raise UserError(f"{asked}, of sets of {drawn} and {real}; choose a smaller subset")


def check_neighbours(drawn: int, real: int, neighbours: int) -> None:
    if min(drawn, real) <= neighbours:
        raise UserError(
            f"{neighbours} neighbours need larger sets than {drawn} and {real} pictures; give more pictures"
        )


def check_splits(drawn: int, splits: int) -> None:
    if drawn < splits:
        raise UserError(f"an Inception Score over {splits} parts needs at least {splits} pictures, not {drawn}")


def _pairs(part: Tensor, others: Tensor) -> Tensor:
    """(R, D), (N, D) -> distances (R, N)."""
    return torch.cat([torch.cdist(part, some.to(part.dtype)) for some in others.split(COLUMNS)], dim=1)
