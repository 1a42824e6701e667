"""Networks built empty and filled from a checkpoint: nothing is initialised only to be overwritten, or held twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.autoencoder.codec import Codec
    from ldm.checkpoints.record import Checkpoint
    from ldm.conditioning.clip import TextTower
    from ldm.unet.unet import UNet


def skeleton(name: str, config: ModelConfig, where: str | Path) -> nn.Module:
    """The network of a part ("autoencoder", "text", "unet") on the meta device: names and shapes, no numbers.

    Raises UserError for settings that describe no network, since they may be a stranger's; `where` they stand.
    """
    from ldm.autoencoder.kl import AutoencoderKL
    from ldm.conditioning.clip import TextTower
    from ldm.unet.unet import UNet

    try:
        with torch.device("meta"):
            if name == "autoencoder" and config.autoencoder is not None:
                return AutoencoderKL(config.autoencoder)
            if name == "text" and config.text is not None:
                return TextTower(config.text)
            if name == "unet" and config.unet is not None:
                return UNet(config.unet)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where} describes a {name} that cannot be built ({reason}); check its settings") from error
    raise ValueError(f"the config has no {name}")


def fill(
    network: nn.Module,
    state: Mapping[str, Tensor],
    device: str | torch.device,
    dtype: torch.dtype,
    channels_last: bool = False,
) -> None:
    """Give a network made by `skeleton` its numbers, and leave it frozen and in evaluation mode.

    Each tensor is read, converted and copied to its place in one step, so the peak is what is held and one tensor.
    The copy is made even where nothing is converted: a network must not change with the file it came from.
    """
    held: dict[str, Tensor] = {}
    for key, value in state.items():
        kind = dtype if value.is_floating_point() else value.dtype
        order = torch.channels_last if channels_last and value.ndim == 4 else torch.contiguous_format
        held[key] = value.to(device, kind, copy=True, memory_format=order)
    network.load_state_dict(held, assign=True)
    left = [key for key, value in network.named_buffers() if value.is_meta]
    if left:
        raise AssertionError(f"{type(network).__name__} keeps {left} outside its state dict; compute them in forward")
    network.to(device)  # what is computed from the config, not stored, has been left on the CPU
    network.eval().requires_grad_(False)


def build(checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype) -> tuple[Codec, TextTower, UNet]:
    """The networks of a whole model, filled; convolutions in channels_last, which is the faster everywhere."""
    return (
        load_autoencoder(checkpoint, device, dtype, channels_last=True),
        load_text(checkpoint, device, dtype),
        load_unet(checkpoint, device, dtype, channels_last=True),
    )


def load_autoencoder(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Codec:
    """The codec of a checkpoint: weights, shift and scale. Here and below UserError for a part that is not there."""
    from ldm.autoencoder.codec import Codec

    config = checkpoint.config.autoencoder
    if config is not None and config.kind == "identity":
        return Codec(None, config)
    network = _load(checkpoint, "autoencoder", device, dtype, channels_last)
    assert config is not None  # or it could not be loaded
    return Codec(network, config)


def load_text(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextTower:
    """The text tower of a checkpoint."""
    return _load(checkpoint, "text", device, dtype)


def load_unet(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> UNet:
    """The U-Net of a checkpoint."""
    return _load(checkpoint, "unet", device, dtype, channels_last)


def _load(
    checkpoint: Checkpoint, name: str, device: str | torch.device, dtype: torch.dtype, channels_last: bool = False
) -> Any:
    part = checkpoint.part(name)
    network = skeleton(name, checkpoint.config, part.file)
    fill(network, checkpoint.state(name, network), device, dtype, channels_last)
    return network


def norm_groups(network: nn.Module) -> set[int]:
    """The different numbers of groups that its GroupNorms have."""
    return {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
