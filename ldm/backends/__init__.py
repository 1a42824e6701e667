"""NETWORK -> NETWORK: the same function, run in another way, before it is bound to what it is told."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    M = TypeVar("M", bound=nn.Module)

BACKENDS = ("auto", "torch", "compile", "graph", "fused", "openvino")


def check(backend: str) -> None:
    """Raises UserError for a backend that does not exist, or is not installed."""
    if backend not in BACKENDS:
        raise UserError(f"there is no backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    if backend == "fused" and find_spec("triton") is None:
        raise UserError("the backend 'fused' needs Triton, which comes with torch for CUDA; choose auto")
    if backend == "openvino" and find_spec("openvino") is None:
        raise UserError("the backend 'openvino' needs OpenVINO, which is not installed; pip install -e '.[openvino]'")


def run_by(backend: str, network: M, main: bool = False) -> M:
    """`network`, itself, run by one of BACKENDS: a frozen network, on the device where it stays.

    auto: on a CPU by oneDNN with packed weights (packed.py), elsewhere as torch runs it. torch: as torch runs it, layer
    by layer. compile: what torch.compile makes of the `main` network, the one that is run at every step; it takes
    minutes to begin with, and once more when a picture of another size is drawn, or in SD v1's networks at each of the
    first eight sizes. graph: on a GPU its step as one CUDA graph (graph.py). fused: there norms and activations by
    kernels of ours (norm_silu.py), which are tried first, and left where they do not give what torch gives; not the
    default, since no GPU has measured them yet. openvino: on a CPU its step as OpenVINO compiles it (converted.py), in
    seconds for each size; other networks as by auto. Raises UserError for one that does not work here.
    """
    check(backend)
    on = {parameter.device.type for parameter in network.parameters()}
    if backend == "compile":
        if main:
            # one graph for any size: inductor (torch 2.13) fails at it where a convolution projects a view, as in SD v1
            any_size = getattr(getattr(network, "config", None), "linear_projection", True)
            network.compile(dynamic=None if any_size else False)
    elif backend in ("graph", "fused") and on != {"cuda"}:
        raise UserError(f"the backend '{backend}' needs a CUDA device; choose auto")
    elif backend == "graph":
        from ldm.backends.graph import graphed

        if main:
            graphed(network)
    elif backend == "fused":
        from ldm.backends.norm_silu import fused

        return fused(network)
    elif backend == "openvino" and main:
        from ldm.backends.converted import Converted
        from ldm.backends.graph import graphed

        if on != {"cpu"} or {str(parameter.dtype) for parameter in network.parameters()} != {"torch.float32"}:
            raise UserError("the backend 'openvino' computes on the CPU in fp32; choose these, or another backend")
        graphed(network, Converted)
    elif backend in ("auto", "openvino") and on == {"cpu"}:
        from ldm.backends.packed import packed

        return packed(network)
    return network
