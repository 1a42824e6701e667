"""What the server was started with, by names: all that a client can choose from, opened when it is asked for.

A client never gives a path. What goes out to it, a picture's recipe too, has names in the place of paths.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError, explain_os_error, instead
from ldm.find import SHIPPED, SHIPPED_LORAS, find, find_lora
from ldm.helpers import NONE, Helpers, open_helpers
from ldm.jobs import Plan, Settings
from ldm.jobs.adapters import Adapter
from ldm.web.job import Asked

if TYPE_CHECKING:
    from ldm.model import Model

ADAPTED = 2  # models with LoRAs merged into them that are kept; each may be as large as the model
WEIGHTS = (".safetensors", ".pt", ".bin")


def named(words: Iterable[str], what: str) -> dict[str, str]:
    """{name: as it was given}: a file's name is its last part; of a folder of adapters, each file in it.

    Raises UserError for one that is not there, and for two of one name."""
    found: dict[str, str] = {}
    shipped = {"model": SHIPPED, "LoRA": SHIPPED_LORAS}.get(what, {})
    for word in words:
        own = word in shipped or (what == "model" and word.startswith("hf:"))
        if what == "model":
            find(word)
        elif not own and not Path(word).exists():
            raise UserError(f"there is no {what} {word}; check the path")
        folder = what in ("LoRA", "embedding") and Path(word).is_dir()
        try:
            files = sorted(path for path in Path(word).iterdir() if path.suffix in WEIGHTS) if folder else [Path(word)]
        except OSError as error:
            raise explain_os_error(error, f"reading the folder {word}") from error
        if not files:
            raise UserError(f"the folder {word} has no file that ends in {', '.join(WEIGHTS)}; name another")
        for path in files:
            name = word if own else path.resolve().name
            if name in found:
                raise UserError(f"two of them have the name {name}: {found[name]} and {path}; rename one")
            found[name] = word if own or str(path) in shipped else str(path)  # "./four" is a file
    return found


@dataclass(frozen=True, eq=False)
class Shelf:
    """name -> path of each kind; `open_models` before the first job. The worker alone calls `model_for`."""

    models: Mapping[str, str]
    loras: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, str] = field(default_factory=dict)
    classifiers: Mapping[str, str] = field(default_factory=dict)
    device: str = "auto"
    precision: str = "auto"
    opened: dict[str, Model] = field(default_factory=dict, init=False)
    _adapted: OrderedDict[tuple[str, tuple[Adapter, ...]], Model] = field(default_factory=OrderedDict, init=False)
    _helpers: dict[str, Helpers] = field(default_factory=dict, init=False)

    def open_models(self) -> None:
        """Open all models; raises UserError."""
        from ldm.loading import load_model

        for name, path in self.models.items():
            self.opened[name] = replace(load_model(path, self.device, self.precision), name=name)

    @property
    def first(self) -> str:
        return next(iter(self.models))

    def check(self, asked: Asked, settings: Settings) -> None:
        """Raise UserError for a name that is not here."""
        _found(asked.model or self.first, self.models, "model")
        for name in asked.loras:
            _found(name, self.loras, "LoRA")
        for name in asked.embeddings:
            _found(name, self.embeddings, "embedding")
        self.with_paths(settings)

    def with_paths(self, settings: Settings) -> Settings:
        """`settings` with paths in the place of names; raises UserError for a name that is not here."""
        guide, refiner, classifier = settings.guide_model, settings.refiner, settings.classifier
        return replace(
            settings,
            guide_model=None if guide is None else _found(guide, self.models, "model"),
            refiner=None if refiner is None else _found(refiner, self.models, "model"),
            classifier=None if classifier is None else _found(classifier, self.classifiers, "classifier"),
        )

    def without_paths(self, sentence: str) -> str:
        """A sentence for a client, names in the place of paths."""
        loras = {name: find_lora(path) for name, path in self.loras.items()}
        known = {path: name for kind in (self.models, loras, self.embeddings, self.classifiers)
                 for name, path in kind.items() if os.sep in path}  # fmt: skip
        for path in sorted(known, key=len, reverse=True):
            sentence = sentence.replace(path, known[path])
        return sentence

    def model_for(self, asked: Asked) -> Model:
        """The model with the adapters that are asked for. Raises UserError for what does not fit."""
        from ldm.adapters import use

        name = asked.model or self.first
        adapters = [Adapter("lora", _found(lora, self.loras, "LoRA"), scale) for lora, scale in asked.loras.items()]
        adapters += [Adapter("embedding", _found(word, self.embeddings, "embedding")) for word in asked.embeddings]
        base = self.opened[_found(name, self.models, "model") and name]
        if not adapters:
            return base
        key = name, tuple(adapters)
        if key not in self._adapted:
            while len(self._adapted) >= ADAPTED:
                self._adapted.popitem(last=False)
            made = use.apply(base, adapters)
            hidden = tuple(replace(one, path=Path(one.path).name) for one in made.adapters)
            self._adapted[key] = replace(made, adapters=hidden)
        self._adapted.move_to_end(key)
        return self._adapted[key]

    def helpers_for(self, asked: Asked, model: Model, plan: Plan) -> Helpers:
        """What `plan` names beside the model; what was opened for its last job that named any is kept."""
        name = asked.model or self.first
        at_hand = {path: self.opened[known] for known, path in self.models.items()}
        helpers = open_helpers(model, plan, self._helpers.get(name, NONE), at_hand)
        if helpers is not NONE:
            self._helpers[name] = helpers
        return helpers


def _found(name: str, known: Mapping[str, str], what: str) -> str:
    if name not in known:
        raise UserError(f"there is no {what} '{name[:60]}' here{instead(name, known) if known else ''}")
    return known[name]
