"""Branches -> Denoiser: rules that steer a sample by comparing a network's predictions."""

from ldm.guidance.classifier_free import cfg

__all__ = ["cfg"]
