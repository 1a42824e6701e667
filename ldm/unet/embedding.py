"""What the network is told beside the picture and the text: the noise level, a class or a vector, the guidance scale.

Everything here ends as one embedding (B, 4 * channels), which each residual block adds to its features or scales and
shifts them by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LONGEST_PERIOD = 10_000.0  # of the sinusoids, in steps over 2 pi (Vaswani et al. 2017, section 3.5)
FOURIER_UNIT = 250.0  # steps; t / 250 spans [0, 4) over 1000 steps, about what ln sigma spans


class Sinusoid(nn.Module):
    """t (B,) -> [cos(w t) | sin(w t)] (B, width), float32, w_i = 10000^(-2 i / width).

    The frequencies are computed anew at each call: as a buffer they would be rounded when the module is cast.
    """

    def __init__(self, width: int):
        super().__init__()
        self.pairs = width // 2

    def forward(self, t: Tensor) -> Tensor:
        index = torch.arange(self.pairs, dtype=torch.float32, device=t.device)
        return _cos_sin(t, torch.exp(-math.log(LONGEST_PERIOD) / self.pairs * index))


class FourierFeatures(nn.Module):
    """t (B,) -> [cos(2 pi f u) | sin(2 pi f u)] (B, width), float32, u = t / 250, f ~ N(0, 1) drawn once.

    Tancik et al. 2020; for noise levels Song et al. 2021, appendix C.1. The frequencies are part of the checkpoint, and
    are drawn as bfloat16 numbers: casting the module to half precision and back leaves them as they were.
    """

    frequencies: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2).bfloat16().float())

    def forward(self, t: Tensor) -> Tensor:
        return _cos_sin(t, self.frequencies.float() * (2 * math.pi / FOURIER_UNIT))


def guidance_features(scale: Tensor, width: int) -> Tensor:
    """cfg (B,) -> [sin(f w) | cos(f w)] (B, width), float32, w = 1000 (cfg - 1), f_i = 10000^(-i / (width / 2 - 1)).

    Luo et al. 2023 call cfg - 1 the guidance scale, and embed it so in their code.
    """
    pairs = width // 2
    index = torch.arange(pairs, dtype=torch.float32, device=scale.device)
    phase = 1000 * (scale.float() - 1)[:, None] * torch.exp(-math.log(LONGEST_PERIOD) / max(pairs - 1, 1) * index)
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def _cos_sin(t: Tensor, frequencies: Tensor) -> Tensor:
    phase = t.float()[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1)


FEATURES: dict[str, type[Sinusoid] | type[FourierFeatures]] = {"sinusoid": Sinusoid, "fourier": FourierFeatures}


class EmbeddingMLP(nn.Module):
    """(B, in_width) -> (B, out_width): linear, SiLU, linear."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.linear_in = nn.Linear(in_width, out_width)
        self.activation = nn.SiLU()
        self.linear_out = nn.Linear(out_width, out_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_out(self.activation(self.linear_in(features)))
