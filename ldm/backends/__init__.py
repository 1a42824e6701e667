"""NETWORK -> NETWORK: the same function, run in another way, before it is bound to what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    M = TypeVar("M", bound=nn.Module)

BACKENDS = ("auto", "torch", "compile", "graph")


def check(backend: str) -> None:
    """Raises UserError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise UserError(f"there is no backend '{backend}'; choose one of {', '.join(BACKENDS)}")


def run_by(backend: str, network: M, main: bool = False) -> M:
    """`network`, itself, run by one of BACKENDS: a frozen network, on the device where it stays.

    auto: on a CPU by oneDNN with packed weights (packed.py), elsewhere as torch runs it. torch: as torch runs it,
    layer by layer. compile: what torch.compile makes of the `main` network, the one that is run at every step; it takes
    minutes to begin with, and once more when a picture of another size is drawn. graph: on a GPU its step as one CUDA
    graph (graph.py). Raises UserError for one that does not work here.
    """
    check(backend)
    on = {parameter.device.type for parameter in network.parameters()}
    if backend == "compile":
        if main:
            network.compile(fullgraph=True)
    elif backend == "graph":
        from ldm.backends.graph import graphed

        if on != {"cuda"}:
            raise UserError("the backend 'graph' needs a CUDA device; choose auto")
        if main:
            graphed(network)
    elif backend == "auto" and on == {"cpu"}:
        from ldm.backends.packed import packed

        return packed(network)
    return network
