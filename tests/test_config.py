"""Settings: defaults, then YAML, then words; what does not fit is one sentence that names the way out."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import (
    AutoencoderConfig,
    AutoencoderTraining,
    ClipTraining,
    DataConfig,
    DiffusionTraining,
    ModelConfig,
    TextConfig,
    UNetConfig,
    from_dict,
    load,
    to_dict,
)
from ldm.errors import UserError
from ldm.ranges import Count
from ldm.settings import changed, listing, names

CONFIGS = Path(__file__).parents[1] / "configs"
TRAININGS = {"autoencoder": AutoencoderTraining, "clip": ClipTraining, "diffusion": DiffusionTraining}
RECIPES = sorted((kind, path.name) for kind in TRAININGS for path in (CONFIGS / kind).glob("*.yaml"))


@pytest.fixture
def yaml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_words_are_merged_over_the_file_and_the_file_over_the_defaults(yaml):
    path = yaml("data: {size: 128, flip: true}\nloop: {steps: 7}\n")
    config = load(AutoencoderTraining, path, ["data.size=32", "optimizer.rate=1e-3", "output=runs/a=b"])
    assert (config.data.size, config.data.flip, config.data.crop) == (32, True, "center")
    assert (config.loop.steps, config.optimizer.rate, config.output) == (7, 1e-3, "runs/a=b")


def test_tuples_lists_and_mappings_keep_their_types(yaml):
    config = load(
        DiffusionTraining,
        yaml("model: {multipliers: [1, 2]}\ndata: {where: {style: [noto emoji]}}\n"),
        ["sample.prompts=[a heart, 'a, b']", "optimizer.betas=[0.8,0.9]"],
    )
    assert config.model.multipliers == (1, 2)
    assert config.data.where == {"style": ["noto emoji"]}
    assert config.sample.prompts == ("a heart", "a, b")
    assert config.optimizer.betas == (0.8, 0.9)
    assert hash(config.model) == hash(dataclasses.replace(config.model))


@pytest.mark.parametrize(("kind", "name"), RECIPES)
def test_every_recipe_is_one(kind, name):
    assert load(TRAININGS[kind], CONFIGS / kind / name) != TRAININGS[kind]()


def test_each_stage_has_its_recipes():
    assert {("autoencoder", "tiny.yaml"), ("clip", "tiny.yaml"), ("diffusion", "tiny.yaml")} <= set(RECIPES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.sise=32"], "unknown setting 'data.sise'; did you mean 'data.size'?"),
        (["optimiser.rate=1"], "unknown setting 'optimiser'; did you mean 'optimizer'?"),
        (["loss.adversarial_strat=3"], "did you mean 'loss.adversarial_start'?"),
        (["data.size=big"], "big"),
        (["data.flip=maybe"], "maybe"),
        (["model.multipliers=[1,x]"], "model.multipliers must be a whole number, not 'x'"),
        (["optimizer.betas=[0.9]"], "optimizer.betas must be a list of 2, not '[0.9]'"),
        (["data"], "'data' is not of the form key=value"),
        (["output=x", "data.where=[a {}]"], "'data.where=[a {}]': "),
        (["data=3"], "data must be a group of settings, not '3'"),
        (["output=${oc.env:HOME}"], "has an interpolation, which settings may not; write the value itself"),
        (["data.where.style=['${data.size}']"], "has an interpolation"),
    ],
)
def test_what_does_not_fit_is_one_sentence(words, message):
    with pytest.raises(UserError) as caught:
        load(AutoencoderTraining, None, words)
    assert message in str(caught.value)
    said = str(caught.value)
    assert said.startswith(("the arguments: ", f"'{words[-1]}'")) or "key=value" in said
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [", "run.yaml"),
        ("- a\n- b\n", "is not a mapping of settings"),
        ("just words", "run.yaml"),
        ("data: {sise: 3}", "run.yaml: unknown setting 'data.sise'; did you mean 'data.size'?"),
        ("3: 4", "unknown setting '3'"),
        ("loop: {steps: !!python/object/apply:os.system ['true']}", "run.yaml"),
    ],
)
def test_a_file_that_does_not_fit_is_named(yaml, text, message):
    with pytest.raises(UserError, match=r"run\.yaml") as caught:
        load(AutoencoderTraining, yaml(text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file_is_the_defaults(yaml):
    assert load(DataConfig, yaml("")) == DataConfig()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder .*missing.yaml"):
        load(DataConfig, tmp_path / "missing.yaml")


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load(DataConfig, tmp_path / "run.yaml")


def test_a_whole_model_survives_json():
    config = ModelConfig(AutoencoderConfig(), TextConfig(token_ids=(1, 2)), UNetConfig(), None, "v", 64)
    assert from_dict(ModelConfig, to_dict(config), "model.json") == config


def test_something_else_than_settings():
    with pytest.raises(UserError, match=r"model\.json: expected a mapping of settings, found list"):
        from_dict(ModelConfig, [1], "model.json")
    with pytest.raises(UserError, match=r"model\.json: unknown setting 'autoencoder\.chanels'; did you mean 'autoen"):
        from_dict(ModelConfig, {"autoencoder": {"chanels": 3}}, "model.json")


@settings(deadline=None, max_examples=30)
@given(
    st.builds(
        AutoencoderConfig,
        channels=st.integers(1, 512),
        multipliers=st.lists(st.integers(1, 8), min_size=1, max_size=5).map(tuple),
        patch=st.integers(1, 4),
        middle_attention=st.booleans(),
        scale=st.lists(st.floats(0.01, 100), min_size=1, max_size=4).map(tuple),
    )
)
def test_to_dict_is_undone_by_from_dict(config):
    assert from_dict(AutoencoderConfig, to_dict(config), "test") == config
    assert config.factor == config.patch * 2 ** (len(config.multipliers) - 1)


def test_the_identity_codec_has_no_factor_and_the_picture_s_channels():
    config = AutoencoderConfig(kind="identity")
    assert (config.factor, config.channels_of_latent) == (1, 3)


def test_long_lists_of_numbers_come_back_whole_and_in_their_place():
    """A tower's tokens go around OmegaConf, which is slow with them; nothing else may change."""
    model = ModelConfig(text=TextConfig(token_ids=tuple(range(0, 9000, 3)), width=64))
    assert from_dict(ModelConfig, to_dict(model), "here") == model


def test_a_long_list_where_a_number_belongs_is_refused():
    with pytest.raises(UserError, match="here"):
        from_dict(ModelConfig, {"text": {"width": list(range(200))}}, "here")


def test_a_word_replaces_what_the_file_says(tmp_path):
    """Merged, an empty mapping would change nothing, and a file's filter could not be lifted."""
    (tmp_path / "a.yaml").write_text("data: {size: 32, where: {style: [flat emoji]}}")
    read = load(DiffusionTraining, tmp_path / "a.yaml", ["data.where={}"])
    assert (read.data.where, read.data.size) == ({}, 32)
    read = load(DiffusionTraining, tmp_path / "a.yaml", ["data.where.name=[sun]"])
    assert read.data.where == {"style": ["flat emoji"], "name": ["sun"]}


def test_nothing_after_the_equals_sign_is_the_empty_text_where_a_text_is_wanted(tmp_path):
    (tmp_path / "a.yaml").write_text("autoencoder: runs/ae\ndata: {validation: b.tar}\nloss: {level_mean: 1.0}\n")
    made = load(DiffusionTraining, tmp_path / "a.yaml", ["autoencoder=", "data.validation=", "loss.level_mean="])
    assert (made.autoencoder, made.data.validation, made.loss.level_mean) == ("", "", None)
    with pytest.raises(UserError, match="unknown setting 'autoencode'"):
        load(DiffusionTraining, None, ["autoencode="])


# ---------------------------------------------------------------- one of several


@dataclass(frozen=True)
class Grey:
    """Of one level."""

    kind: str = "grey"
    level: Count = 1  # from black


@dataclass(frozen=True)
class Tint:
    """Of a hue."""

    kind: str = "tint"
    hue: float = 0.5  # round the circle
    level: Count = 2


@dataclass(frozen=True)
class Paint:
    coat: Grey | Tint = Grey(level=3)
    under: Grey | Tint | None = None


def test_one_of_several_is_told_by_its_kind():
    assert from_dict(Paint, {"coat": {"level": 4}}, "here") == Paint(Grey(level=4))
    assert from_dict(Paint, {"coat": {"kind": "tint"}}, "here") == Paint(Tint())  # nothing of the default's is kept
    assert from_dict(Paint, {"under": {"hue": 0.1, "kind": "tint"}}, "here").under == Tint(hue=0.1)
    assert from_dict(Paint, {"under": {}}, "here").under == Grey()  # as those wrote who knew no other
    assert load(Paint, None, ["coat.kind=tint", "coat.hue=0.25"]).coat == Tint(hue=0.25)
    for paint in (Paint(), Paint(Tint(hue=0.1), Tint()), Paint(under=Grey())):
        assert from_dict(Paint, to_dict(paint), "here") == paint
    base = Paint(Tint(hue=0.1))
    assert from_dict(Paint, {"coat": to_dict(base.coat) | {"level": 9}}, "here").coat == Tint(hue=0.1, level=9)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"coat": {"kind": "oil"}}, "coat.kind must be one of grey, tint, not 'oil'"),
        ({"coat": {"kind": ["tint"]}}, "coat.kind must be one of grey, tint"),
        ({"coat": 3}, "coat must be a group of settings"),
        ({"coat": None}, "coat must be a group of settings"),
        ({"coat": {"hue": 0.1}}, "unknown setting 'coat.hue'"),
        ({"coat": {"kind": "tint", "level": 0}}, "coat.level must be"),
        ({"under": {"kind": "tint", "hue": "blue"}}, "under.hue must be a number"),
    ],
)
def test_one_of_several_that_does_not_fit_is_one_sentence(plain, message):
    with pytest.raises(UserError) as error:
        from_dict(Paint, plain, "here")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_changed_tells_the_kind_of_all_but_the_first():
    """A model's hash is made of it: what was the only kind once has to go on without its name."""
    assert changed(Paint(Grey(level=4), Grey())) == {"coat": {"level": 4}, "under": {}}
    assert changed(Paint(Tint(), Tint(hue=0.1))) == {"coat": {"kind": "tint"}, "under": {"kind": "tint", "hue": 0.1}}


def test_names_and_help_are_of_all_kinds():
    assert list(names(Paint)) == [f"{part}.{key}" for part in ("coat", "under") for key in ("kind", "level", "hue")]
    assert any("coat.level=3" in line and "from black" in line for line in listing(Paint))
