"""AutoencoderKL against the independent implementation in diffusers, with the same weights."""

import pytest
import torch

from ldm.autoencoder.kl import AutoencoderKL
from ldm.checkpoints.diffusers import autoencoder_names
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import AutoencoderConfig


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
    state = ours.state_dict()
    translated = {  # their attention is linear, ours 1 x 1
        name: weights.pop(foreign).reshape(state[name].shape) for name, (foreign,) in autoencoder_names(state).items()
    }
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
