"""Every number of every setting has its range in its type, and what lies outside is refused by its name."""

import math
from typing import get_args

import pytest

from ldm import config as configs
from ldm import ranges
from ldm.config import (
    AutoencoderTraining,
    ClipTraining,
    DataConfig,
    DiffusionTraining,
    EmbeddingTraining,
    ModelConfig,
    OptimizerConfig,
    from_dict,
    load,
    to_dict,
)
from ldm.errors import UserError
from ldm.plain import leaves
from ldm.ranges import OneOf, Range
from ldm.settings import listing, names

TRAININGS = (AutoencoderTraining, ClipTraining, DiffusionTraining, EmbeddingTraining)
WHOLE_LINE = {"sample.cfg", "loss.level_mean"}  # numbers that may be negative; and the latent's shift
ROOMS = ("ldm.config", "ldm.model_config")
DATACLASSES = [each for each in vars(configs).values() if isinstance(each, type) and each.__module__ in ROOMS]


def numbers(hint) -> list[tuple[type, list]]:
    """(int or float, its rules) of each number in a type."""
    inner = get_args(hint)
    if hasattr(hint, "__metadata__"):
        rules = list(hint.__metadata__)
        found = numbers(inner[0])
        return [(kind, rules + more) for kind, more in found]
    if hint in (int, float):
        return [(hint, [])]
    return [number for each in inner if each not in (type(None), ...) for number in numbers(each)]


@pytest.mark.parametrize("cls", DATACLASSES, ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    without = [
        name
        for name, hint in ranges._hints(cls).items()
        for _, rules in numbers(hint)
        if not any(isinstance(rule, Range) for rule in rules)
    ]
    assert set(without) <= {"cfg", "cfg_range", "level_mean", "shift"}


@pytest.mark.parametrize("cls", TRAININGS, ids=lambda cls: cls.__name__)
def test_no_setting_of_a_training_takes_a_number_that_is_none_or_far_out(cls):
    """Whatever the field: NaN, infinities, and for all but a few, -1. The refusal begins with the dotted name."""
    usual = dict(leaves(to_dict(cls())))
    tried = 0
    for name in names(cls):
        whole, value = name.rpartition(".")[2], usual.get(name)
        wrong = [math.nan, math.inf, -math.inf, *([] if name in WHOLE_LINE or whole == "shift" else [-1])]
        for number in wrong if isinstance(value, int | float) and not isinstance(value, bool) else []:
            with pytest.raises(UserError, match=rf"^the arguments: {name.replace('.', '[.]')} must be "):
                load(cls, None, [f"{name}={number}".replace("inf", ".inf").replace("nan", ".nan")])
            tried += 1
        if isinstance(value, list) and value and not isinstance(value[0], str):
            for number in wrong:
                said = ",".join([str(number).replace("inf", ".inf").replace("nan", ".nan")] * len(value))
                with pytest.raises(UserError, match=rf"^the arguments: {name.replace('.', '[.]')} must be "):
                    load(cls, None, [f"{name}=[{said}]"])
                tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    ("cls", "word", "said"),
    [
        (DiffusionTraining, "optimizer.rate=nan", "optimizer.rate must be above 0, not nan"),
        (DiffusionTraining, "optimizer.rate=-1", "optimizer.rate must be above 0, not -1.0"),
        (DiffusionTraining, "optimizer.rate=0", "optimizer.rate must be above 0, not 0.0"),
        (DiffusionTraining, "optimizer.betas=[2,3]", "optimizer.betas must be at least 0 and below 1, not 2.0"),
        (DiffusionTraining, "optimizer.betas=[0.9,1]", "optimizer.betas must be at least 0 and below 1, not 1.0"),
        (DiffusionTraining, "loop.seed=99999999999999999999", "loop.seed must be at least 0 and at most 92233720368"),
        (DiffusionTraining, "loop.seed=-1", "loop.seed must be at least 0"),
        (DiffusionTraining, "sample.cfg=nan", "sample.cfg must be a finite number, not nan"),
        (DiffusionTraining, "sample.steps=0", "sample.steps must be at least 1, not 0"),
        (DiffusionTraining, "loss.offset_noise=nan", "loss.offset_noise must be at least 0, not nan"),
        (DiffusionTraining, "loss.caption_dropout=1.5", "loss.caption_dropout must be at least 0 and at most 1"),
        (DiffusionTraining, "model.multipliers=[]", "model.multipliers must be a list with an entry at least, not []"),
        (DiffusionTraining, "model.multipliers=[1,0]", "model.multipliers must be at least 1, not 0"),
        (DiffusionTraining, "schedule.steps=1", "schedule.steps must be at least 2, not 1"),
        (DiffusionTraining, "data.mixture={a: -1}", "data.mixture must be above 0, not -1.0"),
        (DiffusionTraining, "loop.ema_widths=[0.3]", "loop.ema_widths must be at least 0.001 and at most 0.2886"),
        (DiffusionTraining, "data.size=99999", "data.size must be at least 1 and at most 16384, not 99999"),
        (AutoencoderTraining, "loss.adaptive_max=1e300", "loss.adaptive_max must be at least -3e+38 and at most 3e+38"),
        (AutoencoderTraining, "loss.kl=-1e-6", "loss.kl must be at least 0, not -1e-06"),
        (AutoencoderTraining, "optimizer.weight_decay=-0.1", "optimizer.weight_decay must be at least 0"),
        (AutoencoderTraining, "optimizer.warmup=-5", "optimizer.warmup must be at least 0, not -5"),
        (AutoencoderTraining, "optimizer.clip=-1", "optimizer.clip must be at least 0, not -1.0"),
        (AutoencoderTraining, "data.workers=-1", "data.workers must be at least 0 and at most 1024, not -1"),
        (AutoencoderTraining, "data.crop=centre", "data.crop must be one of center, random, not 'centre'"),
        (AutoencoderTraining, "scale_samples=0", "scale_samples must be at least 1, not 0"),
        (EmbeddingTraining, "templates=[]", "templates must be a list with an entry at least, not []"),
        (EmbeddingTraining, "vectors=0", "vectors must be at least 1, not 0"),
    ],
)
def test_the_faces_of_it(cls, word, said):
    with pytest.raises(UserError) as caught:
        load(cls, None, [word])
    assert str(caught.value).startswith(f"the arguments: {said}") and "\n" not in str(caught.value)


def test_a_checkpoint_s_settings_have_the_same_ranges_and_name_where_they_stand():
    plain = to_dict(ModelConfig(unet=configs.UNetConfig()))
    plain["unet"]["channels"] = -4
    with pytest.raises(UserError, match=r"^model\.json: unet\.channels must be at least 1, not -4$"):
        from_dict(ModelConfig, plain, "model.json")


def test_the_library_is_checked_too_and_what_is_right_passes():
    ranges.check(DiffusionTraining())
    ranges.check(DataConfig(mixture={"a": 0.5}))
    with pytest.raises(UserError, match=r"^optimizer\.betas must be at least 0 and below 1, not 3$"):
        ranges.check(DiffusionTraining(optimizer=OptimizerConfig(betas=(0.9, 3))))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Range(), "a finite number"),
        (Range(least=1), "at least 1"),
        (Range(least=0, below=1), "at least 0 and below 1"),
        (Range(above=0, most=2), "above 0 and at most 2"),
        (OneOf("a", "b"), "one of a, b"),
    ],
)
def test_a_range_says_itself(rule, said):
    assert str(rule) == said


def test_a_number_of_any_length_is_compared_and_no_other_error():
    assert Range(least=0).holds(10**400) and not Range(most=5).holds(10**400)


@pytest.mark.parametrize("cls", TRAININGS, ids=lambda cls: cls.__name__)
def test_the_listing_has_every_setting_with_a_comment(cls):
    lines = list(listing(cls))
    for name in names(cls):
        said = [line for line in lines if line.startswith(f"  {name}=")]  # several, where kinds share a name
        assert said and all(line.removeprefix("  ").count("  ") for line in said), f"{name} has no comment on its line"
