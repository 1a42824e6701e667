"""Sampling from a consistency model (Song et al. 2023, algorithm 1), as latent consistency models are drawn from."""

from __future__ import annotations

from ldm.sampling.step import Sampler, walk


def lcm() -> Sampler:
    """At each level the model's x0 is taken whole, and noise of the next level is added anew: x' = f(x, s) + r n.

    Here the denoiser is a consistency function f, which gives the end point at sigma = 0 of the probability flow
    through x, not the mean of the points that x may come from; one step is enough, and more repair its faults. With
    the mean, as of an ordinary network, the output has too little variance. The step to sigma 0 gives f.
    """
    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, lambda s, r: (0.0, r))
