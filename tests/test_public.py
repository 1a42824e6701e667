"""`import ldm` is cheap and does nothing; its names are there when they are asked for."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import ldm
from ldm.jobs import catalogue

CHEAP = """
import sys, time
start = time.process_time()
import ldm
spent = time.process_time() - start
assert not {"torch", "numpy", "PIL", "open_clip"} & set(sys.modules), "heavy imports"
assert spent < 0.05, f"{spent * 1000:.0f} ms"
import ldm.jobs, ldm.provenance, ldm.api
assert not {"torch", "numpy", "open_clip"} & set(sys.modules), "jobs are told wrong before torch is there"
"""


def test_importing_is_cheap() -> None:
    done = subprocess.run([sys.executable, "-c", CHEAP], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names() -> None:
    for name in (*ldm.__all__, "__version__"):
        assert name in dir(ldm) and getattr(ldm, name)
    with pytest.raises(AttributeError):
        _ = ldm.nothing  # type: ignore[attr-defined]


def test_each_sampler_is_given_the_noise_that_it_needs() -> None:
    """A path where more steps refine the same picture; a stream where one level takes several independent normals."""
    kinds = {name: info.noise for name, info in catalogue.SAMPLERS.items()}
    sde = {"dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde", "euler_maruyama"}
    ancestral = {"ddim", "ddpm", "euler_a", "dpm_2_a", "dpmpp_2s_a", "ddim_cfg_pp", "euler_a_cfg_pp"}
    assert {name for name, kind in kinds.items() if kind == "path"} == sde | ancestral
    assert {name for name, kind in kinds.items() if kind == "stream"} == {"heun", "lcm", "langevin", "pc", "restart"}


def test_names_known_without_torch_are_the_real_ones() -> None:
    from ldm.sampling import GRIDS, SAMPLERS

    assert set(catalogue.SAMPLERS) == set(SAMPLERS) and set(catalogue.GRIDS) == set(GRIDS)
    for name, info in catalogue.SAMPLERS.items():
        found = inspect.signature(SAMPLERS[name]).parameters.values()
        of_model = ("schedule", "fraction", "unguided")
        assert info.options == {p.name: p.default for p in found if p.name not in of_model}, name
        assert info.unguided == any(p.name == "unguided" for p in found)
