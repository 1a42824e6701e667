"""EDM's laws in foreign files (Karras et al. 2022): networks told ln(sigma) / 4, between two sigmas.

    CosXL, and merges of it      tensors edm_vpred.sigma_max, edm_vpred.sigma_min: v, of data of deviation 1
    Playground 2.5               tensors edm_mean, edm_std of the latent's channels: data of deviation 0.5
    a diffusers directory        EDM's schedulers, or Euler's with timestep_type continuous (of Stable Video Diffusion);
                                 the latent's mean and deviation stand in vae/config.json

In the last two epsilon stands for EDM's own output F, c_skip x + c_out F, and v_prediction for -F; at deviation 1, v.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.diffusers_configs import value
from ldm.checkpoints.said import Said, marker
from ldm.checkpoints.state import Source
from ldm.errors import UserError
from ldm.model_config import ModelConfig, ScheduleConfig

SCHEDULERS = ("EDMEuler", "EDMDPMSolverMultistep")
WRITTEN = "EDMDPMSolverMultistepScheduler"
HIGHEST, LOWEST, HALF = "edm_vpred.sigma_max", "edm_vpred.sigma_min", 0.5
MOST_CHANNELS = 64  # of a latent
PREDICTIONS = {("epsilon", None): "edm", ("v_prediction", 1.0): "v"}


def by_tensors(tensors: Source) -> list[Said]:
    """What the marker tensors say, of one law or both. Raises UserError for numbers that make no law."""
    named = {marker(name): name for name in tensors if marker(name)}
    found: list[Said] = []
    if "edm_mean" in named or "edm_std" in named:
        mean, std = (_numbers(tensors, named.get(name), name, MOST_CHANNELS) for name in ("edm_mean", "edm_std"))
        if len(mean) != len(std) or min(std) <= 0:
            raise UserError(f"the tensors edm_mean and edm_std hold {mean} and {std}: no mean and deviation")
        found += [
            *_said("edm", HALF, 0.002, 80.0, "the tensor edm_mean"),
            Said("autoencoder.shift", mean, "the tensor edm_mean"),
            Said("autoencoder.scale", tuple(HALF / one for one in std), "the tensor edm_std"),
        ]
    if HIGHEST in named or LOWEST in named:
        (high,) = _numbers(tensors, named.get(HIGHEST), HIGHEST, 1)
        (low,) = _numbers(tensors, named[LOWEST], LOWEST, 1) if LOWEST in named else (0.002,)
        found += _said("v", 1.0, low, high, f"the tensor {HIGHEST}")
    return found


def by_scheduler(plain: Mapping[str, Any], kind: str, where: str) -> list[Said] | None:
    """What a scheduler_config.json of class `kind` says; None: a law that our settings have no word for."""
    own = kind in SCHEDULERS
    if not own and (plain.get("sigma_min") is None or plain.get("sigma_max") is None):
        return None  # of its betas, and told ln(sigma) / 4 all the same
    deviation = value(plain, "sigma_data", HALF if own else 1.0, where)
    prediction = str(plain.get("prediction_type", "epsilon"))
    form = PREDICTIONS.get((prediction, None if own and prediction == "epsilon" else deviation))
    if form is None:
        return None
    low, high = (value(plain, f"sigma_{end}", usual, where) for end, usual in (("min", 0.002), ("max", 80.0)))
    return _said(form, deviation, low, high, f"{where}: {kind}Scheduler")


def _said(form: str, deviation: float, low: float, high: float, where: str) -> list[Said]:
    if not (0 < low < high < math.inf and 0 < deviation < math.inf):
        raise UserError(f"{where} says sigmas from {low:g} to {high:g} and data of deviation {deviation:g}: no law")
    law = ScheduleConfig("edm", sigma_min=low, sigma_max=high)
    return [Said(*pair, where) for pair in (("parameterization", form), ("schedule", law), ("sigma_data", deviation))]


def _numbers(tensors: Source, name: str | None, wanted: str, most: int) -> tuple[float, ...]:
    """The numbers in a marker tensor, `most` or fewer, as they were before they were stored."""
    if name is None:
        raise UserError(f"the tensor {wanted} is missing beside the others of its kind; copy the file again")
    size = math.prod(tensors.form(name)[1])
    found = tensors[name].double().flatten() if 0 < size <= most else torch.tensor([math.nan])
    if not bool(found.isfinite().all()):
        each = " or one for each channel" if most > 1 else ""
        raise UserError(f"the tensor {name} holds {size} numbers, and should hold one{each}, finite")
    return tuple(float(f"{one:.7g}") for one in found.tolist())


# ---------------------------------------------------------------- writing


def markers(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors that a single file of such a law has."""
    law = config.schedule
    if law is None or law.kind != "edm":
        return {}
    return {HIGHEST: torch.tensor(law.sigma_max), LOWEST: torch.tensor(law.sigma_min)}


def write_scheduler(config: ModelConfig) -> dict[str, Any]:
    """scheduler/scheduler_config.json; of order 1 it draws as `--sampler ddim --spacing exponential` does."""
    assert config.schedule is not None
    v = config.parameterization == "v"  # which is of deviation 1, whatever the data's
    return {
        "_class_name": WRITTEN,
        "sigma_min": config.schedule.sigma_min,
        "sigma_max": config.schedule.sigma_max,
        "sigma_data": 1.0 if v else config.sigma_data,
        "sigma_schedule": "exponential",
        "num_train_timesteps": config.schedule.steps,
        "prediction_type": "v_prediction" if v else "epsilon",
        "solver_order": 1,
        "final_sigmas_type": "zero",
    }


def unsayable(config: ModelConfig, to: str) -> list[str]:
    """What of a model of this law format `to` has no words for; names settings."""
    able, form = {"original": ("v",), "diffusers": ("v", "edm")}[to], config.parameterization
    return [] if form in able else [f"parameterization={form} with schedule.kind=edm"]
