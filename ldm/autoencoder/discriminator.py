"""PatchGAN: says of each patch of a picture whether it looks real (Isola et al. 2017, section 3.2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.autoencoder.blocks import check_widths, group_norm
from ldm.errors import UserError

MAX_WIDENING = 8  # channels double with each layer, up to this multiple of the first


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w), positive for real; `layers` halvings, h about H / 2**layers - 2.

    With three layers each logit sees 70 x 70 pixels. The paper normalises over the batch; this normalises over groups
    of channels: batch statistics would make the result depend on the micro-batch, so on how many processes and
    accumulation steps share a global batch, and would mix real with decoded pictures where both are judged at once.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.layers = layers
        widths = [channels * min(2**n, MAX_WIDENING) for n in range(layers + 1)]
        check_widths(widths[1:], "loss.discriminator_channels")
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            parts += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                group_norm(widths[n]),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv2d(widths[layers], 1, 4, padding=1))
        self.network = nn.Sequential(*parts)
        self.network.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        self.check(*image.shape[-2:])
        return self.network(image)

    def check(self, height: int, width: int) -> None:
        """Raise UserError for pictures that the layers would shrink to nothing."""
        smallest = 3 * 2**self.layers
        if min(height, width) < smallest:
            raise UserError(
                f"pictures of {width}x{height} pixels are too small for {self.layers} layers of the discriminator, "
                f"which need {smallest}; lower loss.discriminator_layers"
            )


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), as in the paper's appendix; norms keep scale 1 and offset 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
