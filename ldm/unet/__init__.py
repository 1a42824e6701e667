"""NOISY LATENT -> PREDICTION: the network."""

from ldm.unet.attention import ContextKV as ContextKV
from ldm.unet.unet import UNet as UNet
