"""NOISY LATENT -> PREDICTION: the transformer of Stable Diffusion 3, and a small one of one stream."""

from ldm.mmdit.mmdit import MMDiT as MMDiT
