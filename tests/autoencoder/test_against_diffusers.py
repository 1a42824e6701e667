"""AutoencoderKL against the independent implementation in diffusers, with the same weights."""

import re

import pytest
import torch

from ldm.autoencoder.kl import AutoencoderKL
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import AutoencoderConfig

OURS_TO_THEIRS = [  # applied in order to each of our parameter names
    (r"^to_moments", "quant_conv"),
    (r"^from_latent", "post_quant_conv"),
    (r"encoder\.levels\.(\d+)\.resample\.conv", r"encoder.down_blocks.\1.downsamplers.0.conv"),
    (r"decoder\.levels\.(\d+)\.resample\.conv", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    (r"encoder\.levels\.(\d+)\.blocks", r"encoder.down_blocks.\1.resnets"),
    (r"decoder\.levels\.(\d+)\.blocks", r"decoder.up_blocks.\1.resnets"),
    (r"middle\.block_1", "mid_block.resnets.0"),
    (r"middle\.block_2", "mid_block.resnets.1"),
    (r"middle\.attention\.norm", "mid_block.attentions.0.group_norm"),
    (r"middle\.attention\.query", "mid_block.attentions.0.to_q"),
    (r"middle\.attention\.key", "mid_block.attentions.0.to_k"),
    (r"middle\.attention\.value", "mid_block.attentions.0.to_v"),
    (r"middle\.attention\.out", "mid_block.attentions.0.to_out.0"),
    (r"(norm|conv)_([12])", r"\1\2"),
    (r"norm_out", "conv_norm_out"),
    (r"shortcut", "conv_shortcut"),
]


@pytest.mark.slow
def test_the_same_weights_give_the_same_latents_and_pictures():
    declare_missing_operators()
    peers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = peers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 256),
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    ours = AutoencoderKL(AutoencoderConfig(multipliers=(1, 2, 2))).eval()
    weights = theirs.state_dict()
    translated = {}
    for name, value in ours.state_dict().items():
        foreign = name
        for pattern, replacement in OURS_TO_THEIRS:
            foreign = re.sub(pattern, replacement, foreign)
        translated[name] = weights.pop(foreign).reshape(value.shape)  # their attention is linear, ours 1 x 1
    assert not weights
    ours.load_state_dict(translated)

    image = torch.rand(2, 3, 40, 24) * 2 - 1
    with torch.no_grad():
        posterior, reference = ours.encode(image), theirs.encode(image).latent_dist
        torch.testing.assert_close(posterior.mean, reference.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, reference.logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.kl(), reference.kl(), rtol=1e-4, atol=1e-4)
        z = posterior.mode()
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)
