"""What a user asks for: pictures of prompts, under settings. No torch in here, so that a mistake is told at once."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm import catalogue
from ldm.data import tables
from ldm.errors import UserError
from ldm.files import read_text
from ldm.ranges import MAX_SEED, MAX_SIDE, Level

THRESHOLDS = ("static", "dynamic")


@dataclass(frozen=True)
class Ask:
    """What a picture is to be: one row of what a network is told. A training sample is an Ask too."""

    text: str = ""
    label: str | int | None = None  # of a class-conditional model: a name, or a number where classes have no names
    size: tuple[int, int] | None = None  # height and width of the picture before it was resized, pixels
    crop: tuple[int, int] = (0, 0)  # top and left of what is seen of it, pixels after the resize
    target: tuple[int, int] | None = None  # height and width of what is seen


@dataclass(frozen=True)
class Request:
    """One picture: what it shows, what it should not, and the seed of its noise."""

    prompt: str
    negative: str = ""
    seed: int = 0
    label: str | int | None = None  # of a class-conditional model

    def asks(self, height: int, width: int) -> tuple[Ask, Ask]:
        """What the picture is to be, and what it is guided away from, at the size in pixels that is drawn."""
        whole = (height, width)
        return Ask(self.prompt, self.label, size=whole, target=whole), Ask(self.negative, size=whole, target=whole)

    def check(self) -> Request:
        """The same; raises UserError for a seed that is none, and for texts that no file could hold."""
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed {self.seed} is out of range; choose it between 0 and {MAX_SEED}")
        for text in (self.prompt, self.negative):
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # half of a letter, or bytes that are not UTF-8
                raise UserError(f"the prompt '{text[:100]}' is not Unicode text; write it in UTF-8")
        return self


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; pictures of one batch share it. None leaves the choice to the model or the sampler."""

    cfg: float = 7.5  # guidance scale; 1 is the conditional model alone, at half the cost
    steps: int = 30  # of the sampler, each an evaluation of the denoiser, or two where its method takes two (heun)
    sampler: str = "ddim"  # a name, or a user interface's spelling of one; txt2img.py --list-samplers prints them
    spacing: str | None = None  # of the levels, a grid of that list; None: what the spelling says, else trailing
    eta: float | None = None  # share of fresh noise, for the samplers that have this option; 0 is deterministic
    width: int | None = None  # pixels; None: the side the model was trained at
    height: int | None = None  # the same
    cfg_rescale: float = 0.0  # in [0, 1]: takes back over-exposure at large cfg
    cfg_interval: tuple[Level, Level] | None = None  # low and high, in sigma: guide there only; None: everywhere
    options: dict[str, Any] = field(default_factory=dict)  # the sampler's own; catalogue.SAMPLERS names them
    sigmas: tuple[float, ...] = ()  # the levels written out, in place of spacing and steps
    perp_negative: float | None = None  # weight of a negative prompt that acts across the prompt only; None: plain
    guide_model: str | None = None  # a worse model, in the unconditional one's place: autoguidance; its scale is cfg
    classifier: str | None = None  # a folder that tools/train_noisy_classifier.py wrote
    classifier_class: str | None = None  # the class it steers to, one that it knows
    classifier_scale: float = 1.0  # how strongly
    threshold: str | None = None  # static or dynamic: keep x0 in the data's range at large guidance
    threshold_bound: float | None = None  # that range, either way; None: 1 for pixel models, 4 deviations of latents
    tile: int | None = None  # pixels of a tile's side: decode (and encode) piece by piece; None: the whole at once

    def check(self) -> Settings:
        """The same in the library's names and types; raises UserError for what no model could do."""
        return self._typed()._named()

    def _named(self) -> Settings:
        """The same in the library's names, checked."""
        sampler, spelled, implied = catalogue.resolve(self.sampler)
        spacing = self.spacing or spelled or "trailing"
        if spacing not in catalogue.GRIDS:
            raise UserError(catalogue.unknown("grid spacing", spacing, catalogue.GRIDS))
        if spelled and spacing != spelled:
            raise UserError(f"'{self.sampler}' asks for the spacing {spelled}, and --spacing is {spacing}; say one")
        if self.eta is not None and "eta" in self.options:
            raise UserError(f"eta is {self.eta:g} and {self.options['eta']} among the sampler's options; say one")
        options = {**implied, **self.options, **({} if self.eta is None else {"eta": self.eta})}
        if self.sigmas:
            written = len(catalogue.check_levels(self.sigmas)) - 1
            if spacing != "trailing" or self.steps not in (Settings.steps, written):
                asked = f"{self.steps} steps" if spacing == "trailing" else f"the spacing {spacing}"
                raise UserError(
                    f"{written + 1} sigmas are written out, which are {written} steps, and {asked}; say one"
                )
        if self.steps < 1:
            raise UserError(f"{self.steps} steps were asked for; choose at least 1")
        if not math.isfinite(self.cfg):
            raise UserError(f"the guidance scale is {self.cfg}; choose a finite number, such as 7.5")
        if self.eta is not None and not 0 <= self.eta < math.inf:
            raise UserError(f"eta is {self.eta:g}; choose 0 (deterministic) or more, such as 1")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise UserError(f"the {name} is {side} pixels; choose between 1 and {MAX_SIDE}")
        if self.tile is not None and self.tile < 1:
            raise UserError(f"a tile of {self.tile} pixels was asked for; choose at least one pixel of the latent")
        if not 0 <= self.cfg_rescale <= 1:
            raise UserError(f"the guidance rescale is {self.cfg_rescale:g}; choose it between 0 and 1")
        if self.cfg_interval is not None and not self.cfg_interval[0] < self.cfg_interval[1]:
            low, high = self.cfg_interval
            raise UserError(f"the guidance interval ({low:g}, {high:g}] is empty; give low < high in sigma")
        self._check_guides()
        return dataclasses.replace(
            self,
            sampler=sampler,
            spacing=spacing,
            eta=None,
            options=catalogue.check_options(sampler, options),
            steps=len(self.sigmas) - 1 if self.sigmas else self.steps,
        )

    def without_effect(self, requests: Sequence[Request]) -> list[str]:
        """A sentence on what is asked for and does nothing, where guidance is none."""
        if self.cfg != 1 or self.perp_negative is not None:
            return []
        asked = {
            "the negative prompt": any(request.negative for request in requests),
            "the guide model": self.guide_model is not None,
            "cfg_rescale": self.cfg_rescale > 0,
            "cfg_interval": self.cfg_interval is not None,
        }
        names = [name for name, given in asked.items() if given]
        return [f"at guidance scale 1, which is none, nothing comes of {' and '.join(names)}"] if names else []

    def but(self, cfg: float | None = None, steps: int | None = None, sampler: str | None = None) -> Settings:
        """The same with those of these that are not None."""
        given = {"cfg": cfg, "steps": steps, "sampler": sampler}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    def _typed(self) -> Settings:
        """The same in Python's own types (numpy's numbers are none for JSON); raises UserError for other things."""
        convert = {"int": whole, "float": real, "str": _word, "tuple": _reals, "dict": _table}
        given = {f.name: (getattr(self, f.name), str(f.type)) for f in dataclasses.fields(self)}
        made = {
            name: convert[kind.partition(" ")[0].partition("[")[0]](value, name)
            for name, (value, kind) in given.items()
            if value is not None or not kind.endswith("None")
        }
        if self.cfg_interval is not None and len(made["cfg_interval"]) != 2:
            raise UserError(f"cfg_interval is {_shown(self.cfg_interval)}; give low and high in sigma")
        return dataclasses.replace(self, **made)

    def _check_guides(self) -> None:
        weight, bound = self.perp_negative, self.threshold_bound
        if weight is not None and not 0 <= weight < math.inf:
            raise UserError(f"the weight of the perpendicular negative is {weight:g}; choose 0 or more, such as 1")
        if weight is not None and self.guide_model is not None:
            raise UserError("a perpendicular negative does not go with a guide model; choose one of the two")
        if (self.classifier is None) != (self.classifier_class is None):
            raise UserError("a classifier needs the class to steer to, and a class the classifier; give both")
        if self.classifier is None and self.classifier_scale != 1:
            raise UserError(f"a classifier's scale is {self.classifier_scale:g}; name the classifier with it")
        if not math.isfinite(self.classifier_scale):
            raise UserError(f"the classifier's scale is {self.classifier_scale}; choose a finite number, such as 1")
        if self.threshold is not None and self.threshold not in THRESHOLDS:
            raise UserError(catalogue.unknown("threshold", self.threshold, THRESHOLDS))
        if bound is not None and (self.threshold is None or not 0 < bound < math.inf):
            raise UserError(f"a threshold's bound is {bound:g}; choose it positive, and static or dynamic with it")


def expand(requests: Sequence[Request], n: int) -> list[Request]:
    """`n` pictures of each request, on seeds seed, seed + 1, ...; raises UserError for a bad count, seed or text."""
    return [
        dataclasses.replace(request, seed=request.seed + i).check() for request in requests for i in range(_count(n))
    ]


def of_prompts(
    prompts: str | Iterable[str], negative: str | Iterable[str] = "", seed: int | Iterable[int] = 0, n: int = 1
) -> list[Request]:
    """`n` pictures of each prompt, prompt by prompt; one `negative` for all, or one for each prompt.

    `seed`: one for each picture, or a number: picture i of them all then has seed + i. Raises UserError.
    """
    texts, n = _texts(prompts, "prompt"), _count(n)
    negatives = [negative] * len(texts) if isinstance(negative, str) else _texts(negative, "negative prompt")
    if len(negatives) != len(texts):
        raise UserError(f"{len(negatives)} negative prompts were given for {len(texts)} prompts; give one for each")
    count = n * len(texts)
    if isinstance(seed, Iterable) and not isinstance(seed, str) and getattr(seed, "shape", None) != ():
        seeds = [whole(one, "a seed") for one in seed]
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds were given for {count} pictures; give one for each, or a number")
    else:
        first = whole(seed, "the seed")
        seeds = list(range(first, first + count))
    return [Request(texts[i // n], negatives[i // n], one).check() for i, one in enumerate(seeds)]


def batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """`requests` in order, `size` at a time; the last batch may be smaller. Raises UserError for a size below 1."""
    if whole(size, "the batch size") < 1:
        raise UserError(f"a batch of {size} pictures was asked for; choose at least 1")
    return (requests[i : i + size] for i in range(0, len(requests), size))


def whole(value: Any, what: str) -> int:
    """`value`, numpy's and torch's numbers too, as an int; raises UserError for what is no whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{what} is {_shown(value)}, which is not a whole number") from error


def real(value: Any, what: str) -> float:
    """`value` as Python's own number, an int or a float, which may be NaN; raises UserError for what is no number."""
    number = value.item() if getattr(value, "shape", None) == () else value  # numpy's and torch's
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise UserError(f"{what} is {_shown(value)}, which is not a number")
    return number


def _word(value: Any, what: str) -> str:
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{what} is {_shown(value)}, which is not a text")
    return os.fspath(value)


def _reals(value: Any, what: str) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(f"{what} is {_shown(value)}, which is not a list of numbers")
    return tuple(real(one, f"a number of {what}") for one in value)


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} is {_shown(value)}; give each by its name, as {{'eta': 1}}")
    return dict(value)


def _count(n: Any) -> int:
    if whole(n, "n") < 1:
        raise UserError(f"{n} pictures of each prompt were asked for; choose at least 1")
    return whole(n, "n")


def _texts(given: Any, what: str) -> list[str]:
    """A text or several, as a list of one or more; raises UserError."""
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not isinstance(given, Iterable) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"the {what} is {_shown(given)}; give a text, or a list of texts")
    if not texts:
        raise UserError(f"an empty list of {what}s was given; give at least one")
    return texts


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


# ---------------------------------------------------------------- prompt files


def read_prompts(path: str | Path, negative: str = "", seed: int = 0, n: int = 1) -> list[Request]:
    """`n` pictures of each prompt of a file, in order.

    .csv, .tsv, .parquet: rows with "prompt" and, if wanted, "negative" and "seed"; .jsonl: objects with these, one on
    each line; .json: a list of such objects or of prompts; any other file: one prompt on each line. Columns may be in
    any case. Blank lines do not count. `negative` and `seed` stand in where a row has none of its own, and picture i of
    the file then has seed + i.
    Raises UserError, with the row's number, for what cannot be read.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in tables.SUFFIXES:
        missing = (None, "") if kind in (".csv", ".tsv") else (None,)
        found = tables.rows(path, "prompt")
        rows = [(where, {name: cell for name, cell in row.items() if cell not in missing}) for where, row in found]
    else:
        lines = enumerate(read_text(path).splitlines(), 1)
        rows = [(f"{path}, line {i}", {"prompt": line}) for i, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} has no prompts; write one on each line")
    return expand([_request(row, where, negative, seed + n * i) for i, (where, row) in enumerate(rows)], n)


def _request(row: Mapping[str, Any], where: str, negative: str, seed: int) -> Request:
    known, given = ("prompt", "negative", "seed"), {}
    for name, cell in row.items():
        if (plain := name.strip().casefold()) not in known:
            raise UserError(f"{where} has an unknown column '{name}'; the known ones are {', '.join(known)}")
        if plain in given:
            raise UserError(f"{where} has two columns '{plain}'; keep one of them")
        given[plain] = cell
    if "prompt" not in given:
        raise UserError(f"{where} has no prompt; name the column 'prompt'")
    prompt, negative, value = given["prompt"], given.get("negative", negative), given.get("seed", seed)
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise UserError(f"{where}: prompt and negative must be text")
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        return Request(prompt.strip(), negative.strip(), int(value))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: the seed is {value!r}, which is not a whole number") from error
