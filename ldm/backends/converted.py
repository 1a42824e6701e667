"""A network's step as OpenVINO compiles it for a CPU: the fewest calls, where a network is small and each one counts.

Converted for each set of shapes, in seconds, and kept beside the network, so that its weights are held twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.backends.graph import same_with, tensors


class Converted:
    """One network for one set of shapes, as `graphed` (graph.py) keeps them."""

    def __init__(self, call: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        import openvino  # pyright: ignore[reportMissingImports] (an extra)

        class Piece(nn.Module):
            def forward(self, *values: Tensor) -> Tensor:
                left = iter(values)
                return call(*same_with(inputs, lambda _: next(left)))

        given = tuple(value.clone() for value in tensors(inputs))  # no inference tensor, which is not traced
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, of shapes that become constants: they are
            traced = torch.jit.trace(Piece(), given, check_trace=False)
            graph = openvino.convert_model(traced, example_input=given, input=[list(value.shape) for value in given])
        wish = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
        self.request = openvino.compile_model(graph, "CPU", wish).create_infer_request()

    def __call__(self, inputs: tuple[Any, ...]) -> Tensor:
        arrays = [value.detach().numpy() for value in tensors(inputs)]
        (found,) = self.request.infer(arrays, share_inputs=True, share_outputs=True).values()
        return torch.from_numpy(found).clone()  # its memory is used again
