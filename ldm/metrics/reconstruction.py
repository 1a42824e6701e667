"""Stage one, measured: pictures through the autoencoder and back, against themselves; what its latents look like."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.perceptual import build_perceptual
from ldm.checkpoints import native
from ldm.device import precision_name
from ldm.errors import UserError
from ldm.metrics import protocol
from ldm.metrics.distances import frechet_of
from ldm.metrics.features import FeatureSpace
from ldm.metrics.moments import Moments
from ldm.metrics.quality import WINDOW, psnr, ssim
from ldm.metrics.sources import RESIZE, Source
from ldm.metrics.tables import space_of, table

logger = logging.getLogger(__name__)

PERCEPTUAL = {"efficientnet-lite0": "perceptual[efficientnet-lite0]", "lpips": "LPIPS[vgg]"}


@torch.inference_mode()
def evaluate_autoencoder(
    codec: Codec,
    source: Source,
    size: int,
    *,
    name: str = "",
    spaces: Sequence[FeatureSpace] = (),
    perceptual: Sequence[str] = (),
    batch_size: int = 16,
    allow_few: bool = False,
    bar: bool = False,
) -> dict[str, Any]:
    """The result for the codec of the model called `name`, in memory that does not grow with the pictures.

    Each picture is encoded to the posterior's mode and decoded. PSNR and SSIM: means over pictures, on floats. A
    perceptual distance: the mean over pairs (that of efficientnet-lite0 was also the shipped autoencoder's loss).
    rFID, or rFD: the Frechet distance between the originals and the decoded, rounded to 8 bits as a file would be.
    Raises UserError for fewer pictures than a space has dimensions, unless `allow_few`, and for a size that is smaller
    than SSIM's window or does not fit the autoencoder.
    """
    if size < WINDOW:
        raise UserError(
            f"pictures of {size} pixels are smaller than the window of SSIM; choose a --size from {WINDOW} on"
        )
    codec.latent_shape(size, size)
    few = [space for space in spaces if len(source) <= space.width and not allow_few]
    if few:
        raise UserError(
            f"rFD[{few[0].name}] fits covariances of {few[0].width} dimensions to {len(source)} pictures; give more, "
            "leave --space out, or insist with --allow-few"
        )
    device, dtype = _where(codec)
    distances: dict[str, nn.Module] = {PERCEPTUAL[net]: build_perceptual(net).to(device) for net in perceptual}
    sides = {space.name: (Moments.empty(space.width), Moments.empty(space.width)) for space in spaces}
    latents = Moments.empty(codec.latent_channels)
    sums: dict[str, float] = {}
    kept: list[int] = []
    furthest = 0.0
    for start in tqdm(range(0, len(source), batch_size), unit="batch", disable=not bar):
        rows, images = source.images(start, start + batch_size, size)
        if not images:
            continue
        image = torch.stack(images)
        latent = codec.encode(image.to(device))
        decoded = codec.decode(latent).cpu()
        each = {"psnr": psnr(image, decoded), "ssim": ssim(image, decoded)}
        each |= {key: distance(image.to(device), decoded.to(device)) for key, distance in distances.items()}
        for key, values in each.items():
            sums[key] = sums.get(key, 0.0) + float(values.double().sum())
        for space in spaces:
            for moments, side in zip(sides[space.name], (image, _eight_bits(decoded)), strict=True):
                moments.update(space(side)[:, : space.width])
        latents.update(rearrange(latent.float(), "b c h w -> (b h w) c"))
        furthest = max(furthest, float(latent.abs().max()))
        kept += rows
    if not kept:
        raise UserError(f"none of the {len(source)} pictures of {source.name} can be decoded")

    count = len(kept)
    if count < len(source):
        logger.warning("%d of the %d pictures of %s do not decode", len(source) - count, len(source), source.name)
    figures: dict[str, float] = {"pictures": count, **{key: value / count for key, value in sums.items()}}
    for space in spaces:
        key = "rFID" if space.name.startswith("inception") else "rFD"
        figures[f"{key}[{space.name}]"] = frechet_of(*sides[space.name])
    weights = native.fingerprint(codec.autoencoder) if codec.autoencoder else "identity"
    return protocol.result(
        figures,
        {"model": name, "autoencoder": weights},
        {
            "command": "autoencoder",
            "encoded": "to the posterior's mode",
            "size": size,
            "resize": RESIZE,
            "precision": precision_name(dtype),
            "pictures": source.only(kept).protocol(),
            "perceptual": [_network(key, distance) for key, distance in distances.items()],
            "spaces": [space.protocol() for space in spaces],
        },
        sources={"pictures": source.name},
        latents=latent_statistics(latents, furthest),
    )


def autoencoder_table(document: Mapping[str, Any]) -> str:
    """The figures and the latents' statistics as lines."""
    figures, latents = document["figures"], document["latents"]
    in_spaces = {name: value for name, value in figures.items() if space_of(name)}

    def told(values: Sequence[float]) -> str:
        return " ".join(f"{value:.2f}" for value in values)

    return "\n".join(
        [
            f"{figures['pictures']} pictures of {document['protocol']['size']} px",
            f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f} (means over pictures)",
            f"latents by channel: mean {told(latents['mean'])}, deviation {told(latents['deviation'])}",
            f"largest correlation {latents['correlation']:.2f}, furthest {latents['furthest']:.1f}",
            *(["", table(in_spaces)] if in_spaces else []),
        ]
    )


def latent_statistics(moments: Moments, furthest: float) -> dict[str, Any]:
    """Of the scaled latents' positions (N, C): mean and deviation of each channel (0 and 1 is what a diffusion model
    expects), the largest correlation between two channels (either sign), the largest absolute value."""
    covariance = moments.covariance
    deviation = covariance.diagonal().sqrt()
    correlation = (covariance / deviation.outer(deviation)).fill_diagonal_(0)
    return {
        "mean": [round(value, 5) for value in moments.mean.tolist()],
        "deviation": [round(value, 5) for value in deviation.tolist()],
        "correlation": round(float(correlation.abs().max()), 5),
        "furthest": round(furthest, 4),
    }


def _network(name: str, distance: nn.Module) -> dict[str, str]:
    """What a figure must say of a perceptual distance; of LPIPS the package, which has its fitted weights."""
    package = {"package": f"lpips {version('lpips')}"} if name == PERCEPTUAL["lpips"] else {}
    return {"name": name, "hash": native.fingerprint(distance), **package}


def _where(codec: Codec) -> tuple[torch.device, torch.dtype]:
    parameter = next(codec.autoencoder.parameters(), None) if codec.autoencoder is not None else None
    return (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)


def _eight_bits(image: Tensor) -> Tensor:
    """(B, 3, H, W) as it would come back from a PNG."""
    return image.float().add(1).mul(127.5).round().clamp(0, 255).div(127.5).sub(1)
