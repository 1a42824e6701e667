"""Branches -> Denoiser, Denoiser -> Denoiser: rules that steer a sample.

    Branches -> Denoiser    compare a network's predictions: cfg, autoguidance, perpendicular_negative, conjunction
    Denoiser -> Denoiser    change one prediction: classifier_guidance, clip_guidance, static_ and dynamic_threshold,
                            keep (inpainting), windows (large pictures), refined (a second model)

All work on x0 in the coordinates x = x0 + sigma n, whatever the network predicts, and compose:
dynamic_threshold(classifier_guidance(cfg(branches, 3.0), log_probability, 1.0), bound=4.0).
"""

from ldm.guidance.classifier_free import autoguidance, cfg
from ldm.guidance.clip import cosine_similarity
from ldm.guidance.gradient import LogProbability, Similarity, classifier_guidance, clip_guidance
from ldm.guidance.keep import keep
from ldm.guidance.refine import refined
from ldm.guidance.several import conjunction, perpendicular_negative, together
from ldm.guidance.threshold import dynamic_threshold, static_threshold
from ldm.guidance.windows import windows

__all__ = [
    "LogProbability",
    "Similarity",
    "autoguidance",
    "cfg",
    "classifier_guidance",
    "clip_guidance",
    "conjunction",
    "cosine_similarity",
    "dynamic_threshold",
    "keep",
    "perpendicular_negative",
    "refined",
    "static_threshold",
    "together",
    "windows",
]
