"""The mathematics: noise laws, what a network predicts, losses. No networks in here, and tables in float64 on the CPU.

Everything is said in the coordinates x = x0 + sigma n with n ~ N(0, I): the noisy latent divided by its alpha, so that
one number, sigma, tells how noisy it is (Karras et al. 2022, "Elucidating the design space").
"""

from ldm.diffusion.binding import bind, precondition
from ldm.diffusion.denoiser import Branches, Denoiser, Network
from ldm.diffusion.law import Law, make_law
from ldm.diffusion.learned_variance import Fraction, LearnedVariance
from ldm.diffusion.levels import draw_levels
from ldm.diffusion.loss import check_loss, diffusion_loss, weight
from ldm.diffusion.parameterization import PARAMETERIZATIONS, Parameterization, check, make_parameterization
from ldm.diffusion.schedule import Schedule, make_schedule

__all__ = [
    "PARAMETERIZATIONS",
    "Branches",
    "Denoiser",
    "Fraction",
    "Law",
    "LearnedVariance",
    "Network",
    "Parameterization",
    "Schedule",
    "bind",
    "check",
    "check_loss",
    "diffusion_loss",
    "draw_levels",
    "make_law",
    "make_parameterization",
    "make_schedule",
    "precondition",
    "weight",
]
