"""scheduler/scheduler_config.json of a diffusers directory: which law the model was trained with.

The class and a few fields say that; most fields (timestep_spacing, use_karras_sigmas, solver_order, clip_sample, ...)
say how its pipeline draws, which is the user's choice here. Only classes that are known are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ldm.checkpoints import edm
from ldm.checkpoints.architectures import LCM
from ldm.checkpoints.diffusers_configs import BETAS, PREDICTIONS, value
from ldm.checkpoints.said import FLOW, ZERO_SNR, Said
from ldm.errors import UserError
from ldm.model_config import DrawingConfig, ScheduleConfig, UNetConfig
from ldm.ranges import MAX_STEPS

Plain = Mapping[str, Any]

DDPM, SD_ENDS, SD = (1e-4, 0.02, "linear"), (0.00085, 0.012, "linear"), (0.00085, 0.012, "scaled_linear")
CHAINS: Mapping[str, tuple[float, float, str]] = {  # what a class takes beta_start, beta_end and beta_schedule to be
    **dict.fromkeys(("DDIM", "DDIMParallel", "DDIMInverse", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete"), DDPM),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "RePaint", "DEISMultistep", "UniPCMultistep"), DDPM),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "SASolver"), DDPM),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), SD_ENDS),
    **dict.fromkeys(("LCM", "TCD"), SD),
}
FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM")


def read_scheduler(plain: Plain, named: str, where: str) -> tuple[list[Said], tuple[str, ...]]:
    """What the file says of the law, and remarks; `named` is the scheduler's class in model_index.json, or "".

    Raises UserError for fields that hold something else than they should.
    """
    kind = str(plain.get("_class_name") or named or "DDIM")
    bare = _bare(kind)
    if named and _family(_bare(named)) != _family(bare):
        return _unknown(f"{where} names a {kind[:60]}, model_index.json a {named[:60]}"), ()
    if _family(bare) == "flow" or plain.get("use_flow_sigmas"):
        return _flow(plain, bare, where)
    if bare in edm.SCHEDULERS or plain.get("timestep_type") == "continuous":
        said = edm.by_scheduler(plain, bare, where)
        words = ", timestep_type continuous" if bare in CHAINS else ""
        return said or _unknown(f"{where}: the scheduler is {kind[:60]}{words}"), ()
    if bare not in CHAINS:
        return _unknown(f"{where}: the scheduler is {kind[:60]}"), ()
    start, end, spacing = CHAINS[bare]
    prediction, betas = str(plain.get("prediction_type", "epsilon")), str(plain.get("beta_schedule", spacing))
    said = [Said("parameterization", PREDICTIONS.get(prediction), f"{where}: prediction_type {prediction[:60]}")]
    schedule = ScheduleConfig(
        BETAS.get(betas, ""),
        value(plain, "num_train_timesteps", 1000, where),
        value(plain, "beta_start", start, where),
        value(plain, "beta_end", end, where),
    )
    zero = bool(plain.get("rescale_betas_zero_snr", False))
    if plain.get("trained_betas") is not None:
        found = _schedule_of(plain["trained_betas"])
        zero = zero or (found is not None and found.zero_terminal_snr)
        said.append(Said("schedule", found and replace(found, zero_terminal_snr=False), f"{where}: trained_betas"))
    else:
        words = f"{where}: beta_schedule {betas[:60]}"
        said.append(Said("schedule", schedule if schedule.kind else None, words))
    said.append(Said(ZERO_SNR, zero, f"{where}: rescale_betas_zero_snr"))
    if plain.get("variance_type") in ("learned", "learned_range"):
        said.append(Said("learned_variance", None, f"{where}: variance_type {plain['variance_type']}"))
    return said, ()


def _flow(plain: Plain, kind: str, where: str) -> tuple[list[Said], tuple[str, ...]]:
    """Rectified flow. Its network is told 1000 tau, as ours is."""
    prediction = str(plain.get("prediction_type", "epsilon" if kind in FLOWS else ""))
    # A flow's own classes have no such field; epsilon stands there where another scheduler's settings were taken over.
    takes = ("epsilon", "flow", "flow_prediction") if kind in FLOWS else ("flow_prediction",)
    words = f"{where}: {kind}Scheduler"
    steps = value(plain, "num_train_timesteps", 1000, where)
    if kind not in FLOWS and kind not in CHAINS:
        return _unknown(words), ()
    if prediction not in takes:
        return _unknown(f"{words}, a flow, with prediction_type {prediction[:60]}"), ()
    if steps != 1000 or plain.get("invert_sigmas"):
        return _unknown(f"{words} with num_train_timesteps {steps}, invert_sigmas {plain.get('invert_sigmas')}"), ()
    shift = value(plain, "shift" if kind in FLOWS else "flow_shift", 1.0, where)
    if not 0 < shift < math.inf:
        raise UserError(f"{where}: shift is {shift:g} and should be positive")
    said = [Said("parameterization", "flow", words), Said("schedule", replace(FLOW, shift=shift), words)]
    if not plain.get("use_dynamic_shifting"):
        return said, ()
    return said, (f"{where} shifts the steps of its grid by the picture's size; here they are shifted by {shift:g}",)


def _schedule_of(betas: Any) -> ScheduleConfig | None:
    """The schedule that a list of betas is."""
    import torch

    from ldm.checkpoints.original import schedule_of

    few = isinstance(betas, list) and len(betas) <= MAX_STEPS
    if not few or not all(isinstance(beta, int | float) and 0 <= beta <= 1 for beta in betas):
        return None
    table = torch.tensor(betas, dtype=torch.float64)
    return schedule_of(torch.cumprod(1 - table, 0), table)


def drawing_of(plain: Plain, named: str, unet: UNetConfig) -> tuple[DrawingConfig, bool]:
    """How a model with this scheduler is meant to be drawn, and whether that is assumed: a latent consistency model as
    its pipeline draws, at the scale 8.5 where the network is told it, unguided where it is not (one with a LoRA merged
    into it). A network that is told it is taken for one beside any scheduler: some are published without theirs."""
    if _bare(str(plain.get("_class_name") or named)) != "LCM":
        return (LCM, True) if unet.guidance_width else (DrawingConfig(), False)
    grid = LCM.spacing if plain.get("original_inference_steps", 50) == 50 else "trailing"  # of other levels than ours
    return replace(LCM, cfg=LCM.cfg if unet.guidance_width else 1.0, spacing=grid), False


def _bare(kind: str) -> str:
    return kind.removeprefix("Flax").removesuffix("Scheduler")


def _family(kind: str) -> str:
    return "flow" if kind in FLOWS else "chain" if kind in CHAINS else kind


def _unknown(where: str) -> list[Said]:
    """The whole law is one that our settings have no word for."""
    return [Said(key, None, where) for key in ("parameterization", "schedule")]
