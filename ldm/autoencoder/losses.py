"""The loss of stage one: reconstruction, perceptual distance, KL, and a PatchGAN (Rombach et al. 2022, eq. 25)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.perceptual import build_perceptual
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.config import AutoencoderLossConfig

ADAPTIVE_EPS = 1e-4  # the paper writes 1e-6, its published code adds 1e-4


class AutoencoderLoss(nn.Module):
    """Every term and its weight; a term of weight 0 is not computed. All arithmetic is float32, under autocast too.

    One training step, the discriminator `d` not being part of this:

        loss, terms = losses.reconstruction(image, decoded, posterior)
        gan = losses.adversarial(d(decoded))
        weight = losses.adaptive_weight(loss, gan, autoencoder.decoder.last_layer.weight)
        (loss + config.adversarial * losses.ramp(step) * weight * gan).backward()
        losses.discriminator(d(image), d(decoded.detach())).backward()
    """

    def __init__(self, config: AutoencoderLossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = build_perceptual(config.perceptual_net) if config.perceptual > 0 else None

    def reconstruction(
        self, image: Tensor, decoded: Tensor, posterior: DiagonalGaussian
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum for pictures (B, 3, H, W), and its terms before weighting, detached, for the log.

        l1: mean |image - decoded| over all values. gradient: the same for differences of neighbours, horizontal plus
        vertical. perceptual: mean distance. kl: nats of a whole latent, mean over the batch; in the sum it is divided
        by the 3 H W values of a picture, so that all terms are per value and the weight does not depend on the size.
        """
        config = self.config
        with torch.autocast(image.device.type, enabled=False):
            image, decoded = image.float(), decoded.float()
            terms: dict[str, Tensor] = {}
            total = decoded.new_zeros(())
            if config.l1 > 0:
                terms["l1"] = F.l1_loss(decoded, image)
                total = total + config.l1 * terms["l1"]
            if config.gradient > 0:
                terms["gradient"] = gradient_l1(image, decoded)
                total = total + config.gradient * terms["gradient"]
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(decoded, image).mean()
                total = total + config.perceptual * terms["perceptual"]
            if config.kl > 0:
                terms["kl"] = posterior.kl().mean()
                total = total + config.kl * terms["kl"] / image[0].numel()
        return total, {name: term.detach() for name, term in terms.items()}

    def adversarial(self, decoded_logits: Tensor) -> Tensor:
        """The generator's side of the hinge loss: minus the mean logit of decoded pictures."""
        return -decoded_logits.float().mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Hinge loss, the mean of both halves: (mean relu(1 - real) + mean relu(1 + fake)) / 2."""
        return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())

    def adaptive_weight(self, reconstruction_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor) -> Tensor:
        """|grad reconstruction| / (|grad adversarial| + 1e-4) on the decoder's last layer, clamped to
        [0, adaptive_max], without gradient (Esser et al. 2021, eq. 7). Both graphs stay usable."""
        gradients = (
            torch.autograd.grad(loss, last_weight, retain_graph=True)[0].float()
            for loss in (reconstruction_loss, adversarial_loss)
        )
        reconstruction, adversarial = (gradient.norm() for gradient in gradients)
        return (reconstruction / (adversarial + ADAPTIVE_EPS)).clamp(0.0, self.config.adaptive_max).detach()

    def ramp(self, step: int) -> float:
        """Share of the adversarial weight at optimizer step `step`: 0 up to the start, then linear, at last 1."""
        since = step - self.config.adversarial_start
        if since < 0:
            return 0.0
        return min(since / self.config.adversarial_ramp, 1.0) if self.config.adversarial_ramp > 0 else 1.0


def gradient_l1(image: Tensor, decoded: Tensor) -> Tensor:
    """Mean |difference| of the pictures' horizontal finite differences, plus that of the vertical ones."""
    error = decoded - image
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
