"""What foreign files say of a model beside its tensors' shapes: statements, and what follows where two disagree.

    marker tensors          v_pred, ztsnr, ...: mostly empty, their names say it (the common interfaces and trainers)
    words in the metadata   modelspec.* (the ModelSpec standard and ComfyUI's addition to it), ss_* (kohya's trainers)
    settings files          a YAML beside the file (original_yaml.py), diffusers' JSON (scheduler_config.py)

A statement is followed, or refused by name: a law that is passed over is a wrong picture without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.diffusion.schedule import OWN
from ldm.errors import UserError
from ldm.model_config import ModelConfig, ScheduleConfig, TextConfig

ZERO_SNR = "schedule.zero_terminal_snr"
FLOW = ScheduleConfig("flow")


@dataclass(frozen=True)
class Said:
    """One statement: which setting, what it is said to be, and who says so ("the tensor v_pred").

    A value of None stands for what our settings have no word for. A schedule is said without its rescaling to zero
    terminal SNR, which is a statement of its own.
    """

    key: str
    value: Any
    where: str


# ---------------------------------------------------------------- tensors and words

MARKERS: Mapping[str, tuple[str, Any]] = {
    "v_pred": ("parameterization", "v"),
    "ztsnr": (ZERO_SNR, True),
}
NUMBERS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")  # of EDM's laws (edm.py)
PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps"), "eps"),
    **dict.fromkeys(("v", "v_prediction", "v_pred", "vpred", "velocity"), "v"),
    **dict.fromkeys(("sample", "x0"), "x0"),
    **dict.fromkeys(("flow", "flow_matching", "flow_prediction", "rectified_flow"), "flow"),
}
ARCHITECTURES = {"stable_diffusion_v2_512": "eps", "stable_diffusion_v2_768_v": "v"}
VERSIONS = {"sd_v1": "eps", "sd_v2": "eps", "sd_v1_v": "v", "sd_v2_v": "v"}  # of kohya's trainers
YES_NO = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
V_OR_EPS = {word: "v" if yes else "eps" for word, yes in YES_NO.items()}
SILENT = ("", "none", "null", "auto", "unknown")  # what those write who do not know


def marker(name: str) -> str:
    """Which of MARKERS or NUMBERS a tensor's name is; "" if it is none."""
    bare = re.sub(r"^model\.(diffusion_model\.)?", "", name)
    return bare if bare in MARKERS or bare in NUMBERS else ""


def by_tensors(names: Iterable[str]) -> list[Said]:
    """What the empty marker tensors among `names` say."""
    return [Said(*MARKERS[marker(name)], f"the tensor {name}") for name in names if marker(name) in MARKERS]


def by_words(words: Mapping[str, str], text: TextConfig | None) -> list[Said]:
    """What a file's metadata says of its law, its text tower (whose shapes are `text`) and its pictures' size."""
    found: list[Said] = []

    def say(name: str, key: str, meanings: Mapping[str, Any], strict: bool = True) -> None:
        word = re.sub(r"[\s-]", "_", words.get(name, "").strip().lower())
        if word not in SILENT and (strict or word in meanings):
            found.append(Said(key, meanings.get(word), f"the word {name}={words[name][:60]}"))

    flow = words.get("modelspec.noise_process", "").strip().lower() == "flow"
    for name in ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type"):
        say(name, "parameterization", PREDICTIONS | ({"velocity": "flow"} if flow else {}))
    for name in ("ss_v_parameterization", "v_parameterization", "v_pred"):
        say(name, "parameterization", V_OR_EPS)
    say("modelspec.architecture", "parameterization", ARCHITECTURES, strict=False)
    say("ss_base_model_version", "parameterization", VERSIONS, strict=False)
    for name in ("ss_zero_terminal_snr", "zero_terminal_snr", "ztsnr"):
        say(name, ZERO_SNR, YES_NO)
    say("modelspec.noise_process", "parameterization", {"flow": "flow"}, strict=False)
    found += [Said("schedule", FLOW, said.where) for said in found if said.value == "flow"]
    if text is not None:
        # Counted from the end. v2's trainers and readers count without the 24th block, or do not look at the number.
        second = text_layer("penultimate", text)
        layers = {"0": "last", "1": "last", "2": second} if text.cleaning == "plain" else {"1": second, "2": second}
        for name in ("modelspec.encoder_layer", "ss_clip_skip"):
            say(name, "text.layer", layers)
    side = words.get("modelspec.resolution", "").partition("x")[0]
    if side.isdecimal() and 0 < int(side) < 1 << 16:
        found.append(Said("image_size", int(side), f"the word modelspec.resolution={side}"))
    return found


def text_layer(layer: str, text: TextConfig) -> str | None:
    """`layer`, said of the whole tower, in the one that is stored: some files leave out v2's 24th block, as unused."""
    if text.cleaning == "open_clip" and text.layers == 23:
        return "last" if layer == "penultimate" else None
    return layer


def range_remark(words: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence about a network that says it was tuned on some of the levels alone, which no setting of ours can."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*", words.get("modelspec.timestep_range", ""))
    if found is None or (int(found[1]) == 0 and int(found[2]) >= 999):
        return ()
    return (f"the U-Net says it was tuned on the times {found[1]} to {found[2]} alone; it is used at all of them",)


# ---------------------------------------------------------------- what follows


def settle(statements: Iterable[Said], path: Path, decided: Collection[str]) -> dict[str, Any]:
    """Setting -> what the statements say it is. Of `decided` ones, which the user has named, it is the first's word.

    Raises UserError, naming who says what, for two that disagree on another, and for one that our settings have no
    word for.
    """
    named = {*decided, *(["schedule"] if names_schedule(decided) else [])}
    known = list(statements)
    found: dict[str, Said] = {}
    for said in known:
        if said.value is None and said.key not in named:
            keys = dict.fromkeys(other.key for other in known if other.value is None and other.where == said.where)
            raise UserError(
                f"{path} is not read: it says ({said.where}) that it is of a kind not known here; if that is wrong, "
                f"say what it is: {_set(keys)}"
            )
        if said.value is None:
            continue
        other = found.setdefault(said.key, said)
        if said.key not in named and not _same(other.value, said.value):
            raise UserError(
                f"{path} contradicts itself: {other.where} says that {said.key} is {_show(other.value)}, {said.where} "
                f"that it is {_show(said.value)}; say which is right: {_set([said.key])}"
            )
    return {key: said.value for key, said in found.items()}


def names_schedule(decided: Collection[str]) -> bool:
    """Whether the settings that the user names say which schedule it is, and not its rescaling alone."""
    return any(key.startswith("schedule.") and key != ZERO_SNR for key in decided)


def _set(keys: Iterable[str]) -> str:
    words = (f"--set {'schedule.kind' if key == 'schedule' else key}=..." for key in keys)
    return f"{' '.join(words)} (init_set of a training)"


def follow(config: ModelConfig, answers: Mapping[str, Any]) -> ModelConfig:
    """`config` with the settings that `settle` found, but for those of parts that it has not."""
    for key, value in sorted(answers.items()):  # the schedule goes before its rescaling
        part, _, name = key.partition(".")
        inner: Any = getattr(config, part) or (ScheduleConfig() if part == "schedule" else None)
        if name and inner is None:
            continue
        if name:
            value = replace(inner, **{name: value})
        config = replace(config, **{part: value})
    return config


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, ScheduleConfig) and isinstance(b, ScheduleConfig):
        read = [name for kinds, names in OWN.items() if a.kind in kinds for name in names]
        same = (math.isclose(getattr(a, name), getattr(b, name), rel_tol=1e-3) for name in read)
        return (a.kind, a.steps) == (b.kind, b.steps) and all(same)
    return a == b


def _show(value: Any) -> str:
    if isinstance(value, ScheduleConfig):
        ends = f" {value.beta_start:g} to {value.beta_end:g}" if "linear" in value.kind else ""
        ends += f" {value.sigma_min:g} to {value.sigma_max:g}" if value.kind in ("ve", "edm") else ""
        ends += f" with shift {value.shift:g}" if value.shift != 1 else ""
        return f"{value.kind}{ends} over {value.steps} steps"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
