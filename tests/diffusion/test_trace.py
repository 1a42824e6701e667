"""The trace of a field's Jacobian: exact, estimated, and differentiable once more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion.trace import draw_probes, field_and_trace

MATRIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()


def field(x: Tensor) -> Tensor:
    """Jacobian diag(cos(x)) + MATRIX, picture by picture."""
    return x.sin() + (x.flatten(1) @ MATRIX.T).reshape(x.shape)


def test_the_exact_trace() -> None:
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        value, trace = field_and_trace(field, x)
    torch.testing.assert_close(value, field(x))
    torch.testing.assert_close(trace, x.cos().flatten(1).sum(1) + MATRIX.trace())
    assert not value.requires_grad and not trace.requires_grad and not x.requires_grad


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_variance_known(kind: str) -> None:
    """With S = (J + J^T) / 2: signs have variance 2 (|S|^2 - |diag S|^2), normals 2 |S|^2. 2,000 probes."""
    x = torch.zeros(1, 2, 3).double()
    probes = draw_probes([3], (2, 3), 2000, kind)
    each = torch.stack([field_and_trace(field, x, probes[:, i : i + 1])[1] for i in range(2000)])
    jacobian = MATRIX + torch.eye(6, dtype=torch.float64)
    symmetric = (jacobian + jacobian.T) / 2
    variance = 2 * float(symmetric.square().sum())
    if kind == "rademacher":
        variance -= 2 * float(symmetric.diagonal().square().sum())
    assert float(each.var()) == pytest.approx(variance, rel=0.15)
    assert abs(float(each.mean()) - float(jacobian.trace())) < 3 * (variance / 2000) ** 0.5
    _, mean = field_and_trace(field, x, probes)
    torch.testing.assert_close(mean, each.mean().reshape(1))


def test_a_field_that_does_not_depend_on_x_has_no_trace() -> None:
    weight = torch.ones(3, requires_grad=True)
    for constant in (lambda x: torch.ones_like(x), lambda x: weight.expand_as(x)):
        _, trace = field_and_trace(constant, torch.zeros(2, 3))
        assert trace.tolist() == [0, 0]


def test_both_can_be_differentiated_again() -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    value, trace = field_and_trace(lambda x: x**3, x, create_graph=True)
    (slope,) = torch.autograd.grad((trace + value.sum(1)).sum(), x)
    torch.testing.assert_close(slope, 6 * x.detach() + 3 * x.detach() ** 2)
