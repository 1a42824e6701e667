"""The distances against closed forms on Gaussians, peers on the same features, and cases small enough for the hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError
from ldm.metrics.distances import (
    clip_score,
    cmmd,
    density_coverage,
    frechet,
    gaussian_mmd,
    inception_score,
    kernel,
    precision_recall,
    retrieval,
)


def normal(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """Features whose sample mean and unbiased covariance are these, to rounding."""
    x = normal(400, len(mean), seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def spd(width: int, seed: int) -> Tensor:
    root = normal(width, width, seed)
    return root @ root.T + 0.1 * torch.eye(width, dtype=torch.float64)


# ---------------------------------------------------------------- Frechet


def test_frechet_of_commuting_gaussians():
    """Of diagonal covariances: |difference of means|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 16.0]).double()
    means = torch.tensor([[0.0, 0, 0], [1.0, 2.0, -2.0]]).double()
    found = frechet(exactly(means[0], a.diag(), 1), exactly(means[1], b.diag(), 2))
    assert found == pytest.approx(9 + 1 + 1 + 1, abs=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    a, b = spd(6, 1), spd(6, 2)
    root = scipy.linalg.sqrtm(a.numpy())
    cross = scipy.linalg.sqrtm(root @ b.numpy() @ root)  # symmetric, unlike the product that is computed
    by_hand = 3.0**2 + float(a.trace() + b.trace()) - 2 * np.trace(cross).real
    shift = torch.tensor([3.0, 0, 0, 0, 0, 0]).double()
    assert frechet(exactly(shift, a, 3), exactly(torch.zeros(6).double(), b, 4)) == pytest.approx(by_hand, abs=1e-8)


def test_frechet_of_a_set_and_itself_is_zero():
    x = normal(50, 8)
    assert frechet(x, x) == pytest.approx(0, abs=1e-8)


def test_frechet_and_kernel_are_those_of_torch_fidelity():
    declare_missing_operators()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(120, 16, 1).float(), normal(90, 16, 2).float() * 1.2 + 0.1
    statistics = [fid_features_to_statistics(x.double()) for x in (a, b)]
    wanted = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(a, b) == pytest.approx(wanted, abs=1e-9)

    peer = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=7, kid_subset_size=40, rng_seed=2020, verbose=False
    )
    wanted = peer["kernel_inception_distance_mean"], peer["kernel_inception_distance_std"]
    assert kernel(a, b, 7, 40) == pytest.approx(wanted, abs=1e-12)


def test_frechet_and_kernel_are_those_of_clean_fid(monkeypatch):
    """clean-fid takes the matrix root by scipy, with an argument that scipy has since dropped; its own formula."""
    declare_missing_operators()
    fid = pytest.importorskip("cleanfid.fid")
    true = scipy.linalg.sqrtm
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda m, disp=True: true(m) if disp else (true(m), 0.0))

    a, b = normal(200, 16, 1) * 1.5, normal(300, 16, 2) + 0.2
    moments = [v for x in (a, b) for v in (x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False))]
    assert frechet(a, b) == pytest.approx(fid.frechet_distance(*moments), abs=1e-3)

    # One subset that is the whole set leaves nothing to chance.
    whole = fid.kernel_distance(a.numpy(), b[:200].numpy(), num_subsets=1, max_subset_size=200)
    assert kernel(a, b[:200], 1, 200)[0] == pytest.approx(whole, abs=1e-9)


def test_one_picture_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        frechet(normal(1, 4), normal(9, 4))


# ---------------------------------------------------------------- kernels


def cubic(a: Tensor, b: Tensor) -> float:
    """E (x y / d + 1)^3 of independent x ~ N(a, I), y ~ N(b, I), by the moments of a normal given the other."""
    d, ab, aa, bb = len(a), float(a @ b), float(a @ a), float(b @ b)
    second = d + aa + bb + ab**2
    third = ab**3 + 3 * ab * aa + 3 * ab * (bb + d + 2)
    return 1 + 3 * ab / d + 3 * second / d**2 + third / d**3


def test_kernel_distance_of_gaussians():
    d = 6
    a, b = torch.zeros(d).double(), torch.full((d,), 0.5).double()
    law = cubic(a, a) + cubic(b, b) - 2 * cubic(a, b)
    mean, deviation = kernel(normal(6000, d, 1), normal(6000, d, 2) + b, 60, 200)
    # 6,000 pictures are 30 subsets that do not overlap: the mean has about deviation / sqrt(30) of its own.
    assert abs(mean - law) < 4 * deviation / math.sqrt(30)
    assert deviation < law / 3


def test_the_kernel_distance_of_equal_laws_is_zero_on_average():
    """The biased estimate would be E k(x, x) / m = 8 / 100 or more."""
    found = [kernel(normal(100, 5, 2 * i), normal(100, 5, 2 * i + 1), 1, 100)[0] for i in range(60)]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(60) and np.std(found) < 0.08


def test_gaussian_kernel_distance_of_gaussians():
    """E exp(-|x - y|^2 / 2 s^2) of x - y ~ N(m, 2 I) is (1 + 2 / s^2)^(-d/2) exp(-|m|^2 / (2 s^2 + 4))."""
    d, s = 4, 2.0
    shift = torch.full((d,), 0.5).double()

    def expected(square: float) -> float:
        return (1 + 2 / s**2) ** (-d / 2) * math.exp(-square / (2 * s**2 + 4))

    law = 2 * expected(0) - 2 * expected(d * 0.25)
    found = [gaussian_mmd(normal(700, d, 2 * seed), normal(500, d, 2 * seed + 1) + shift, s) for seed in range(12)]
    assert abs(np.mean(found) - law) < 4 * np.std(found) / math.sqrt(12)
    assert np.std(found) < law / 3


def test_cmmd_on_two_points_by_hand():
    """Unit vectors at right angles are sqrt 2 apart: k = exp(-1/100); within a set of equal vectors k = 1."""
    a, b = torch.tensor([[3.0, 0], [5.0, 0]]), torch.tensor([[0.0, 1], [0, 2.0], [0, 7.0]])
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)), abs=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_cmmd_is_the_unbiased_estimate_of_torch_fidelity():
    declare_missing_operators()
    from torch_fidelity.metric_kid import kernel_mmd

    a, b = (torch.nn.functional.normalize(normal(40, 6, seed), dim=1) for seed in (1, 2))
    wanted = kernel_mmd(a.numpy(), b.numpy(), kid_kernel="rbf", kid_kernel_rbf_sigma=10.0)
    assert cmmd(a, b) == pytest.approx(1000 * wanted, abs=1e-9)


# ---------------------------------------------------------------- scores


def test_inception_score_by_hand():
    """Two parts. Certain of one of two classes each: exp(log 2) = 2. Always the same answer: exp 0 = 1."""
    certain = 50 * torch.eye(2, dtype=torch.float64).repeat(50, 1)
    mean, deviation = inception_score(certain, splits=1)
    assert (mean, deviation) == (pytest.approx(2, abs=1e-9), 0)
    assert inception_score(torch.tensor([[1.0, 2.0, 3.0]]).repeat(10, 1), 2) == (pytest.approx(1), pytest.approx(0))
    with pytest.raises(UserError, match=r"needs at least \d+ pictures, not 3"):
        inception_score(certain[:3])


def test_the_parts_of_the_inception_score():
    """A part of which the share s is of one class and the rest of the other has exp of the entropy of (s, 1 - s)."""
    classes = torch.tensor([0] * 15 + [1] * 5)
    shuffled = classes[np.random.RandomState(2020).permutation(20)]
    scores = []
    for part in shuffled.split(5):
        shares = torch.bincount(part).double() / 5
        scores.append(math.exp(-float((shares * shares.log()).nansum())))
    assert min(scores) < max(scores)
    logits = 50 * torch.nn.functional.one_hot(classes).double()
    assert inception_score(logits, 4) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    assert inception_score(logits, 20) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_the_inception_score_is_that_of_torch_fidelity():
    declare_missing_operators()
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = normal(53, 7).float()
    assert inception_score(logits, 4) == pytest.approx(tuple(isc_features_to_metric(logits, 4).values()), abs=1e-12)


def test_inception_score_written_out():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    q = p.mean(0)
    by_hand = math.exp(float((p * (p / q).log()).sum(1).mean()))
    assert inception_score(p.log(), 1)[0] == pytest.approx(by_hand, abs=1e-12)


# ---------------------------------------------------------------- neighbours


def line(*places: float) -> Tensor:
    return torch.tensor(places).unsqueeze(1)


def test_precision_and_recall_by_hand():
    """On a line with one neighbour: the real at 0, 1, 10 reach 1, 1 and 9 far; the drawn at 0.5, 3, 30 reach 2.5, 2.5,
    27."""
    real, drawn = line(0, 1, 10), line(0.5, 3, 30)
    precision, recall = precision_recall(drawn, real, 1)
    assert precision == pytest.approx(2 / 3)  # 0.5 is near 0, 3 is 7 from 10, 30 is 20 from 10
    assert recall == pytest.approx(3 / 3)  # 10 is 20 from 30, which reaches 27
    precision, recall = precision_recall(line(0.5, 3, 3.5), real, 1)
    assert precision == pytest.approx(1.0)
    assert recall == pytest.approx(2 / 3)  # 10 is 6.5 from 3.5, which reaches half


def test_the_balls_of_precision_and_recall_are_closed():
    """The real at 0 and 2 reach 2 far, to 4 and no further; the drawn at 4 and 7 reach 3, to 1 and no further."""
    assert precision_recall(line(4, 7), line(0, 2), 1) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    assert precision_recall(line(4.5, 7), line(0, 2), 1) == (0.0, pytest.approx(1 / 2))  # it reaches just to 2


def test_the_balls_of_density_and_coverage_are_open():
    assert density_coverage(line(4, -2), line(0, 2), 1) == (0.0, 0.0)
    assert density_coverage(line(3.9, -1.9), line(0, 2), 1) == (pytest.approx(1.0), pytest.approx(1.0))


def test_density_and_coverage_by_hand():
    """Balls of one neighbour around 0, 1, 10: radii 1, 1, 9, open. 0.5 lies in all but the last (9.5 away), 3 in the
    last (7), 30 in none: 3 of 1 x 3."""
    density, coverage = density_coverage(line(0.5, 3, 30), line(0, 1, 10), 1)
    assert (density, coverage) == (pytest.approx(1.0), pytest.approx(1.0))
    density, coverage = density_coverage(line(30, 40), line(0, 1, 10), 1)
    assert (density, coverage) == (0.0, 0.0)
    density, coverage = density_coverage(line(0.5, 0.5, 0.5), line(0, 1, 10), 1)
    assert (density, coverage) == (pytest.approx(2.0), pytest.approx(2 / 3))


def test_density_and_coverage_of_equal_laws():
    """Naeem et al. 2020, section 3.3: E density = 1, E coverage = 1 - (N - 1 choose k) / (N + M - 1 choose k), any law.

    (A ball misses all M drawn if the k nearest among the other N - 1 + M are all real.)
    """
    n, m, k, runs = 40, 30, 3, 150
    expected = 1 - math.comb(n - 1, k) / math.comb(n + m - 1, k)
    found = np.array([density_coverage(normal(m, 3, 2 * i), normal(n, 3, 2 * i + 1), k) for i in range(runs)])
    error = 4 * found.std(0) / math.sqrt(runs)
    assert abs(found[:, 0].mean() - 1) < error[0]
    assert abs(found[:, 1].mean() - expected) < error[1]


def test_the_tables_of_neighbours_are_cut_into_rows(monkeypatch):
    import ldm.metrics.distances as distances

    a, b = normal(23, 4, 1), normal(31, 4, 2)
    own = torch.arange(23)

    def all_of_them():
        captions = clip_score(a, b[:23]), *retrieval(a, b, own)
        return precision_recall(a, b), density_coverage(a, b), cmmd(a, b), captions

    whole = all_of_them()
    monkeypatch.setattr(distances, "ROWS", 7)
    monkeypatch.setattr(distances, "COLUMNS", 5)
    for one, other in zip(whole, all_of_them(), strict=True):
        assert other == pytest.approx(one, abs=1e-9)


def test_sets_smaller_than_the_neighbours_are_refused():
    for measure in (precision_recall, density_coverage):
        with pytest.raises(UserError, match="larger sets than 3 and 9"):
            measure(normal(3, 2), normal(9, 2), 3)
    with pytest.raises(UserError, match="choose a smaller subset"):
        kernel(normal(50, 2), normal(200, 2))


# ---------------------------------------------------------------- captions


def test_clip_score_by_hand():
    """Cosines 1, 0.6 and -1, of which the last counts as 0; lengths do not count."""
    images = torch.tensor([[2.0, 0], [3.0, 4], [0, 1]])
    texts = torch.tensor([[5.0, 0], [1.0, 0], [0, -1]])
    assert clip_score(images, texts) == pytest.approx(100 * 1.6 / 3, abs=1e-5)


def test_retrieval_by_hand():
    """Six captions at 0, 10, ... 50 degrees. A picture at 21 degrees has them at 1, 9, 11, 19, 21, 29 from it."""

    def at(*degrees: float) -> Tensor:
        angles = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    texts = at(20, 30, 10, 40, 0, 50)
    found = retrieval(at(21).repeat(6, 1), texts, torch.arange(6))
    assert found == (pytest.approx(1 / 6), pytest.approx(5 / 6))
    assert retrieval(at(21), texts, torch.tensor([4])) == (0.0, 1.0)  # fifth
    assert retrieval(at(21), texts, torch.tensor([5])) == (0.0, 0.0)  # sixth


def test_a_tie_is_lost():
    texts = torch.eye(6)
    images = torch.eye(6)[[0, 1, 2, 2]] + 0.1  # the last is closest to 2, and as far from 4 as from the other four
    assert retrieval(images, texts, torch.tensor([0, 1, 2, 4])) == (0.75, 0.75)
