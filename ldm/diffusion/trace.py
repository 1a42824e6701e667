"""The trace of a field's Jacobian: exactly, one derivative for each dimension, or by Hutchinson's estimator.

    tr J = E[v^T J v]  for any v with E[v v^T] = I        (Hutchinson 1989)

Rademacher probes have the smaller variance: they are exact where J is diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.errors import UserError

Field = Callable[[Tensor], Tensor]
"""(B, ...) -> (B, ...) of the same shape, each row a function of its own row alone."""


def field_and_trace(
    field: Field, x: Tensor, probes: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """The field (B, ...) at `x` (B, ...), and the trace of its Jacobian (B,).

    `probes` (B, P, ...): the mean of v^T J v over each row's P probes; None is the exact trace, whose cost is one
    derivative for each of the row's d values, so it is for low dimension. Works under `torch.no_grad()`.
    `create_graph`: keep what is needed to differentiate both once more, by parameters or by `x`.
    """
    with torch.enable_grad():
        point = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        value = field(point)
        products = []
        for v in _basis(x) if probes is None else probes.unbind(1):
            products.append((_vector_jacobian(value, point, v, create_graph) * v).flatten(1).sum(1))
        total = torch.stack(products).sum(0)
    trace = total if probes is None else total / probes.shape[1]
    return (value, trace) if create_graph else (value.detach(), trace.detach())


def draw_probes(seeds: Sequence[int], shape: Sequence[int], count: int = 1, kind: str = "rademacher") -> Tensor:
    """(B, count, *shape) float64 on the CPU, row i from its own generator, seeds[i].

    `kind`: rademacher (signs) or gaussian. Raises UserError for another kind and for fewer than one probe.
    """
    if kind not in ("rademacher", "gaussian"):
        raise UserError(f"the probes are '{kind}'; choose rademacher or gaussian")
    if count < 1:
        raise UserError(f"{count} probes were asked for; choose at least 1")
    rows = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        normal = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
        rows.append(normal if kind == "gaussian" else normal.sign())
    return torch.stack(rows)


def _basis(x: Tensor) -> list[Tensor]:
    """The d unit vectors, each (1, ...) in x's shape."""
    d = x[0].numel()
    return list(torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).unbind(0))


def _vector_jacobian(value: Tensor, x: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    """v^T J (B, ...): rows do not see each other, so one derivative of the whole batch's sum is each row's own."""
    if not value.requires_grad:
        return torch.zeros_like(x)  # a field that does not depend on x
    (row,) = torch.autograd.grad(
        value, x, v.to(value).expand_as(value), retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return row
