"""What a file says of its own law is followed, and two statements that disagree are refused with both named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldm
from ldm.checkpoints import export, original
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_metadata
from ldm.checkpoints.said import follow
from ldm.config import ModelConfig, ScheduleConfig
from ldm.errors import UserError

from .listed import LISTS, SCHEDULE, opened
from .small_models import SMALL, random_states

BARE = {version: {n: s for n, s in LISTS[version].items() if n not in SCHEDULE} for version in ("v1", "v2")}
ZERO = ScheduleConfig(zero_terminal_snr=True)


def law(config: ModelConfig) -> tuple[str, ScheduleConfig | None]:
    return config.parameterization, config.schedule


# ---------------------------------------------------------------- marker tensors


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
@pytest.mark.parametrize("tables", [True, False])
def test_markers_of_a_v_prediction(prefix: str, tables: bool):
    """A plain table beside ztsnr is what the model had before its schedule was rescaled."""
    shapes = LISTS["v1"] if tables else BARE["v1"]
    marked = opened(shapes | {f"{prefix}v_pred": [0], f"{prefix}ztsnr": [0]})
    assert law(marked.config) == ("v", ZERO) and marked.config.image_size == 512
    assert "parameterization" not in marked.assumed and marked.foreign == ()
    assert marked.state("unet")
    assert law(opened(shapes | {f"{prefix}v_pred": [0]}).config) == ("v", ScheduleConfig())
    rescaled = opened(shapes | {f"{prefix}ztsnr": [0]})
    assert law(rescaled.config) == ("v", ZERO) and "parameterization" in rescaled.assumed


COSXL = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
MEAN, STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
PLAYGROUND = {"edm_mean": torch.tensor(MEAN).reshape(1, 4, 1, 1), "edm_std": torch.tensor(STD).reshape(1, 4, 1, 1)}


def marked(tensors: Mapping[str, Tensor], *more: str, name: str = "xl") -> ModelConfig:
    shapes = {key: list(value.shape) for key, value in tensors.items()} | {key: [0] for key in more}
    found = opened(LISTS[name] | shapes, tensors=tensors)
    assert found.foreign == () and "parameterization" not in found.assumed
    return found.config


@pytest.mark.parametrize("more", [(), ("v_pred",)])
def test_markers_of_cosxl(more: tuple[str, ...]):
    config = marked(COSXL, *more)
    assert law(config) == ("v", ScheduleConfig("edm", sigma_min=0.002, sigma_max=120.0))
    assert config.autoencoder is not None and config.autoencoder.scale == (0.13025,)
    assert law(marked({"edm_vpred.sigma_max": torch.tensor([80.0])}))[1] == ScheduleConfig("edm")
    half = {name: value.half() for name, value in COSXL.items()}
    assert law(marked(half, *more))[1] == ScheduleConfig("edm", sigma_min=pytest.approx(0.002, rel=1e-3), sigma_max=120)


def test_markers_of_playground():
    config = marked(PLAYGROUND)
    assert law(config) == ("edm", ScheduleConfig("edm")) and config.sigma_data == 0.5
    assert config.autoencoder is not None and config.autoencoder.shift == MEAN
    assert config.autoencoder.scale == tuple(0.5 / one for one in STD)


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
def test_markers_of_v_prediction_among_those_of_xl(prefix: str):
    """Merges of XL have no table beside them."""
    empty = torch.empty(0)
    assert law(marked({f"{prefix}v_pred": empty})) == ("v", ScheduleConfig())
    assert law(marked({f"{prefix}v_pred": empty, f"{prefix}ztsnr": empty})) == ("v", ZERO)
    assert law(opened(LISTS["xl"] | {"ztsnr": [0]}).config) == ("v", ZERO)
    refiner = opened(LISTS["xl_refiner"] | {"v_pred": [0]})
    assert refiner.config.encoder.score and law(refiner.config) == ("v", ScheduleConfig())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"edm_vpred.sigma_min": torch.tensor(0.002)}, "edm_vpred.sigma_max is missing"),
        ({"edm_mean": torch.zeros(4)}, "edm_std is missing"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, "no mean and deviation"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(3)}, "no mean and deviation"),
        ({"edm_vpred.sigma_max": torch.tensor(float("inf"))}, "holds 1 numbers"),
        ({"edm_vpred.sigma_max": torch.empty(0)}, "holds 0 numbers"),
        ({"edm_vpred.sigma_max": torch.zeros(1).expand(10**12)}, "holds 1000000000000 numbers"),
        ({"edm_vpred.sigma_max": torch.tensor(-1.0)}, "no law"),
        ({"edm_vpred.sigma_max": torch.tensor([120.0, 80.0])}, "holds 2 numbers, and should hold one, finite"),
        (COSXL | {"edm_vpred.sigma_min": torch.ones(3)}, "holds 3 numbers, and should hold one, finite"),
        (COSXL | PLAYGROUND, "edm_mean says that parameterization is edm, the tensor edm_vpred.sigma_max that it is v"),
    ],
)
def test_numbers_that_make_no_law_of_edm(tensors: dict[str, Tensor], words: str):
    with pytest.raises(UserError, match=words):
        marked(tensors)


def test_what_is_said_of_a_part_that_is_not_there_is_passed_over():
    config = ModelConfig(image_size=64)
    assert follow(config, {"autoencoder.shift": MEAN, "schedule.zero_terminal_snr": True}).autoencoder is None


def test_cosxl_and_a_table_of_a_chain_disagree():
    shapes = LISTS["v1"] | {name: [] for name in COSXL}
    with pytest.raises(
        UserError, match=r"edm_vpred\.sigma_max.*edm 0\.002 to 120.*the table alphas_cumprod.*scaled_linear"
    ):
        opened(shapes, tensors=SCHEDULE | COSXL)


# ---------------------------------------------------------------- words in the metadata


@pytest.mark.parametrize(
    ("version", "words", "wanted"),
    [
        ("v1", {"modelspec.prediction_type": "v"}, ("v", ScheduleConfig())),
        ("v1", {"modelspec.prediction_type": "V-Prediction"}, ("v", ScheduleConfig())),
        ("v2", {"modelspec.prediction_type": "epsilon"}, ("eps", ScheduleConfig())),
        ("v1", {"modelspec.prediction_type": "sample"}, ("x0", ScheduleConfig())),
        ("v1", {"modelspec.predict_key": "v"}, ("v", ScheduleConfig())),
        ("v2", {"modelspec.predict_key": "epsilon"}, ("eps", ScheduleConfig())),
        ("v2", {"modelspec.architecture": "stable-diffusion-v2-512"}, ("eps", ScheduleConfig())),
        ("v2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("v", ScheduleConfig())),
        ("v1", {"modelspec.architecture": "stable-diffusion-v1"}, ("eps", ScheduleConfig())),
        ("v1", {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, ("v", ZERO)),
        ("v2", {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}, ("eps", ScheduleConfig())),
        ("v1", {"ss_base_model_version": "sd_v1_v"}, ("v", ScheduleConfig())),
        ("v2", {"ss_base_model_version": "sd_v2"}, ("eps", ScheduleConfig())),
        ("v1", {"v_pred": "true", "ztsnr": "1"}, ("v", ZERO)),
        ("v1", {"prediction_type": "v_prediction"}, ("v", ScheduleConfig())),
        ("v1", {"modelspec.noise_process": "flow", "modelspec.prediction_type": "velocity"}, ("flow", None)),
        ("v1", {"modelspec.noise_process": "ddpm", "modelspec.prediction_type": "velocity"}, ("v", ScheduleConfig())),
        ("v1", {"modelspec.prediction_type": "flow_matching"}, ("flow", None)),
        ("v1", {"modelspec.prediction_type": "", "ss_v_parameterization": "None"}, ("eps", ScheduleConfig())),
    ],
)
def test_words_name_the_law(version: str, words: Mapping[str, str], wanted: tuple[str, ScheduleConfig | None]):
    checkpoint = opened(BARE[version], words=words)
    assert law(checkpoint.config) == (wanted[0], wanted[1] or ScheduleConfig("flow"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"modelspec.prediction_type": "edm"}, "modelspec.prediction_type=edm"),
        ({"modelspec.predict_key": "cosmos"}, "modelspec.predict_key=cosmos"),
        ({"ss_v_parameterization": "perhaps"}, "ss_v_parameterization=perhaps"),
        ({"modelspec.encoder_layer": "5"}, "modelspec.encoder_layer=5"),
    ],
)
def test_words_that_are_not_known_are_refused_by_name(words: Mapping[str, str], named: str):
    with pytest.raises(UserError, match=rf"not read.*{named}"):
        opened(BARE["v1"], words=words)


def test_the_layer_that_a_text_tower_was_trained_for():
    for words in ({"modelspec.encoder_layer": "2"}, {"ss_clip_skip": "2"}):
        skipping = opened(BARE["v1"], words=words)
        assert skipping.config.text is not None and skipping.config.text.layer == "penultimate"
        assert "text.layer" not in skipping.assumed
        assert any("all blocks but the last" in remark for remark in skipping.remarks)
    for version, layer in (("v1", "last"), ("v2", "penultimate")):
        config = opened(BARE[version], words={"modelspec.encoder_layer": "1"}).config
        assert config.text is not None and config.text.layer == layer


def test_the_layer_before_the_last_is_the_last_of_a_tower_stored_without_that():
    shapes = {name: shape for name, shape in BARE["v2"].items() if ".resblocks.23." not in name}
    for words in ({"modelspec.encoder_layer": "2"}, {"ss_clip_skip": "1"}):
        text = opened(shapes, words=words).config.text
        assert text is not None and (text.layers, text.layer) == (23, "last")


def test_a_tuning_on_some_levels_is_told():
    checkpoint = opened(BARE["v1"], words={"modelspec.timestep_range": "500,999"})
    assert any("500 to 999 alone" in notice for notice in checkpoint.notices)
    (remark,) = opened(BARE["v1"], words={"modelspec.timestep_range": "0,500"}).remarks
    assert "0 to 500 alone" in remark
    assert not opened(BARE["v1"], words={"modelspec.timestep_range": "0,1000"}).remarks


# ---------------------------------------------------------------- against each other


@pytest.mark.parametrize(
    ("more", "words", "named"),
    [
        (
            ["v_pred"],
            {"modelspec.prediction_type": "epsilon"},
            ["the tensor v_pred", "prediction_type=epsilon"],
        ),
        ([], {"modelspec.predict_key": "v", "ss_v_parameterization": "False"}, ["predict_key=v", "ization=False"]),
        (["ztsnr"], {"ss_zero_terminal_snr": "False"}, ["the tensor ztsnr", "ss_zero_terminal_snr=False"]),
        ([], {"modelspec.prediction_type": "flow"}, ["the table alphas_cumprod", "modelspec.prediction_type=flow"]),
        ([], {"modelspec.encoder_layer": "1", "ss_clip_skip": "2"}, ["encoder_layer=1", "ss_clip_skip=2"]),
    ],
)
def test_two_that_disagree_are_both_named(more: list[str], words: Mapping[str, str], named: list[str]):
    shapes = LISTS["v1"] | {name: [0] for name in more}
    with pytest.raises(UserError, match="contradicts itself") as error:
        opened(shapes, words=words)
    sentence = str(error.value)
    assert all(name in sentence for name in named)
    key = sentence.rpartition("--set ")[2].partition("=")[0]
    assert opened(shapes, words=words, decided=(key,)).config.unet is not None  # what the user says goes before all


# ---------------------------------------------------------------- tables that were cast


CASTS: list[tuple[torch.dtype, ...]] = [
    (torch.bfloat16,),
    (torch.float16,),
    (torch.float8_e4m3fn,),
    (torch.float8_e5m2,),
    (torch.float16, torch.float8_e4m3fn),
    (torch.bfloat16, torch.float32),
    (torch.float8_e4m3fn, torch.float16),
]


def cast(tables: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...]) -> dict[str, Tensor]:
    found = dict(tables)
    for dtype in dtypes:
        found = {name: value.float().to(dtype) for name, value in found.items()}
    return found


@pytest.mark.parametrize("dtypes", CASTS, ids=str)
@pytest.mark.parametrize("config", [ScheduleConfig(), ZERO, ScheduleConfig("linear", 1000, 1e-4, 0.02)])
def test_a_table_that_was_cast(dtypes: tuple[torch.dtype, ...], config: ScheduleConfig):
    tables = cast(original.tables(config), dtypes)
    assert opened(LISTS["v1"], tensors=tables).config.schedule == config


def test_a_table_of_another_law_is_no_roundings():
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        table = torch.linspace(0.999, 0.005, 1000).to(dtype)
        with pytest.raises(UserError, match=r"noise schedule that is not read here.*--set schedule\.kind"):
            opened(LISTS["v1"], tensors={"alphas_cumprod": table, "betas": table})
        named = opened(LISTS["v1"], tensors={"alphas_cumprod": table}, decided=("schedule.kind",))
        assert named.config.schedule == ScheduleConfig()


def test_a_table_longer_than_any_is_not_compared():
    assert original.schedule_of(torch.zeros(1).expand(10**12)) is None
    likely = [ScheduleConfig(steps=10**15)]  # no room is made for what a file says of itself beside its table
    assert original.schedule_of(torch.linspace(0.9, 0.1, 100), None, likely) is None


def test_what_is_set_of_a_schedule_leaves_the_rest_as_the_table_has_it():
    linear = ScheduleConfig("linear", 1000, 1e-4, 0.02)
    checkpoint = opened(LISTS["v1"], tensors=original.tables(linear), decided=("schedule.zero_terminal_snr",))
    rescaled = checkpoint.with_settings({"schedule.zero_terminal_snr": True})
    assert rescaled.config.schedule == replace(linear, zero_terminal_snr=True)
    named = opened(LISTS["v1"], tensors=original.tables(linear), decided=("schedule.kind",))
    assert named.config.schedule == linear
    with pytest.raises(
        UserError, match=r"schedule\.sigma_max is 5, and schedule\.kind=linear has no use for it, but ve"
    ):
        named.with_settings({"schedule.sigma_max": 5.0})
    flow = named.with_settings({"schedule.kind": "flow"}).config.schedule
    assert flow == replace(linear, kind="flow"), "what the table said may stand there"


def test_a_scale_that_was_cast():
    shapes = {name: s for name, s in LISTS["v1"].items() if name.startswith("first_stage_model.")} | {
        "scale_factor": []
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        for scale, read in ((0.18215, 0.18215), (0.5, 0.5)):
            config = opened(shapes, tensors={"scale_factor": torch.tensor(scale).to(dtype)}).config.autoencoder
            assert config is not None and config.scale == (read,)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    export.write(path, SMALL, random_states(SMALL), "original")
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("write", [save_file, torch.save])
def test_a_file_that_was_cast_whole_draws(file: Path, tmp_path: Path, dtype: torch.dtype, write: Callable):
    """Weights, tables and all, as tools that cast "all tensors" do."""
    stored = {name: value.float().to(dtype) for name, value in load_file(file).items()}
    write(stored, tmp_path / "cast.ckpt")
    checkpoint = open_checkpoint(tmp_path / "cast.ckpt", settings={"image_size": 16})
    assert checkpoint.config == SMALL
    with pytest.warns(UserWarning, match="text.quick_gelu"):
        model = ldm.load(tmp_path / "cast.ckpt", device="cpu", settings={"image_size": 16})
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(model.unet.conv_out.weight, stored[name].float())
    assert model.txt2img("a red heart", steps=1).isfinite().all()


# ---------------------------------------------------------------- files that we wrote


def write(path: Path, config: ModelConfig) -> Path:
    export.write(path, config, random_states(config), "original")
    return path


def test_what_we_write_says_its_law_in_the_common_words(tmp_path: Path):
    """With our own config taken out, as another's merge leaves it, the law is still there."""
    assert SMALL.text is not None and SMALL.unet is not None
    v1 = replace(SMALL.unet, linear_projection=False, heads=8, head_width=0)
    tower = replace(SMALL.text, embed_dim=0, quick_gelu=True, padding="eot", cleaning="plain")
    for config in (
        replace(SMALL, parameterization="eps"),
        replace(SMALL, unet=v1, text=tower),
        replace(SMALL, schedule=ZERO),
    ):
        path = write(tmp_path / "a.safetensors", config)
        assert open_checkpoint(path).config == config and open_checkpoint(path).notices == ()
        words = {key: word for key, word in read_metadata(path).items() if key != original.CONFIG}
        save_file(load_file(path), tmp_path / "bare.safetensors", words)
        again = open_checkpoint(tmp_path / "bare.safetensors").config
        assert law(again) == law(config)
        assert again.text is not None and config.text is not None and again.text.layer == config.text.layer


def test_our_own_config_is_compared_with_what_was_put_beside_it(tmp_path: Path):
    path = write(tmp_path / "a.safetensors", replace(SMALL, parameterization="eps"))
    words = read_metadata(path)
    save_file(load_file(path) | {"v_pred": torch.empty(0)}, path, words)
    with pytest.raises(UserError, match=r"the tensor v_pred.*our config in its metadata|modelspec"):
        open_checkpoint(path)
    assert open_checkpoint(path, settings={"parameterization": "v"}).config.parameterization == "v"
    save_file(load_file(path) | cast(original.tables(ZERO), ()), path, words)
    with pytest.raises(UserError, match=r"our config in its metadata.*the table alphas_cumprod"):
        open_checkpoint(path, settings={"parameterization": "v"})
