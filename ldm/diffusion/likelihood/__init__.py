"""How likely a model finds pictures: DDPM's variational bound, and the probability flow's exact density.

grid = make_grid(schedule, schedule.steps)
print(bound(denoiser, x0, grid, schedule, noise).total)          # a mean, and the space it belongs to

start = float(schedule.start_scale(schedule.sigmas[-1]))
density = flow_log_density(denoiser, x0, schedule.sigma_min, schedule.sigma_max, start, draw_probes(seeds, shape))
print(density_bits(density.log_density, x0[0].numel()))
"""

from ldm.diffusion.likelihood.bits import LATENT, PIXELS, BitsPerDim, Space, density_bits, space_of
from ldm.diffusion.likelihood.bound import Bound, bound, draw_uniform, optimal_variance, step_nats
from ldm.diffusion.likelihood.flow import FlowDensity, flow_log_density
from ldm.diffusion.trace import draw_probes

__all__ = [
    "LATENT",
    "PIXELS",
    "BitsPerDim",
    "Bound",
    "FlowDensity",
    "Space",
    "bound",
    "density_bits",
    "draw_probes",
    "draw_uniform",
    "flow_log_density",
    "optimal_variance",
    "space_of",
    "step_nats",
]
