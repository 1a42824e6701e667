"""How pictures are drawn, as a user says it: the command line's flags, a picture's recipe and a page's form."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.errors import UserError
from ldm.jobs import catalogue, grammar
from ldm.jobs.plan import Auto, Cfg, Classifier, Guide, Merge, PerpNegative, Plan, Refine, Reuse, Threshold, Wrap
from ldm.jobs.request import Request, Sizes
from ldm.jobs.values import real, reals, shown, table, whole, wholes, word
from ldm.model_config import DrawingConfig
from ldm.ranges import MAX_SIDE, MAX_STEPS, Level

THRESHOLDS = ("static", "dynamic")
SYNTAXES = ("plain", "weighted")
WRITTEN = "trailing"  # the word that stands for no spacing beside levels written out, in recipes of all versions
USUAL = DrawingConfig()
MOST_PLUS = 2.0  # of CFG++'s guidance scale, an interpolation that people stretch a little


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; pictures of one batch share it. None leaves the choice to the model or the sampler."""

    cfg: float | None = None  # guidance scale; 1: unguided, at half the cost; an LCM's w + 1; None: the model's (7.5)
    steps: int | None = None  # of the sampler, an evaluation each, or two (heun); None: the model's (20)
    sampler: str | None = None  # its name or spelling, of --list-samplers; None: the model's (dpmpp_2m)
    spacing: str | None = None  # of the levels, a grid of that list; None: the spelling's, model's or sampler's
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
    prompt_syntax: str | None = None  # weighted: (word:1.3), BREAK, AND, any length; plain; None: weighted in commands
    original_size: tuple[int, int] | None = None  # SDXL: height and width it is told to have had; None: as drawn
    crop: tuple[int, int] | None = None  # SDXL: top and left at which it is told to be cropped, in pixels; None: 0 0
    target_size: tuple[int, int] | None = None  # SDXL: height and width it is told to have; None: as drawn
    score: float = 6.0  # SDXL's refiner: the aesthetic score it is told for the prompt
    negative_score: float = 2.5  # the same for the negative prompt
    refiner: str | None = None  # a model on the same latents that takes over where little noise is left, as SDXL's
    refine_below: str = "20%"  # from where on: that share of the trained levels, or a sigma, such as 0.57
    tile: int | None = None  # pixels of a tile's side: decode (and encode) piece by piece; None: the whole at once
    merge_tokens: float | None = None  # faster, not the same: merge that share of the tokens (ToMe), up to 0.75
    reuse: int | None = None  # faster, not the same: run the U-Net whole at each so many-th evaluation (DeepCache)
    reuse_branch: int = 0  # of reuse: so many stages of the way down run at each evaluation
    rho: float | None = None  # how uneven a karras (7) or polyexponential (1) spacing is; None: those

    def check(self) -> Settings:
        """The same in the library's names and types, what is left to the model still left to it.

        Raises UserError for what no model could do."""
        given = self._typed()
        if given.sampler is None and (given.options or given.eta is not None):
            option = "eta" if given.eta is not None else f"{next(iter(given.options))}"[: catalogue.QUOTED]
            raise UserError(f"{option} is an option of some samplers; name the one that is meant with it, such as ddim")
        checked = self.of(USUAL)._named()
        left = {name: None for name in ("cfg", "steps", "sampler") if getattr(given, name) is None}
        if given.sigmas:
            left.pop("steps", None)
        return dataclasses.replace(checked, **left)

    def of(self, drawing: DrawingConfig) -> Settings:
        """The same with what is left to the model as that is meant to be drawn: `drawing`, of its config.

        Levels that are written out, and a spelling of a sampler that says its own, go before the model's. Raises
        UserError for a sampler of the model's that is not known."""
        given = self._typed()
        if not given.sampler and drawing.sampler not in catalogue.SAMPLERS:
            own = drawing.sampler[: catalogue.QUOTED]
            raise UserError(f"the model is meant for the sampler '{own}', unknown here; name another one, such as ddim")
        steps = drawing.steps if given.steps is None else given.steps
        if given.sigmas and given.steps is None:
            steps = len(given.sigmas) - 1
        return dataclasses.replace(
            given,
            cfg=drawing.cfg if given.cfg is None else given.cfg,
            steps=steps,
            sampler=given.sampler or drawing.sampler,
            spacing=given.spacing or (None if given.sigmas else given._spelled() or drawing.spacing or None),
        )

    def _spelled(self) -> str | None:
        """The spacing that the sampler's spelling asks for."""
        return catalogue.resolve(self.sampler)[1] if self.sampler else None

    def _named(self) -> Settings:
        """The same, whole, in the library's names, checked."""
        assert self.sampler is not None and self.steps is not None and self.cfg is not None
        sampler, spelled, implied = catalogue.resolve(self.sampler)
        info = catalogue.SAMPLERS[sampler]
        said = catalogue.resolve_grid(self.spacing) if self.spacing else spelled
        spacing = said or (WRITTEN if self.sigmas else None)
        if spelled and spacing != spelled:
            raise UserError(f"'{self.sampler}' asks for the spacing {spelled}, and --spacing is {spacing}; say one")
        if self.rho is not None and (spacing not in catalogue.RHO or not 0 < self.rho < math.inf):
            asked = f"rho is {self.rho:g}, and the spacing {spacing or 'is left to the sampler'}"
            raise UserError(f"{asked}; give a positive one with --spacing {' or '.join(catalogue.RHO)}")
        if self.eta is not None and "eta" in self.options:
            raise UserError(f"eta is {self.eta:g} and {self.options['eta']} among the sampler's options; say one")
        options = {**implied, **self.options, **({} if self.eta is None else {"eta": self.eta})}
        if self.sigmas:
            written = len(catalogue.check_levels(self.sigmas)) - 1
            if spacing != WRITTEN or self.steps != written:
                asked = f"{self.steps} steps" if spacing == WRITTEN else f"the spacing {spacing}"
                raise UserError(
                    f"{written + 1} sigmas are written out, which are {written} steps, and {asked}; say one"
                )
        if not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"{self.steps} steps were asked for; choose between 1 and {MAX_STEPS:,}")
        if not math.isfinite(self.cfg):
            raise UserError(f"the guidance scale is {self.cfg}; choose a finite number, such as 7.5")
        if info.unguided and not 0 <= self.cfg <= MOST_PLUS:
            raise UserError(
                f"the guidance scale is {self.cfg:g}, and {sampler} takes one between 0 and {MOST_PLUS:g}; choose 0.6, "
                "which is about what 7.5 is elsewhere"
            )
        if info.unguided and self.guide_model is not None:
            raise UserError(
                f"{sampler} puts back what the model sees without the prompt, and a guide model stands there"
            )
        if self.eta is not None and not 0 <= self.eta < math.inf:
            raise UserError(f"eta is {self.eta:g}; choose 0 (deterministic) or more, such as 1")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise UserError(f"the {name} is {side} pixels; choose between 1 and {MAX_SIDE}")
        syntax = self.prompt_syntax or "plain"
        if syntax not in SYNTAXES:
            raise UserError(catalogue.unknown("prompt syntax", syntax, SYNTAXES))
        if self.tile is not None and self.tile < 1:
            raise UserError(f"a tile of {self.tile} pixels was asked for; choose at least one pixel of the latent")
        if not 0 <= self.cfg_rescale <= 1:
            raise UserError(f"the guidance rescale is {self.cfg_rescale:g}; choose it between 0 and 1")
        if self.cfg_interval is not None and not self.cfg_interval[0] < self.cfg_interval[1]:
            low, high = self.cfg_interval
            raise UserError(f"the guidance interval ({low:g}, {high:g}] is empty; give low < high in sigma")
        self._check_sizes()
        self._check_guides()
        self._check_shortcuts(sampler)
        return dataclasses.replace(
            self,
            sampler=sampler,
            spacing=spacing,
            eta=None,
            prompt_syntax=syntax,
            options=catalogue.check_options(sampler, options),
        )

    def plan(self) -> Plan:
        """What is to be done: these settings, checked once and taken apart; what they leave to the model is a diffusion
        model's. Raises UserError as `check`."""
        checked = self.of(USUAL)._named()
        assert checked.sampler is not None and checked.cfg is not None
        how = checked.cfg, checked.cfg_rescale, checked.cfg_interval
        guide: Guide = Cfg(*how, plus=catalogue.SAMPLERS[checked.sampler].unguided)
        if checked.guide_model is not None:
            guide = Auto(checked.guide_model, *how)
        elif checked.perp_negative is not None:
            guide = PerpNegative(checked.perp_negative, *how)
        wraps: list[Wrap] = []
        if checked.refiner is not None:
            sigma, share = _below(checked.refine_below)
            wraps.append(Refine(checked.refiner, sigma, share))
        if checked.classifier is not None and checked.classifier_class is not None:
            wraps.append(Classifier(checked.classifier, checked.classifier_class, checked.classifier_scale))
        if checked.threshold is not None:
            wraps.append(Threshold(checked.threshold, checked.threshold_bound))
        shortcuts: list[Merge | Reuse] = []
        if checked.merge_tokens is not None:
            shortcuts.append(Merge(checked.merge_tokens))
        if checked.reuse is not None:
            shortcuts.append(Reuse(checked.reuse, checked.reuse_branch))
        same = ("sampler", "options", "spacing", "rho", "steps", "sigmas", "width", "height", "tile")
        values = {name: getattr(checked, name) for name in same}
        return Plan(
            **values,
            weighted=checked.prompt_syntax == "weighted",
            guide=guide,
            wraps=tuple(wraps),
            shortcuts=tuple(shortcuts),
            sizes=checked._sizes(),
        )

    def _sizes(self) -> Sizes:
        """What is told to networks that are told sizes."""
        scores = self.score, self.negative_score
        return Sizes(self.original_size, self.crop or (0, 0), self.target_size, scores)

    def without_effect(self, requests: Sequence[Request]) -> list[str]:
        """Sentences on what is asked for and does nothing."""
        whole = self.of(USUAL)
        assert whole.sampler is not None
        found = list[str]()
        if self.reuse is not None and whole.steps == 1 and not any(self.sigmas[-1:]):  # a step to 0 is one evaluation
            found.append("the U-Net is evaluated once, so there is no effect of reuse")
        if self.perp_negative is not None and not any(request.negative for request in requests):
            return [*found, "there is no negative prompt, so there is no effect of perp_negative"]
        plus = catalogue.SAMPLERS[catalogue.resolve(whole.sampler)[0]].unguided
        joined = self.prompt_syntax == "weighted" and any(len(grammar.clauses(each.prompt)) > 1 for each in requests)
        if whole.cfg != 1 or self.perp_negative is not None or plus or joined:  # what AND joins is guided at 1, too
            return found
        asked = {
            "the negative prompt": any(request.negative for request in requests),
            "the guide model": self.guide_model is not None,
            "cfg_rescale": self.cfg_rescale > 0,
            "cfg_interval": self.cfg_interval is not None,
        }
        names = [name for name, given in asked.items() if given]
        if names:
            found.append(f"at guidance scale 1 nothing is guided, so there is no effect of {' and '.join(names)}")
        return found

    def but(self, cfg: float | None = None, steps: int | None = None, sampler: str | None = None) -> Settings:
        """The same with those of these that are not None."""
        given = {"cfg": cfg, "steps": steps, "sampler": sampler}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    def _typed(self) -> Settings:
        """The same in Python's own types (numpy's numbers are none for JSON); raises UserError for other things."""
        convert = {"tuple[int": wholes, "int": whole, "float": real, "str": word, "tuple": reals, "dict": table}
        given = {f.name: (getattr(self, f.name), str(f.type)) for f in dataclasses.fields(self)}
        made = {
            name: convert[kind.partition(",")[0] if "[int" in kind else re.split(r"[ \[]", kind)[0]](value, name)
            for name, (value, kind) in given.items()
            if value is not None or not kind.endswith("None")
        }
        if self.cfg_interval is not None and len(made["cfg_interval"]) != 2:
            raise UserError(f"cfg_interval is {shown(self.cfg_interval)}; give low and high in sigma")
        return dataclasses.replace(self, **made)

    def _check_sizes(self) -> None:
        for name, pair, least in (
            ("original_size", self.original_size, 1),
            ("target_size", self.target_size, 1),
            ("crop", self.crop, 0),
        ):
            if pair is not None and (len(pair) != 2 or not least <= min(pair) <= max(pair) <= MAX_SIDE):
                kind = "top and left" if name == "crop" else "height and width"
                raise UserError(f"{name} is {shown(pair)}; give {kind}, from {least} to {MAX_SIDE} pixels")
        for name in ("score", "negative_score"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; choose a finite number, such as 6")
        _below(self.refine_below)
        if self.refiner is None and self.refine_below != Settings.refine_below:
            raise UserError(f"refine_below is {self.refine_below}, and no refiner takes over there; name one with it")
        if self.refiner is not None and self.guide_model is not None:
            raise UserError("a refiner does not go with a guide model; choose one of the two")

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

    def _check_shortcuts(self, sampler: str) -> None:
        share, every, branch = self.merge_tokens, self.reuse, self.reuse_branch
        if share is not None and not 0 < share <= 0.75:
            raise UserError(f"merge_tokens is {share:g}; choose a share above 0 and at most 0.75, such as 0.5")
        if every is not None and every < 2:
            raise UserError(f"reuse is {every}; choose 2 (each second evaluation is whole) or more")
        if branch < 0 or (branch and every is None):
            raise UserError(f"reuse_branch is {branch}; choose 0 or more, and reuse with it")
        asked = "reuse" if every is not None else "merge_tokens" if share is not None else None
        if asked and sampler in catalogue.ADAPTIVE:
            raise UserError(f"{sampler} measures its own error, and {asked} would be that; choose another sampler")
        if every is not None and sampler == "restart":
            raise UserError(
                "restart goes back to high levels, and reuse keeps what it saw at lower ones; leave one out"
            )


def _below(text: str) -> tuple[float | None, float]:
    """ "20%" -> (None, 0.2), "0.57" -> (0.57, 0.0): a share of the trained levels, or a sigma. Raises UserError."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    share = text.endswith("%")
    if not 0 < number < (100 if share else math.inf):
        raise UserError(
            f"refine_below is '{text[:40]}'; give a share of the trained levels, such as 20%, or a sigma, such as 0.57"
        )
    return (None, number / 100) if share else (number, 0.0)
