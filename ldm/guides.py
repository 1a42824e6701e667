"""What settings name beside the model: the worse model of autoguidance and the classifier. No torch until they load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.jobs import Settings

if TYPE_CHECKING:
    from ldm.guidance.noisy_classifier import NoisyClassifier
    from ldm.model import LatentDiffusion


@dataclass(frozen=True, eq=False)
class Guides:
    """The networks that steer the model's sampling, on its device; None: not asked for."""

    worse: LatentDiffusion | None = None
    classifier: NoisyClassifier | None = None

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 in hex of each that is there, by the name of its setting: what a picture's recipe keeps."""
        from ldm.checkpoints import native

        found = {}
        if self.worse is not None:
            found["guide_model"] = self.worse.hash
        if self.classifier is not None:
            found["classifier"] = native.fingerprint(self.classifier)
        return found

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know of the guide model, as `LatentDiffusion.notices`."""
        return self.worse.notices if self.worse is not None else ()


def check_paths(settings: Settings) -> None:
    """Raises UserError, without torch, if what `settings` name is not there."""
    from ldm.find import find

    if settings.guide_model is not None:
        find(settings.guide_model)
    if settings.classifier is not None and not Path(settings.classifier).is_dir():
        raise UserError(
            f"there is no classifier {settings.classifier}; name a folder that tools/train_noisy_classifier.py wrote"
        )


def load_guides(model: LatentDiffusion, settings: Settings) -> Guides:
    """The guides that `settings` ask for, on the model's device and in its precision (the classifier in float32).

    Raises UserError for what is not there or damaged, for one of other latents than the model's, and for a class that
    the classifier does not know.
    """
    from ldm.device import precision_name
    from ldm.guidance.latents import latent_probe, same_latents
    from ldm.guidance.noisy_classifier import load_noisy_classifier
    from ldm.model import load

    check_paths(settings)
    worse = classifier = None
    probe = latent_probe(model.codec) if settings.guide_model or settings.classifier else ()
    if settings.guide_model is not None:
        worse = load(settings.guide_model, model.device.type, precision_name(model.precision))
        if worse.codec.factor != model.codec.factor or not same_latents(probe, latent_probe(worse.codec)):
            raise UserError(
                f"the guide model {settings.guide_model} has another autoencoder than {model.name or 'the model'}, so "
                "its latents mean other pictures; use a model that was trained on the same latents"
            )
    if settings.classifier is not None:
        classifier = load_noisy_classifier(settings.classifier, model.device)
        if not same_latents(probe, classifier.config.probe):
            raise UserError(
                f"the classifier {settings.classifier} was trained on latents of another autoencoder than that of "
                f"{model.name or 'the model'}; train one with tools/train_noisy_classifier.py --model"
            )
        classifier.places([settings.classifier_class or ""])
    return Guides(worse, classifier)
