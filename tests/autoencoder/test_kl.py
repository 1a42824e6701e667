"""AutoencoderKL: Stable Diffusion's size, shapes for each factor, precisions, memory formats, independence."""

import pytest
import torch

from ldm.autoencoder.blocks import group_norm
from ldm.autoencoder.kl import AutoencoderKL
from ldm.config import AutoencoderConfig
from ldm.errors import UserError


def small(**changes) -> AutoencoderKL:
    settings = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1} | changes
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig(**settings))


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_default_configuration_is_stable_diffusions():
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert len(model.state_dict()) == 248
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert all(norm.num_groups == 32 and norm.eps == 1e-6 for norm in norms)


def groups_of(model: AutoencoderKL) -> set[int]:
    return {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)}


def test_the_groups_of_the_norms_are_the_usual_ones_or_those_asked_for():
    assert groups_of(small(channels=32)) == {8, 16}  # four channels each: what all checkpoints without the setting have
    assert groups_of(small(channels=32, norm_groups=8, attention_levels=(1,))) == {8}
    for groups in (3, 12, 64):
        with pytest.raises(UserError, match=rf"a layer of 32 channels, which the {groups} groups of its norm do not"):
            small(channels=32, norm_groups=groups)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"multipliers": (1,)}, 1),
        ({"multipliers": (1, 2, 2)}, 4),
        ({"multipliers": (1, 2), "patch": 2}, 4),
        ({"multipliers": (1, 1, 2, 2)}, 8),
        ({"multipliers": (1, 2), "patch": 4}, 8),
        ({"multipliers": (1, 1, 2, 2, 2)}, 16),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5)])
def test_shapes(settings, factor, height, width):
    model = small(**settings, latent_channels=3)
    image = picture(2, 3, height * factor, width * factor)
    decoded, posterior = model(image, torch.randn(2, 3, height, width))
    assert model.config.factor == factor
    assert posterior.mean.shape == posterior.logvar.shape == (2, 3, height, width)
    assert decoded.shape == image.shape


def test_attention_only_where_asked_for():
    def count(**settings) -> int:
        return sum("query.weight" in name for name in small(**settings).state_dict())

    assert count() == 2  # the two middles
    assert count(middle_attention=False) == 0
    assert count(middle_attention=False, attention_levels=(2,)) == 1 + 2  # blocks, and one more in the decoder
    model = small(attention_levels=(1, 2))
    assert model(picture(1, 3, 16, 8), torch.randn(1, 4, 4, 2))[0].shape == (1, 3, 16, 8)


def test_attention_lets_a_corner_reach_all_others():
    model = small(multipliers=(1, 1)).eval()
    image = picture(1, 3, 64, 64).requires_grad_()
    model.decode(model.encode(image).mode())[0, :, 0, 0].sum().backward()
    assert image.grad is not None and image.grad[0, :, -4:, -4:].abs().max() > 0


def test_each_picture_is_coded_alone():
    model = small(attention_levels=(1,))
    images = picture(3, 3, 16, 16)
    together = model.encode(images).mean
    alone = torch.cat([model.encode(image[None]).mean for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_is_close_and_its_posterior_float32():
    model, image = small(channels=32), picture(2, 3, 32, 32)
    noise = torch.randn(2, 4, 8, 8)
    decoded, posterior = model(image, noise)
    with torch.autocast("cpu", torch.bfloat16):
        decoded_half, posterior_half = model(image, noise)
        decoded_half.float().square().mean().backward()
    assert decoded_half.dtype == torch.bfloat16 and posterior_half.mean.dtype == torch.float32
    assert (posterior_half.mean - posterior.mean).abs().max() < 0.03 * posterior.mean.abs().max()
    assert (decoded_half - decoded).abs().mean() < 0.03 * decoded.std()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())


def test_channels_last_is_the_same_function_and_stays_so():
    model, image = small(channels=32), picture(2, 3, 32, 32)
    plain, _ = model(image, torch.zeros(2, 4, 8, 8))
    model.to(memory_format=torch.channels_last)
    last, _ = model(image.contiguous(memory_format=torch.channels_last), torch.zeros(2, 4, 8, 8))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


def test_last_layer_is_the_decoders_last_convolution():
    model = small(patch=2)
    assert model.decoder.last_layer.weight.shape == (3 * 2**2, 8, 3, 3)
    assert list(model.decoder.modules())[-1] is model.decoder.last_layer


def test_narrow_norms_keep_the_level_of_a_group():
    for channels in (4, 8, 20, 32, 48, 96, 128, 512):
        norm = group_norm(channels)
        assert channels % norm.num_groups == 0 and channels // norm.num_groups >= 4
    assert group_norm(3).num_groups == 1 and group_norm(128).num_groups == 32


@pytest.mark.parametrize(
    "settings",
    [{"kind": "identity"}, {"multipliers": ()}, {"blocks": 0}, {"attention_levels": (3,)}, {"latent_channels": 0}],
)
def test_a_configuration_without_a_network_is_refused(settings):
    with pytest.raises(UserError):
        small(**settings)
