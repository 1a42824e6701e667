"""What a log line says: means over the steps since the line before, over all processes and by noise level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

# One number for each sample of a micro-batch, (B,), among what a stage gives to be logged; see stage.py.
EACH_LOSS = "each/loss"
EACH_SIGMA = "each/sigma"

EDGES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)  # of sigma, three bins for each factor of ten


def level_names() -> list[str]:
    """The keys of the bins: levels/0-0.1, levels/0.1-0.3 ... levels/10-."""
    return [f"levels/{low:g}-" + ("" if math.isinf(high) else f"{high:g}") for low, high in pairwise(EDGES)]


class Meters:
    """Totals and counts by key. A mean is over the steps that had the key, of a level's bin over its samples."""

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = {}

    def add(self, key: str, total: float, count: float = 1.0) -> None:
        entry = self.totals.setdefault(key, [0.0, 0.0])
        entry[0] += total
        entry[1] += count

    def add_levels(self, loss: Sequence[float], sigma: Sequence[float]) -> None:
        """Each sample's loss to its bin. All bins get their key, so that all processes have the same ones."""
        for name, (low, high) in zip(level_names(), pairwise(EDGES), strict=True):
            own = [each for each, level in zip(loss, sigma, strict=True) if low <= level < high]
            self.add(name, sum(own), len(own))

    def share(self, accelerator: Accelerator) -> None:
        """Give every process the mean over all of totals and counts; afterwards they hold the same.

        A run does this wherever it saves, interrupted or not, so that going on changes no digit of the log.
        """
        if accelerator.num_processes == 1 or not self.totals:
            return
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        values = torch.tensor(list(self.totals.values()), dtype=dtype, device=accelerator.device)
        mean = accelerator.reduce(values, "mean")
        assert isinstance(mean, Tensor)
        self.totals = dict(zip(self.totals, mean.tolist(), strict=True))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes; then everything begins anew. Every process must call it."""
        self.share(accelerator)
        means = {key: total / count for key, (total, count) in self.totals.items() if count}
        self.totals = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {key: list(entry) for key, entry in self.totals.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self.totals = {key: list(entry) for key, entry in state.items()}
