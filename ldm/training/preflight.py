"""What a run will need at its end, asked for at its beginning: a mistake is told before it has cost anything."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldm import ranges
from ldm.config import (
    DataConfig,
    DiffusionLossConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
)
from ldm.data.feed import check_division
from ldm.data.loader import validation_batches
from ldm.errors import UserError
from ldm.training.processes import divide


def check_settings(config: Any, world: int) -> None:
    """Raise UserError for values outside their ranges and for a batch that does not divide; no file is opened."""
    ranges.check(config)
    divide(config.loop, world)
    check_division(config.data, config.loop.global_batch, world)


def check_output(path: Path) -> None:
    """Raise UserError unless a folder can be made at `path`, or is there and can be written to."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"output={path} cannot be a folder, since {there} is a file; choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output={path} cannot be written: permission denied in {there}; choose another output")


def check_sides(data: DataConfig, factor: int) -> None:
    """Raise UserError for pictures whose sides the autoencoder's `factor` f does not divide."""
    for name, side in (("size", data.size), ("buckets", data.buckets)):
        if side % factor:
            below, above = max(side // factor, 1) * factor, (side // factor + 1) * factor
            raise UserError(
                f"data.{name} is {side}, and sides must be multiples of {factor}, the autoencoder's f; try "
                + " or ".join(map(str, sorted({below, above})))
            )


def check_untold(data: DataConfig) -> None:
    """Raise UserError for a label, a score or a depth map, in the training of a network that takes none."""
    check_no_depth(data)
    check_no_label(data)
    check_no_score(data)


def check_no_depth(data: DataConfig) -> None:
    """Raise UserError for a depth map, in the training of a network that takes none."""
    if data.depth:
        raise UserError(
            f"data.depth={data.depth} is for a network that is given a depth map, and this one is not; give the "
            "diffusion model's model.in_channels one more, or leave data.depth out"
        )


def check_no_label(data: DataConfig) -> None:
    """Raise UserError for a label, in the training of a network that takes none."""
    if data.label:
        raise UserError(
            f"data.label={data.label} is for a network with classes, and this one has none; set model.classes (of the "
            "diffusion model), or leave data.label out"
        )


def check_no_score(data: DataConfig) -> None:
    """Raise UserError for a score, in the training of a network that is told none."""
    if data.score:
        raise UserError(
            f"data.score={data.score} is for a network that is told an aesthetic score, and this one is not; set "
            "encoder.score=true (of the diffusion model), or leave data.score out"
        )


def check_validation(data: DataConfig, labels: Collection[str] = ()) -> None:
    """Raise UserError unless held-out samples, if named, are available; `labels` as `validation_batches`'."""
    if data.validation.strip() and next(validation_batches(data, 1, labels), None) is None:
        raise UserError(f"data.validation ({data.validation}) has no picture that can be decoded; name other shards")


def without_effect(
    config: ModelConfig, data: DataConfig, optimizer: OptimizerConfig, loop: LoopConfig, loss: DiffusionLossConfig
) -> list[str]:
    """A sentence on each setting that was changed and that others leave without effect."""
    unread = {
        f"sigma_data has no effect, for the parameterization is {config.parameterization}": (
            config.parameterization != "edm" and config.sigma_data != ModelConfig.sigma_data
        ),
        f"loss.min_snr_gamma has no effect, for loss.weight is {loss.weight}": (
            loss.weight != "min_snr" and loss.min_snr_gamma != DiffusionLossConfig.min_snr_gamma
        ),
        "data.bucket_aspect has no effect, for data.buckets is 0": (
            not data.buckets and data.bucket_aspect != DataConfig.bucket_aspect
        ),
        "optimizer.final_rate has no effect, for optimizer.law is constant": (
            optimizer.law == "constant" and optimizer.final_rate > 0
        ),
        "optimizer.rate is not reached, for optimizer.warmup is longer than the run": optimizer.warmup > loop.steps,
    }
    return [sentence for sentence, so in unread.items() if so]
