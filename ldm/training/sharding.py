"""Networks whose tensors are spread over processes (FSDP2): their states on disk, and whole ones for a while.

Each process writes the rows it holds, so that nothing is gathered to save. Whoever goes on, on any number of processes,
reads the rows it will hold. Tensors are cut along their first dimension into equal parts, the last ones shorter or
empty, as torch's `fully_shard` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

MARK = "a tensor in shares"  # key of the record that stands in a state where a sharded tensor was


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The processes among which the parameters are spread; None if they are not."""
    return next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)


def pack(tree: Any, shares: dict[str, Any], name: str = "") -> Any:
    """`tree` (containers of tensors and numbers) with records for its sharded tensors, whose rows go to `shares`."""
    if isinstance(tree, DTensor):
        rank, world = _place(tree.device_mesh)
        if [placement for placement in tree.placements if placement.is_shard()] != [Shard(0)]:
            raise ValueError(f"{name} is not sharded along its first dimension")
        shares[name] = {"first": _rows(tree.shape[0], rank, world)[0], "rows": tree.to_local().detach()}
        return {MARK: name, "shape": list(tree.shape)}
    if isinstance(tree, Mapping):
        return {key: pack(value, shares, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(pack(value, shares, f"{name}/{index}") for index, value in enumerate(tree))
    return tree


def unpack(tree: Any, parts: Sequence[Mapping[str, Any]], mesh: DeviceMesh | None) -> Any:
    """The inverse of `pack` on `mesh`, whatever the number of processes was; `parts` are the shares of all of them.

    Without a mesh: whole tensors.
    """
    if isinstance(tree, Mapping) and MARK in tree:
        shape = torch.Size(tree["shape"])
        rank, world = _place(mesh) if mesh is not None else (0, 1)
        first, last = _rows(shape[0], rank, world)
        found: list[Tensor] = []
        for part in parts:
            share = part[tree[MARK]]
            begin, end = share["first"], share["first"] + len(share["rows"])
            if max(first, begin) < min(last, end):
                found.append(share["rows"][max(first, begin) - begin : min(last, end) - begin])
        rows = torch.cat(found) if found else parts[0][tree[MARK]]["rows"][:0].clone()
        if len(rows) != last - first:
            raise ValueError(f"rows of {tree[MARK]} are missing")
        if mesh is None:
            return rows
        stride = torch.empty(shape, device="meta").stride()
        local = rows.to(mesh.device_type)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    if isinstance(tree, Mapping):
        return {key: unpack(value, parts, mesh) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(unpack(value, parts, mesh) for value in tree)
    return tree


@contextmanager
def whole(module: nn.Module, main: bool) -> Iterator[None]:
    """Within the block the main process holds all of `module`, as if nobody had spread it; every process must enter.

    The hooks that gather and spread parameters around each forward pass rest meanwhile, so that the main process may
    run the network alone.
    """
    kept: list[tuple[nn.Module, str, Any]] = []
    hooks: list[tuple[nn.Module, Any, Any]] = []
    spread = is_sharded(module)
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if isinstance(parameter, DTensor):
                with torch.no_grad():
                    full = parameter.full_tensor()  # all processes take part
                if main:
                    kept.append((part, name, parameter))
                    part._parameters[name] = nn.Parameter(full, requires_grad=False)
        if main and spread:
            hooks.append((part, part._forward_pre_hooks, part._forward_hooks))
    for part, _, _ in hooks:
        part._forward_pre_hooks, part._forward_hooks = type(part._forward_pre_hooks)(), type(part._forward_hooks)()
    try:
        yield
    finally:
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
        for part, name, parameter in kept:
            part._parameters[name] = parameter


def _place(mesh: DeviceMesh) -> tuple[int, int]:
    """(number of this process, of how many) on a mesh of one dimension."""
    if mesh.ndim != 1:
        raise ValueError("parameters are spread over a mesh of more than one dimension, which states do not know")
    return mesh.get_local_rank(), mesh.size()


def _rows(count: int, rank: int, world: int) -> tuple[int, int]:
    """The first row of a process, and the one after its last."""
    each = -(-count // world)
    return min(rank * each, count), min((rank + 1) * each, count)
