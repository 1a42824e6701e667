"""Codec: shift and scale, sizes, the identity, tiling, and results that are not finite."""

import math

import pytest
import torch

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.tiling import feather, map_tiles
from ldm.config import AutoencoderConfig
from ldm.errors import UserError

IDENTITY = AutoencoderConfig(kind="identity", scale=(1.0,))


def small(**changes) -> Codec:
    settings = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1} | changes
    config = AutoencoderConfig(**settings)
    torch.manual_seed(0)
    return Codec(AutoencoderKL(config).requires_grad_(False), config)


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def smooth(height: int, width: int) -> torch.Tensor:
    """(1, 3, H, W): slow waves, a different one in each channel"""
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)[None, :]
    waves = [torch.sin(2 * x + y), torch.cos(1.5 * y - x), torch.sin(1.0 + x * y)]
    return 0.8 * torch.stack(waves)[None]


# ------------------------------------------------------------ shift and scale


@pytest.mark.parametrize(
    ("shift", "scale"),
    [((0.0,), (0.18215,)), ((0.3,), (2.0,)), ((0.1, -0.2, 0.3, 5.0), (0.5, 1.0, 2.0, 0.1))],
)
def test_shift_and_scale_round_trip(shift, scale):
    codec = small(shift=shift, scale=scale)
    z = picture(2, 4, 3, 5)
    torch.testing.assert_close(codec.from_latent(codec.to_latent(z)), z, rtol=1e-5, atol=1e-6)
    for channel in range(4):
        s, k = shift[channel % len(shift)], scale[channel % len(scale)]
        torch.testing.assert_close(codec.to_latent(z)[:, channel], (z[:, channel] - s) * k)


def test_encode_is_the_scaled_mode_or_the_scaled_sample():
    codec, image = small(shift=(0.5,), scale=(3.0,)), picture(2, 3, 8, 12)
    noise = torch.randn(2, 4, 2, 3)
    posterior = codec.posterior(image)
    torch.testing.assert_close(codec.encode(image), (posterior.mean - 0.5) * 3)
    torch.testing.assert_close(codec.encode(image, noise), (posterior.sample(noise) - 0.5) * 3)


def test_decode_undoes_the_scale_and_clamps():
    codec, z = small(shift=(0.5,), scale=(3.0,)), 3 * picture(2, 4, 2, 3)
    decoded = codec.autoencoder.decode(z)
    decoded = codec.decode(codec.to_latent(z)) - decoded.clamp(-1, 1)
    assert decoded.abs().max() < 1e-5
    codec.autoencoder.decoder.last_layer.weight.mul_(100)
    assert codec.decode(z).abs().max() == 1.0


@pytest.mark.parametrize("settings", [{"scale": (1.0, 2.0)}, {"shift": ()}, {"scale": (0.0,)}, {"shift": (math.nan,)}])
def test_a_shift_or_scale_that_does_not_fit_is_refused(settings):
    with pytest.raises(UserError, match=r"shift|scale"):
        small(**settings)


def test_kind_and_network_must_agree():
    with pytest.raises(ValueError, match="identity"):
        Codec(small().autoencoder, IDENTITY)
    with pytest.raises(ValueError, match="kl"):
        Codec(None, AutoencoderConfig())


# ------------------------------------------------------------ sizes and precision


def test_latent_shape():
    codec = small()
    assert codec.factor == 4 and codec.latent_channels == 4
    assert codec.latent_shape(16, 24) == (4, 4, 6)


@pytest.mark.parametrize(
    ("height", "width", "near"), [(64, 66, "64x64 or 68x64"), (3, 9, "8x4 or 12x4"), (0, 8, "8x4;?$"), (-4, 8, "8x4")]
)
def test_a_size_that_does_not_fit_names_those_that_do(height, width, near):
    with pytest.raises(UserError, match=near):
        small().latent_shape(height, width)


def test_a_picture_that_does_not_fit_is_refused_before_any_work():
    with pytest.raises(UserError, match="multiples of 4"):
        small().encode(picture(1, 3, 10, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_borders_are_float32_in_every_precision(dtype):
    codec, image = small(), picture(1, 3, 16, 16)
    latent = codec.encode(image)
    whole = codec.decode(latent)
    assert codec.to(dtype=dtype) is codec
    assert next(codec.autoencoder.parameters()).dtype == dtype
    half_latent, half = codec.encode(image), codec.decode(latent)
    assert half_latent.dtype == half.dtype == torch.float32
    assert (half_latent - latent).abs().max() < 0.05 * latent.abs().max()
    assert (half - whole).abs().mean() < 0.05


# ------------------------------------------------------------ the identity


def test_identity_passes_pictures_through():
    codec, image = Codec(None, IDENTITY), picture(2, 3, 7, 5)
    assert codec.factor == 1 and codec.latent_shape(7, 5) == (3, 7, 5)
    assert torch.equal(codec.encode(image), image)
    assert torch.equal(codec.encode(image, torch.randn_like(image)), image)
    assert torch.equal(codec.decode(image), image)
    torch.testing.assert_close(codec.decode_tiled(codec.encode_tiled(image, 4, 2), 4, 2), image)
    assert codec.to(dtype=torch.float16).encode(image).dtype == torch.float32


def test_identity_shifts_and_scales():
    codec = Codec(None, AutoencoderConfig(kind="identity", shift=(0.1, 0.2, 0.3), scale=(2.0,)))
    image = picture(1, 3, 4, 4)
    torch.testing.assert_close(codec.encode(image)[:, 2], (image[:, 2] - 0.3) * 2)
    torch.testing.assert_close(codec.decode(codec.encode(image)), image)


# ------------------------------------------------------------ tiling


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(64, 64, 8), (10, 64, 32), (64, 16, 0), (64, 16, 4), (61, 16, 15), (17, 16, 8)]
)
def test_feathered_weights_sum_to_one(length, tile, overlap):
    total = torch.zeros(length)
    for start, weights in feather(length, tile, overlap):
        assert (weights > 0).all() and start + len(weights) <= length and len(weights) == min(tile, length)
        total[start : start + len(weights)] += weights
    torch.testing.assert_close(total, torch.ones(length))


def test_weights_fall_evenly_across_a_seam():
    (_, left), (start, right) = feather(12, 8, 4)
    assert start == 4
    torch.testing.assert_close(left, torch.tensor([1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]))
    torch.testing.assert_close(right, left.flip(0))


def test_tiles_of_a_pointwise_map_are_seamless_and_of_the_size_asked_for():
    sizes = set()

    def enlarge(piece: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(piece.shape[-2:]))
        return torch.nn.functional.interpolate(piece, scale_factor=4.0) ** 2

    x = picture(2, 3, 11, 9)
    torch.testing.assert_close(map_tiles(enlarge, x, 4, 1, grow=4), enlarge(x))
    assert sizes == {(4, 4), (11, 9)}
    shrink = torch.nn.AvgPool2d(2)
    big = picture(2, 3, 22, 18)
    torch.testing.assert_close(map_tiles(shrink, big, 8, 2, shrink=2), shrink(big))


def test_a_tile_as_large_as_the_picture_is_the_whole_picture():
    codec, image = small(), smooth(16, 24)
    latent = codec.encode(image)
    assert torch.equal(codec.encode_tiled(image, 64, 16), latent)
    assert torch.equal(codec.decode_tiled(latent, 64, 16), codec.decode(latent))


def test_tiled_coding_of_a_smooth_picture_differs_little():
    """Without attention and norms, a tile differs from the whole only near its cut edges, where the feathered weight
    is small; what is left is compared with the same tiles put edge to edge."""
    codec = small(middle_attention=False)
    for module in codec.autoencoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # statistics of a tile are not those of the picture: not the subject here
    image = smooth(64, 96)
    latent = codec.encode(image)
    whole = codec.decode(latent)

    def error(overlap: int) -> tuple[float, float]:
        encoded = (codec.encode_tiled(image, 32, overlap) - latent).abs().mean() / latent.std()
        decoded = (codec.decode_tiled(latent, 32, overlap) - whole).abs().mean() / whole.std()
        return encoded.item(), decoded.item()

    hard, soft = error(0), error(16)
    assert soft[0] < 0.6 * hard[0] and soft[1] < 0.3 * hard[1], (hard, soft)
    assert soft[0] < 0.03 and soft[1] < 0.1, (hard, soft)


def test_tiled_encoding_samples_with_one_noise_for_the_whole_latent():
    codec, image = small(), smooth(32, 32)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mode, sample = codec.encode_tiled(image, 16, 8), codec.encode_tiled(image, 16, 8, noise)
    assert ((sample - mode) * noise > 0).all()


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (30, 8), (32, 6), (32, 32), (32, -4)])
def test_tiles_that_cannot_be_are_refused(tile, overlap):
    codec = small()
    with pytest.raises(UserError, match="multiples of 4"):
        codec.encode_tiled(picture(1, 3, 64, 64), tile, overlap)
    with pytest.raises(UserError, match="multiples of 4"):
        codec.decode_tiled(picture(1, 4, 16, 16), tile, overlap)


# ------------------------------------------------------------ results that are not finite


def overflowing() -> Codec:
    """In half precision an activation before the last norm passes 65504; in float32 all is well."""
    codec = small()
    with torch.no_grad():
        for half in (codec.autoencoder.encoder, codec.autoencoder.decoder):
            half.middle.block_2.conv_2.bias.fill_(6e4)
            half.middle.block_1.conv_2.bias.fill_(6e4)
    return codec


def test_an_overflow_in_half_precision_is_computed_again_in_float32():
    codec, image = overflowing(), picture(1, 3, 16, 16)
    latent = codec.encode(image)
    expected = codec.decode(latent)
    codec.to(dtype=torch.float16)
    assert not codec.autoencoder.decode(latent.half()).isfinite().all()
    decoded = codec.decode(latent)
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded, expected, atol=0.02, rtol=0.02)  # the weights stay those of half precision
    assert codec.encode(image).isfinite().all()
    assert codec.decode_tiled(latent, 8, 4).isfinite().all()
    assert next(codec.autoencoder.parameters()).dtype == torch.float16


def test_an_overflow_under_autocast_is_computed_again_without_it():
    codec = overflowing()
    latent = codec.encode(picture(1, 3, 16, 16))
    expected = codec.decode(latent)
    with torch.autocast("cpu", torch.float16):
        assert not codec.autoencoder.decode(latent).isfinite().all()
        decoded = codec.decode(latent)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_decode_that_stays_not_finite_fails(dtype):
    codec = small()
    codec.autoencoder.decoder.last_layer.bias.fill_(math.nan)
    codec.to(dtype=dtype)
    with pytest.raises(UserError, match="not finite"):
        codec.decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("codec", [small(), Codec(None, IDENTITY)], ids=["kl", "identity"])
def test_a_latent_that_is_not_finite_fails(codec):
    latent = torch.zeros(1, codec.latent_channels, 4, 4)
    latent[0, 0, 0, 0] = math.inf
    with pytest.raises(UserError, match="not finite"):
        codec.decode(latent)
    with pytest.raises(UserError, match="not finite"):
        codec.decode_tiled(latent, 16, 4)
