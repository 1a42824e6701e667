from __future__ import annotations

import math

import pytest
import torch

from ldm.unet.embedding import FourierFeatures, Sinusoid


def test_sinusoid_is_cosines_then_sines():
    t = torch.tensor([0.0, 1.0, 999.0])
    features = Sinusoid(8)(t)
    assert features.dtype == torch.float32 and features.shape == (3, 8)
    for row, time in enumerate(t.tolist()):
        for i in range(4):
            phase = time * math.exp(-math.log(10_000) * i / 4)
            assert features[row, i].item() == pytest.approx(math.cos(phase), abs=1e-4)
            assert features[row, 4 + i].item() == pytest.approx(math.sin(phase), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Sinusoid, FourierFeatures])
def test_features_do_not_depend_on_the_precision_of_the_module(kind: type, dtype: torch.dtype):
    features, t = kind(64), torch.tensor([0.25, 500.5, 999.0])
    expected = features(t)
    assert torch.equal(features.to(dtype)(t), expected)


def test_fourier_features_have_the_stated_scale():
    torch.manual_seed(0)
    features = FourierFeatures(20_000)
    assert features.frequencies.std().item() == pytest.approx(1, rel=0.03)
    # E cos(2 pi f u) = exp(-(2 pi u)^2 / 2) for f ~ N(0, 1)
    for t in (0.0, 25.0, 50.0, 250.0):
        mean = features(torch.tensor([t]))[0, :10_000].mean().item()
        assert mean == pytest.approx(math.exp(-((2 * math.pi * t / 250) ** 2) / 2), abs=0.03)
