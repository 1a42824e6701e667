"""Power-function averages against their integrals, and averages of other widths made of their snapshots."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.errors import UserError
from ldm.training.ema import EMA, power
from ldm.training.posthoc import Profile, coefficients, exponent, inner, reconstruct, residual
from ldm.training.stage_two import diffusion_stage

from .test_combinations import PLAIN
from .test_ema import Scalar
from .toys import CPU, LOOP, ToyStage, run


def test_the_width_is_the_profile_s_deviation():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)  # ibid.
    assert exponent(12**-0.5) == pytest.approx(0, abs=1e-6)
    for width in (0.02, 0.1, 0.2):
        g = exponent(width)
        mean = quad(lambda u: u * (g + 1) * u**g, 0, 1)[0]  # noqa: B023
        square = quad(lambda u: u**2 * (g + 1) * u**g, 0, 1)[0]  # noqa: B023
        assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-4)
    for width in (0.0, 0.3):
        with pytest.raises(UserError, match="is above 0 and at most"):
            exponent(width)


def test_inner_products_are_the_integrals():
    a, b = Profile(17.0, 3.0), Profile(6.9, 5.0)
    p = lambda x, t: (x.exponent + 1) * t**x.exponent / x.time ** (x.exponent + 1)  # noqa: E731
    assert inner(a, b) == pytest.approx(quad(lambda t: p(a, t) * p(b, t), 0, 3)[0], rel=1e-8)
    assert inner(a, b) == pytest.approx(inner(b, a), rel=1e-12)
    assert np.isfinite(inner(Profile(400.0, 1e7), Profile(300.0, 9e6)))


def test_the_recursion_is_the_average_of_the_profile():
    """Weights that are tau at update tau have the mean t (g + 1) / (g + 2), up to the steps' width."""
    module, steps = Scalar(), 2000
    average = EMA(module, power(0.1))
    for n in range(1, steps + 1):
        with torch.no_grad():
            module.weight.fill_(n)
        average.update()
    g = exponent(0.1)
    assert float(average.average["weight"]) == pytest.approx(steps * (g + 1) / (g + 2), rel=1e-3)


def test_other_widths_come_out_of_two():
    """Weights that wander: what was averaged along the way and what is put together afterwards agree."""
    steps, every = 1200, 60
    torch.manual_seed(0)
    path = torch.randn(steps).cumsum(0)
    module = Scalar()
    kept, wanted = {w: EMA(module, power(w)) for w in (0.05, 0.1)}, {w: EMA(module, power(w)) for w in (0.07, 0.15)}
    snapshots: list[tuple[Profile, float]] = []
    for n in range(1, steps + 1):
        with torch.no_grad():
            module.weight.fill_(path[n - 1])
        for average in (*kept.values(), *wanted.values()):
            average.update()
        if n % every == 0:
            snapshots += [(Profile(exponent(w), n), float(a.average["weight"])) for w, a in kept.items()]
    for width, average in wanted.items():
        target = Profile(exponent(width), steps)
        profiles = [profile for profile, _ in snapshots]
        made = coefficients(profiles, target) @ np.array([value for _, value in snapshots])
        assert residual(profiles, target) < 0.01
        assert float(made) == pytest.approx(float(average.average["weight"]), abs=0.02 * float(path.std()))


def test_a_profile_that_is_a_snapshot_is_that_snapshot():
    profiles = [Profile(exponent(w), t) for t in (100, 200, 300) for w in (0.05, 0.1)]
    assert coefficients(profiles, profiles[4]) == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-6)


def test_a_run_keeps_snapshots_and_goes_on_with_its_averages(tmp_path):
    loop = replace(LOOP, ema_widths=(0.1, 0.2), ema_snapshot_every=2)
    run(ToyStage(), loop, tmp_path / "whole")
    run(ToyStage(), replace(loop, steps=3), tmp_path / "parts")
    run(ToyStage(), loop, tmp_path / "parts")
    names = [f"net-{w}-{s:08d}.safetensors" for w in ("0.1000", "0.2000") for s in (2, 4, 6)]
    assert sorted(p.name for p in (tmp_path / "whole" / "ema").iterdir()) == names
    one, two = (reconstruct(tmp_path / name, "net", 0.2)[0] for name in ("whole", "parts"))
    last = native.read_tensors(tmp_path / "whole" / "ema" / names[-1])
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.allclose(one[key], last[key], atol=1e-5) for key in last)
    with pytest.raises(UserError, match=r"has no snapshots of unet; train with loop\.ema_widths"):
        reconstruct(tmp_path / "whole", "unet", 0.1)


def test_the_tool_makes_a_model_of_another_width(tmp_path):
    config = replace(PLAIN, loop=replace(LOOP, steps=4, ema_widths=(0.1, 0.2), ema_snapshot_every=2, validate_every=99))
    run(diffusion_stage(config, 0, 1, CPU), config.loop, tmp_path / "run", config)
    tool = Path(__file__).parents[2] / "tools" / "reconstruct_ema.py"
    words = [str(tmp_path / "run"), "--width", "0.1", "--output", str(tmp_path / "made")]
    done = subprocess.run([sys.executable, str(tool), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = open_checkpoint(tmp_path / "made").load("unet").state_dict()
    last = native.read_tensors(tmp_path / "run" / "ema" / "unet-0.1000-00000004.safetensors")
    assert all(torch.allclose(made[key], last[key], atol=1e-5) for key in last)
    assert native.read_config(tmp_path / "made") == native.read_config(tmp_path / "run")
