"""Denoiser -> latent. A sampler is a generator of `Step`s that knows no prompt, guidance or parameterization.

sigmas = make_grid(schedule, 30, "trailing")
noise = NoiseStream([seed, seed + 1], (C, h, w))
x = start(noise.initial(), schedule, sigmas)
for step in ddim()(denoiser, x, sigmas, noise):
    x = step.x
latent = finish(x, schedule, sigmas)
"""

from collections.abc import Callable

from ldm.sampling.adams import deis, gradient_estimation, ipndm, lms, plms, res_multistep
from ldm.sampling.adaptive import dpm_adaptive
from ldm.sampling.ancestral import dpm_2_a, dpmpp_2s_a, euler_a
from ldm.sampling.cfg_pp import ddim_cfg_pp, euler_a_cfg_pp, euler_cfg_pp
from ldm.sampling.consistency import lcm
from ldm.sampling.ddim import ddim
from ldm.sampling.ddpm import ddpm
from ldm.sampling.dpm_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from ldm.sampling.grid import GRIDS, listed, make_grid, weakened
from ldm.sampling.langevin import langevin, pc
from ldm.sampling.multistep import dpmpp_2m, unipc
from ldm.sampling.noise import BrownianPath, NoiseStream
from ldm.sampling.ode import ode
from ldm.sampling.one_step import dpm_2, euler, heun
from ldm.sampling.restart import restart
from ldm.sampling.reverse_sde import euler_maruyama
from ldm.sampling.single_step import dpm_fast
from ldm.sampling.step import Noise, Sampler, Step, finish, start

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpm_2_a": dpm_2_a,
    "dpm_fast": dpm_fast,
    "dpm_adaptive": dpm_adaptive,
    "dpmpp_2s_a": dpmpp_2s_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "lms": lms,
    "deis": deis,
    "ipndm": ipndm,
    "res_multistep": res_multistep,
    "gradient_estimation": gradient_estimation,
    "ddim_cfg_pp": ddim_cfg_pp,
    "euler_cfg_pp": euler_cfg_pp,
    "euler_a_cfg_pp": euler_a_cfg_pp,
    "restart": restart,
    "lcm": lcm,
    "langevin": langevin,
    "pc": pc,
    "euler_maruyama": euler_maruyama,
    "ode": ode,
}
"""Each name's factory; what it takes is in its docstring, and in ldm/jobs/catalogue.py with the noise that it wants."""

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "BrownianPath",
    "Noise",
    "NoiseStream",
    "Sampler",
    "Step",
    "ddim",
    "ddim_cfg_pp",
    "ddpm",
    "deis",
    "dpm_2",
    "dpm_2_a",
    "dpm_adaptive",
    "dpm_fast",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_a",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_a",
    "euler_a_cfg_pp",
    "euler_cfg_pp",
    "euler_maruyama",
    "finish",
    "gradient_estimation",
    "heun",
    "ipndm",
    "langevin",
    "lcm",
    "listed",
    "lms",
    "make_grid",
    "ode",
    "pc",
    "plms",
    "res_multistep",
    "restart",
    "start",
    "unipc",
    "weakened",
]
