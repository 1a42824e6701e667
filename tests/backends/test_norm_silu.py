"""Group normalization and SiLU in Triton: what torch gives, on a GPU and by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unet.small import randomize, relative

from ldm.unet.blocks import ResidualBlock

SHAPES = ((2, 12, 9, 7), (1, 8, 50, 45))  # the second has more in a group than a program reads
ROOT = Path(__file__).parents[2]


def compare(device: str) -> None:
    """The kernels, and a residual block by them; in a process that may import Triton."""
    from ldm.backends.norm_silu import FusedResidualBlock, available, fused, norm_silu

    torch.manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        assert available(device, dtype), dtype
        for shape in SHAPES:
            norm = nn.GroupNorm(4, shape[1], eps=1e-6).to(device, dtype)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            x, add = torch.randn(shape).mul(4).add(7), torch.randn(shape[:2])
            x, add = x.to(device, dtype), add.to(device, dtype)
            for order in (torch.contiguous_format, torch.channels_last):
                x = x.contiguous(memory_format=order)
                for more in (None, add):
                    with torch.no_grad():
                        found = norm_silu(x, norm, more)
                        summed = x.double() if more is None else x.double() + more.double()[:, :, None, None]
                        weight, bias = norm.weight.double(), norm.bias.double()
                        wanted = F.silu(F.group_norm(summed, 4, weight, bias, 1e-6))
                    assert found.dtype == dtype and found.stride() == x.stride()
                    assert relative(found.double(), wanted) < bound, (dtype, shape, order, more is None)
    for scale_shift in (False, True):
        block, plain = (residual_block(scale_shift).to(device) for _ in range(2))
        fused(block)
        assert type(block) is FusedResidualBlock
        x, embedding = torch.randn(2, 8, 6, 5).to(device), torch.randn(2, 16).to(device)
        with torch.no_grad():
            assert relative(block(x, embedding), plain(x, embedding)) < (1e-5 if device == "cpu" else 1e-3)
        assert block.state_dict().keys() == plain.state_dict().keys()
        x.requires_grad_()
        block(x, embedding).sum().backward()  # by torch's own
        assert x.grad is not None


def residual_block(scale_shift: bool) -> ResidualBlock:
    torch.manual_seed(0)
    return randomize(ResidualBlock(8, 12, 16, scale_shift, 0.0)).eval().requires_grad_(False)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_give_what_torch_gives() -> None:
    compare("cuda")


@pytest.mark.slow
def test_interpreted_the_kernels_give_what_torch_gives() -> None:
    pytest.importorskip("triton")
    script = "from backends.test_norm_silu import compare; compare('cpu')"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_device_for_them_the_network_stays_as_it_is() -> None:
    pytest.importorskip("triton")
    script = (
        "from ldm.backends.norm_silu import available, fused; import torch;"
        "from backends.test_norm_silu import ResidualBlock, residual_block;"
        "assert not available('cpu', torch.float32); assert type(fused(residual_block(False))) is ResidualBlock"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths} | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
