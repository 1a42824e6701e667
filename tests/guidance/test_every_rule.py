"""What holds for every rule: pictures of a batch do not meet, nothing passed in is changed, no gradient comes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Denoiser
from ldm.guidance import (
    autoguidance,
    cfg,
    classifier_guidance,
    clip_guidance,
    conjunction,
    dynamic_threshold,
    perpendicular_negative,
    static_threshold,
)

GENERATOR = torch.Generator().manual_seed(0)
MIXING = torch.randn(4, 3, 3, generator=GENERATOR, dtype=torch.float64)
DIRECTION = torch.randn(3 * 4 * 4, generator=GENERATOR, dtype=torch.float64)
X = 2 * torch.randn(3, 3, 4, 4, generator=GENERATOR, dtype=torch.float64)


def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
    """Four different nonlinear predictions, each picture's from itself and its sigma."""
    scale = 1 / (1 + sigma.reshape(-1, 1, 1, 1).to(x) ** 2)
    made = torch.einsum("kij,bjhw->kbihw", MIXING.to(x), torch.tanh(x)) * scale + scale * x
    return made[:count]


def first(x: Tensor, sigma: Tensor) -> Tensor:
    return branches(x, sigma, 1)[0]


def log_probability(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x.flatten(1) @ DIRECTION.to(x) / (1 + sigma.to(x)))


def similarity(image: Tensor) -> Tensor:
    return torch.cosine_similarity(image.flatten(1), DIRECTION.to(image)[None])


RULES: dict[str, Callable[[], Denoiser]] = {
    "cfg": lambda: cfg(branches, 5.0, 0.7, (0.3, 9.0)),
    "autoguidance": lambda: autoguidance(branches, lambda *given: branches(*given[:2])[3:], 2.0, 0.5, (0.3, 9.0)),
    "perpendicular": lambda: perpendicular_negative(branches, 0.8, 5.0, 0.5, (0.3, 9.0)),
    "conjunction": lambda: conjunction(branches, (2.0, 1.0, -0.5)),
    "classifier": lambda: classifier_guidance(first, log_probability, 3.0, (0.3, 9.0)),
    "clip": lambda: clip_guidance(first, torch.tanh, similarity, 3.0, (0.3, 9.0)),
    "static": lambda: static_threshold(first, 0.5),
    "dynamic": lambda: dynamic_threshold(first, 0.5, 0.9),
    "all in a row": lambda: dynamic_threshold(
        clip_guidance(classifier_guidance(cfg(branches, 5.0), log_probability, 3.0), torch.tanh, similarity, 1.0), 0.5
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_pictures_of_a_batch_do_not_meet(name: str) -> None:
    """Each with a sigma of its own, of which one lies outside the interval."""
    denoise, sigma = RULES[name](), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    together = denoise(X, sigma)
    alone = torch.cat([denoise(X[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    scalar = torch.cat([denoise(X[i : i + 1], sigma[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together, scalar, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_under_no_grad_and_with_it(name: str) -> None:
    """The same numbers, without a graph, in x's own dtype; x and sigma stay as they were, and so does the mode."""
    denoise, x, sigma = RULES[name](), X.clone(), torch.tensor(2.0, dtype=torch.float64)
    with torch.no_grad():
        found = denoise(x, sigma)
        assert not torch.is_grad_enabled()
    assert torch.equal(denoise(x, sigma), found) and not found.requires_grad
    assert torch.equal(x, X) and not x.requires_grad and x.grad is None and sigma == 2
    single = denoise(x.float(), sigma)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, first(x, sigma)), "the rule does something"
