"""What stands beside the model that draws: guide models and classifiers, opened once, by whoever asks, and passed.

No torch until they are opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.find import find
from ldm.jobs import Plan

if TYPE_CHECKING:
    from ldm.guidance.noisy_classifier import NoisyClassifier
    from ldm.model import Model


@dataclass(frozen=True, eq=False)
class Helpers:
    """Networks on the drawing model's device, by the name or folder that a plan has for them."""

    models: Mapping[str, Model] = field(default_factory=dict)
    refiners: Mapping[str, Model] = field(default_factory=dict)
    classifiers: Mapping[str, NoisyClassifier] = field(default_factory=dict)

    def check(self, plan: Plan) -> None:
        """Raise UserError unless all that `plan` names is here."""
        named = {plan.guide_model} - {None} - self.models.keys()
        named |= {wrap.model for wrap in plan.refiners} - self.refiners.keys()
        named |= {wrap.folder for wrap in plan.classifiers} - self.classifiers.keys()
        missing = sorted(map(str, named))
        if missing:
            raise UserError(f"{missing[0]} has not been opened; pass helpers=open_helpers(model, plan)")

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 in hex of each that is there, by the name of its setting: what a picture's recipe keeps."""
        from ldm.checkpoints import native

        models = [("guide_model", model.hash) for model in self.models.values()]
        models += [("refiner", model.hash) for model in self.refiners.values()]
        return dict([*models, *(("classifier", native.fingerprint(each)) for each in self.classifiers.values())])

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know of the other models, as `Model.notices`."""
        return tuple(notice for model in self.readers for notice in model.notices)

    @property
    def readers(self) -> tuple[Model, ...]:
        """The other models that read the prompts."""
        return *self.models.values(), *self.refiners.values()


NONE = Helpers()


def check_paths(plan: Plan) -> None:
    """Raises UserError, without torch, if what `plan` names is not there."""
    if plan.guide_model is not None:
        find(plan.guide_model)
    for refine in plan.refiners:
        find(refine.model)
    for classifier in plan.classifiers:
        if not Path(classifier.folder).is_dir():
            raise UserError(
                f"there is no classifier {classifier.folder}; name a folder that tools/train_noisy_classifier.py wrote"
            )


def open_helpers(
    model: Model, plan: Plan, opened: Helpers = NONE, at_hand: Mapping[str, Model] = MappingProxyType({})
) -> Helpers:
    """What `plan` asks for, on the model's device and in its precision (classifiers in float32); what is in `opened`
    is taken from there, so that who draws many times reads each file once, and models `at_hand`, opened for other
    drawings on the same device in the same precision, are not opened again.

    Raises UserError for what is not there or damaged, for one of other latents than the model's, and for a class that
    the classifier does not know.
    """
    if plan.guide_model is None and not plan.classifiers and not plan.refiners:
        return NONE
    check_paths(plan)
    models = {name: opened.models.get(name) or _open_model(model, name, at_hand) for name in [plan.guide_model] if name}
    refining = [wrap.model for wrap in plan.refiners]
    refiners = {name: opened.refiners.get(name) or _open_model(model, name, at_hand, "refiner") for name in refining}
    classifiers: dict[str, NoisyClassifier] = {}
    for wrap in plan.classifiers:
        classifiers[wrap.folder] = opened.classifiers.get(wrap.folder) or _open_classifier(model, wrap.folder)
        classifiers[wrap.folder].places([wrap.label])
    return Helpers(models, refiners, classifiers)


def helpers_of(model: Model, plan: Plan) -> Helpers:
    """`open_helpers`, which keeps with the model what it opened for its last plan."""
    model.kept["helpers"] = helpers = open_helpers(model, plan, model.kept.get("helpers", NONE))
    return helpers


def _open_model(model: Model, name: str, at_hand: Mapping[str, Model], kind: str = "guide model") -> Model:
    from ldm.device import precision_name
    from ldm.guidance.latents import latent_probe, same_latents
    from ldm.loading import load_model

    how = {"backend": model.backend, "low_memory": model.works_on is not None}
    worse = at_hand.get(name) or load_model(name, str(model.device), precision_name(model.precision), **how)
    if worse.codec.factor != model.codec.factor or not same_latents(
        latent_probe(model.codec), latent_probe(worse.codec)
    ):
        raise UserError(
            f"the {kind} {name} has another autoencoder than {model.name or 'the model'}, so "
            "its latents mean other pictures; use a model that was trained on the same latents"
        )
    return worse


def _open_classifier(model: Model, folder: str) -> NoisyClassifier:
    from ldm.guidance.latents import latent_probe, same_latents
    from ldm.guidance.noisy_classifier import load_noisy_classifier

    classifier = load_noisy_classifier(folder, model.device)
    if not same_latents(latent_probe(model.codec), classifier.config.probe):
        raise UserError(
            f"the classifier {folder} was trained on latents of another autoencoder than that of "
            f"{model.name or 'the model'}; train one with tools/train_noisy_classifier.py --model"
        )
    return classifier
