"""AdamW and the law of its learning rate. The rate is the one written: nothing scales it behind one's back."""

from __future__ import annotations

import math

import torch
from torch import nn

from ldm import ranges
from ldm.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of `module` that train; biases, norms and embeddings of one row are not decayed.

    Raises UserError for numbers outside their ranges and a law that `rate_at` does not know.
    """
    ranges.check(config, prefix="optimizer.")
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.rate, betas=config.betas, fused=True)


def rate_at(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) in a run of `steps`."""
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    if config.law == "constant":
        return config.rate
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    left = 1 - done if config.law == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_rate + (config.rate - config.final_rate) * left
