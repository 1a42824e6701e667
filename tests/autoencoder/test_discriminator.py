"""PatchGAN: how many patches, how much each sees, and independence of the batch."""

import pytest
import torch

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.errors import UserError


@pytest.mark.parametrize(
    ("layers", "size", "patches"), [(3, 256, 30), (3, 64, 6), (2, 64, 14), (1, 64, 30), (3, 24, 1), (4, 64, 2)]
)
def test_patch_count(layers, size, patches):
    logits = PatchDiscriminator(4, layers)(torch.zeros(2, 3, size, size + 2**layers))
    assert logits.shape == (2, 1, patches, patches + 1)


def test_a_logit_of_three_layers_sees_70_pixels():
    model = PatchDiscriminator(4, 3)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # its statistics see the whole picture
    image = torch.rand(1, 3, 256, 256).requires_grad_()
    model(image)[0, 0, 15, 15].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_the_original_width():
    """Convolution weights of 4 x 4 x (3 x 64 + 64 x 128 + 128 x 256 + 256 x 512 + 512), the paper's 70 x 70 net."""
    model = PatchDiscriminator(64, 3)
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 2_763_776


def test_each_picture_is_judged_alone():
    model = PatchDiscriminator(8, 2)
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-6)


def test_too_small_pictures_are_refused():
    with pytest.raises(UserError, match="discriminator_layers"):
        PatchDiscriminator(4, 3)(torch.zeros(1, 3, 64, 16))
