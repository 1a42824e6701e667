"""The gradients of one global batch, and which samples made them what they are when they are not finite."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.training.draws import Draws
from ldm.training.meters import EACH_LOSS, EACH_SIGMA
from ldm.training.processes import Division
from ldm.training.stage import Stage

NAMED = 8  # samples that a report of a bad step names, at most


@dataclass
class Gradients:
    """What `accumulate` leaves beside the gradients themselves."""

    logs: dict[str, float] = field(default_factory=dict)  # means over the micro-batches
    played: list[str] = field(default_factory=list)  # players that have a gradient now
    keys: list[str] = field(default_factory=list)  # of this process' samples
    each_loss: list[float] = field(default_factory=list)  # of each sample, if the stage says
    each_sigma: list[float] = field(default_factory=list)
    bad: str = ""  # the player whose loss is not finite

    def suspects(self) -> list[str]:
        """ "key, sigma 3.2, loss nan" of the samples whose loss is not finite; if all are, of the largest ones."""
        if not self.each_loss:
            return self.keys[:NAMED]
        rows = list(zip(self.keys, self.each_loss, self.each_sigma or [math.nan] * len(self.keys), strict=True))
        bad = [row for row in rows if not math.isfinite(row[1])]
        rows = bad or sorted(rows, key=lambda row: -row[1])
        level = "" if not self.each_sigma else ", sigma {:.4g}"
        return [f"{key}{level.format(sigma)}, loss {loss:.4g}" for key, loss, sigma in rows[:NAMED]]


def accumulate(
    stage: Stage,
    batch: Any,
    division: Division,
    networks: Mapping[str, nn.Module],
    accelerator: Accelerator,
    seed: int,
    step: int,
) -> Gradients:
    """Back-propagate every micro-batch of this process' share; gradients are exchanged once, after the last one."""
    made = Gradients(keys=list(batch.key))
    logged: list[tuple[str, Tensor]] = []
    losses: list[tuple[str, Tensor]] = []
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for index, micro in enumerate(split(batch, division.micro)):
        last = index == division.accumulation - 1
        with ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(nullcontext() if last else accelerator.no_sync(network))
            # A key holds its shard's name. With the epoch, for a sample may be twice in a batch larger than the data.
            names = [f"{key} {epoch}" for key, epoch in zip(micro.key, micro.epoch, strict=True)]
            first = accelerator.process_index * division.share + index * division.micro
            draws = Draws(seed, step, names, accelerator.device, first, division.processes * division.share)
            for name, loss, values in stage.losses(micro, draws, step, networks):
                accelerator.backward(loss / division.accumulation)
                losses.append((name, loss.detach()))
                if name not in made.played:
                    made.played.append(name)
                for key, value in values.items():
                    if key in (EACH_LOSS, EACH_SIGMA):
                        rows[key].append(value.detach())
                    else:
                        logged.append((key, value.detach()))
    numbers = _numbers([loss for _, loss in losses] + [value for _, value in logged])
    made.bad = next((name for (name, _), value in zip(losses, numbers, strict=False) if not math.isfinite(value)), "")
    means: dict[str, float] = defaultdict(float)
    for (key, _), value in zip(logged, numbers[len(losses) :], strict=True):
        means[key] += value / division.accumulation
    made.logs = dict(means)
    made.each_loss = _numbers([torch.cat(rows[EACH_LOSS])]) if rows[EACH_LOSS] else []
    made.each_sigma = _numbers([torch.cat(rows[EACH_SIGMA])]) if rows[EACH_SIGMA] else []
    return made


def split(batch: Any, size: int) -> Iterator[Any]:
    """Micro-batches of `size` samples of a dataclass of tensors and lists."""
    count = len(batch.key)
    for start in range(0, count, size):
        parts = {f.name: getattr(batch, f.name)[start : start + size] for f in dataclasses.fields(batch)}
        yield dataclasses.replace(batch, **parts)


def _numbers(tensors: list[Tensor]) -> list[float]:
    """All values of small tensors in one transfer: each would stop the device's queue by itself."""
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors]).tolist() if tensors else []
