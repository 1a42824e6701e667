"""Averages of any length after the training, from snapshots of two (Karras et al. 2024, section 3 and appendix C).

A power-function average gives the weights of step tau the share p(tau) = (g + 1) tau^g / t^(g + 1) on [0, t]: it
grows with the run, and its deviation is a fixed share of t, the *width* sigma_rel. Snapshots of two such averages,
taken along the run, span enough profiles that a sum of them comes close to a profile of another width: least squares
finds it, in closed form, since the inner product of two profiles is an elementary integral.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.reading import read_tensors
from ldm.checkpoints.writing import write_tensors
from ldm.errors import UserError
from ldm.files import atomic_write

WIDEST = 12**-0.5  # that of the even average, g = 0


@dataclass(frozen=True)
class Profile:
    """The average of `exponent` at update `time`."""

    exponent: float
    time: float


def exponent(width: float) -> float:
    """The g > -1 of a width: width^2 = (g + 1) / ((g + 2)^2 (g + 3)), the profile's variance at t = 1.

    The width falls with g; it is the largest root. Raises UserError outside (0, 0.2887): at that g is 0.
    """
    if not 0 < width <= WIDEST + 1e-12:
        raise UserError(f"the width of an average is above 0 and at most {WIDEST:.4f} of the run, not {width}")
    s = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return float(roots.real.max())


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles.

    (g_a + 1)(g_b + 1) / (t_a^(g_a + 1) t_b^(g_b + 1)) * m^(g_a + g_b + 1) / (g_a + g_b + 1), m the earlier time;
    written with ratios of times, so that no power overflows.
    """
    m = min(a.time, b.time)
    ratio = (m / a.time) ** a.exponent * (m / b.time) ** b.exponent * m / (a.time * b.time)
    return (a.exponent + 1) * (b.exponent + 1) / (a.exponent + b.exponent + 1) * ratio


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """(N,): the sum of snapshots whose profile is nearest to `wanted` in the mean square (ibid., algorithm 3)."""
    gram = np.array([[inner(a, b) for b in snapshots] for a in snapshots])
    right = np.array([inner(a, wanted) for a in snapshots])
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of late and early snapshots differ in size by orders
    found = np.linalg.lstsq(gram * scale * scale[:, None], right * scale, rcond=1e-12)[0]
    return found * scale


def residual(snapshots: Sequence[Profile], wanted: Profile) -> float:
    """|sum - wanted| / |wanted| of the profiles that `coefficients` finds: how far off the reconstruction is."""
    x = coefficients(snapshots, wanted)
    gram = np.array([[inner(a, b) for b in snapshots] for a in snapshots])
    right = np.array([inner(a, wanted) for a in snapshots])
    square = x @ gram @ x - 2 * x @ right + inner(wanted, wanted)
    return float(np.sqrt(max(square, 0.0) / inner(wanted, wanted)))


def snapshot_path(output: Path, player: str, width: float, step: int) -> Path:
    return output / "ema" / f"{player}-{width:.4f}-{step:08d}.safetensors"


def save_snapshot(output: Path, player: str, width: float, step: int, updates: int, average: dict[str, Tensor]) -> None:
    """Keep an average for later; raises UserError if the disk does not take it."""
    with atomic_write(snapshot_path(output, player, width, step)) as temporary:
        write_tensors(average, temporary, {"updates": str(updates)})


def reconstruct(output: Path, player: str, width: float, step: int = 0) -> tuple[dict[str, Tensor], float]:
    """The average of `width` at a snapshot's `step` (0: the last), from the snapshots up to it; and its residual.

    Raises UserError if there are none. The sum runs in float64, one snapshot in memory at a time.
    """
    from ldm.checkpoints.reading import read_metadata

    found: list[tuple[Path, Profile, int]] = []
    for path in sorted((output / "ema").glob(f"{player}-*.safetensors")):
        match = re.fullmatch(rf"{re.escape(player)}-([0-9.]+)-(\d{{8}})", path.stem)
        if match and (not step or int(match[2]) <= step):
            updates = int(read_metadata(path).get("updates", "0"))
            found.append((path, Profile(exponent(float(match[1])), updates), int(match[2])))
    if not found:
        raise UserError(
            f"{output / 'ema'} has no snapshots of {player}; train with loop.ema_widths=[0.05,0.1] "
            "loop.ema_snapshot_every=1000"
        )
    wanted = Profile(exponent(width), max(profile.time for _, profile, _ in found))
    profiles = [profile for _, profile, _ in found]
    total: dict[str, Tensor] = {}
    for (path, _, _), weight in zip(found, coefficients(profiles, wanted), strict=True):
        for name, tensor in read_tensors(path).items():
            part = tensor.double() * float(weight)
            total[name] = total[name] + part if name in total else part
    return {name: tensor.to(torch.float32) for name, tensor in total.items()}, residual(profiles, wanted)
