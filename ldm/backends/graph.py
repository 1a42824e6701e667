"""A network's step as one CUDA graph: a thousand kernels started by one call, for batches too small to fill the GPU.

A graph is recorded for each set of shapes, after three runs that warm up; memory is that of one step more for each that
is kept. It reads the weights where they lay then, so those that have moved have another. What the network is told is
copied into the graph's own tensors once a trajectory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.unet.attention import attention

M = TypeVar("M", bound=nn.Module)
KEPT = 2  # graphs of a network, those used last
WARM = 3


def graphed(network: M, record: Callable[..., Any] | None = None) -> M:
    """`network`, itself, replayed from graphs where no gradient is asked; `record` makes one (`Recorded`).

    Whoever looks into its layers, or changes what they do, while it runs meets the layers themselves (`_usual`).
    """
    record = record or Recorded
    graphs: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()  # a copy has its own

    def forward(self: nn.Module, *inputs: Any) -> Tensor:
        plain = type(self).forward
        if self.training or torch.is_grad_enabled() or not all(map(_static, inputs)) or not _usual(self):
            return plain(self, *inputs)
        kept = graphs.setdefault(self, {})
        places = tuple(value.data_ptr() for value in _weights(self))
        which = places, *((value.shape, value.dtype, value.device) for value in tensors(inputs))
        graph = kept.pop(which, None)
        if graph is None:
            with torch.inference_mode(False), torch.no_grad():  # else its own tensors could not be written later
                graph = record(lambda *given: plain(self, *given), inputs)
        kept[which] = graph  # the last used is the last here
        while len(kept) > KEPT:
            del kept[next(iter(kept))]
        return graph(inputs)

    network.forward = MethodType(forward, network)
    return network


def _weights(network: nn.Module) -> Iterator[Tensor]:
    for layer in network.modules():
        for value in (*layer._parameters.values(), *layer._buffers.values()):
            if value is not None:
                yield value


def _usual(network: nn.Module) -> bool:
    """Whether each layer does what its class says: no hook is in it, nothing stands in for it or for its attention."""
    for layer in network.modules():
        own = vars(layer)
        attends = own.get("attends", attention)
        if layer is not network and (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own):
            return False
        if getattr(attends, "func", attends) is not attention:  # or partial(attention, backend=...)
            return False
    return True


class Recorded:
    """One graph."""

    def __init__(self, call: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.inputs = same_with(inputs, torch.clone)
        self.last: list[Any] = [None] * len(inputs)
        with torch.cuda.device(next(tensors(inputs)).device):  # streams are of the current one
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM):
                    call(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):  # its default is of the first device that recorded
                self.output = call(*self.inputs)

    def __call__(self, inputs: tuple[Any, ...]) -> Tensor:
        for index, (own, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if (
                isinstance(given, Tensor) or given is not self.last[index]
            ):  # what is told is a value, and stays as it is
                for here, there in zip(tensors(own), tensors(given), strict=True):
                    here.copy_(there)
                self.last[index] = given
        self.graph.replay()
        return self.output.clone()


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in a tensor, a tuple or a record, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def same_with(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with each tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(same_with(each, function) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: same_with(getattr(value, field.name), function) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _static(value: Any) -> bool:
    """Whether a graph can take it: tensors and records of them, or nothing."""
    return value is None or isinstance(value, Tensor) or dataclasses.is_dataclass(value)
