"""CFG++ (Chung et al. 2024): what is drawn is guided, the noise that is put back is not.

A step of DDIM is x' = D + r n, with n = (x - D) / s the noise that the denoiser sees in x. Under guidance D leaves
the data's manifold, and so does that n; here n = (x - U) / s is what the unguided prediction U sees (their algorithm
2). The guidance scale is an interpolation then, in [0, 1] as they mean it: 0.6 is about what 7.5 is elsewhere.

U is no part of the denoiser, which answers with one prediction. It is a denoiser of its own, `unguided`: asked right
after the guided one and with the very same tensors, so that it may read what that evaluation left behind
(guidance/seen.py), as `ddpm` asks for its variance.
"""

from __future__ import annotations

from ldm.diffusion.denoiser import Denoiser
from ldm.sampling.ancestral import renewed
from ldm.sampling.step import Sampler, walk


def euler_cfg_pp(unguided: Denoiser) -> Sampler:
    """Without fresh noise. `unguided` gives what guidance leads away from: the prediction without the prompt."""
    return euler_a_cfg_pp(unguided, 0.0)


def ddim_cfg_pp(unguided: Denoiser, eta: float = 0.0) -> Sampler:
    """With `eta` of fresh noise, as in DDIM; 0 is euler_cfg_pp. Raises UserError for a negative eta."""
    return euler_a_cfg_pp(unguided, eta)


def euler_a_cfg_pp(unguided: Denoiser, eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """With ancestral noise; the options are those of euler_a. Raises UserError for a negative option."""
    renewal = renewed(eta, s_noise)
    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, renewal, unguided)
