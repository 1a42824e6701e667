"""The scheduler of a diffusers directory: the law that its class and fields name is read, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints import edm, export
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import ModelConfig, ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError

from .small_models import SMALL, random_states

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = ScheduleConfig("flow")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusers") / "model"
    export.write(path, SMALL, random_states(SMALL), "diffusers")
    return path


Read = Callable[..., ModelConfig]


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The directory with settings of its own; the weights are the same files."""
    return Path(shutil.copytree(written, tmp_path / "model", copy_function=lambda a, b: Path(b).hardlink_to(a)))


@pytest.fixture
def read(folder: Path) -> Read:
    def write(path: Path, plain: dict[str, Any]) -> None:
        path.unlink()
        path.write_text(json.dumps(plain))

    def read(kind: str, index: str = "", decided: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
        name = f"{kind}Scheduler"
        plain = json.loads((folder / "model_index.json").read_text())
        write(folder / "model_index.json", plain | {"scheduler": ["diffusers", index or name]})
        write(folder / "scheduler" / "scheduler_config.json", {"_class_name": name} | fields)
        return open_checkpoint(folder, settings=decided).config

    return read


def law(config: ModelConfig) -> tuple[str, ScheduleConfig | None]:
    return config.parameterization, config.schedule


@pytest.mark.parametrize("kind", ["PNDM", "EulerDiscrete", "UniPCMultistep", "LCM", "FlaxDDIM"])
def test_chains(read: Read, kind: str):
    """What a pipeline draws with (its spacing, Karras' levels, thresholds) is no part of the law."""
    drawn = {"use_karras_sigmas": True, "timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": True}
    assert law(read(kind, **SD, **drawn)) == ("eps", ScheduleConfig())
    config = read(kind, **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert law(config) == ("v", ScheduleConfig(zero_terminal_snr=True))
    assert law(read(kind, **SD, prediction_type="sample")) == ("x0", ScheduleConfig())


def test_what_is_not_set_is_the_classs_own(read: Read):
    """Checked against diffusers in tests/equivalence."""
    assert read("DDIM").schedule == ScheduleConfig("linear", 1000, 1e-4, 0.02)
    assert read("HeunDiscrete").schedule == ScheduleConfig("linear", 1000, 0.00085, 0.012)
    assert read("LCM").schedule == ScheduleConfig()


@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(zero_terminal_snr=True)])
def test_betas_given_one_by_one(read: Read, config: ScheduleConfig):
    bar = make_schedule(config).alphas_cumprod
    betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    found = read("DDIM", beta_schedule="linear", trained_betas=betas.tolist(), prediction_type="v_prediction")
    assert law(found) == ("v", config)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("FlowMatchEulerDiscrete", {"shift": 3.0, "use_dynamic_shifting": False}),
        ("FlowMatchHeunDiscrete", {"num_train_timesteps": 1000}),
        ("FlowMatchEulerDiscrete", {"prediction_type": "epsilon", **SD}),  # taken over from another scheduler
        ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    ],
)
def test_flows(read: Read, folder: Path, kind: str, fields: dict[str, Any]):
    shift = 3.0 if 3.0 in fields.values() else 1.0
    assert law(read(kind, **fields)) == ("flow", replace(FLOW, shift=shift))
    assert open_checkpoint(folder).notices == ()


@pytest.mark.parametrize(
    ("kind", "fields", "wanted"),
    [
        ("EDMDPMSolverMultistep", {}, ("edm", ScheduleConfig("edm"), 0.5)),
        (
            "EDMEuler",
            {"sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"},
            ("v", ScheduleConfig("edm", sigma_max=120.0), 1.0),
        ),
        (
            "EulerDiscrete",
            SD
            | {
                "timestep_type": "continuous",
                "prediction_type": "v_prediction",
                "sigma_min": 0.002,
                "sigma_max": 700.0,
            },
            ("v", ScheduleConfig("edm", sigma_max=700.0), 1.0),
        ),
    ],
)
def test_edms_laws(read: Read, kind: str, fields: dict[str, Any], wanted: tuple[Any, ...]):
    config = read(kind, **fields)
    assert (*law(config), config.sigma_data) == wanted


def test_numbers_that_make_no_law_of_edm(read: Read):
    with pytest.raises(UserError, match=r"EDMEulerScheduler says sigmas from 80 to 0\.1.*no law"):
        read("EDMEuler", sigma_min=80.0, sigma_max=0.1)


def test_a_prediction_that_is_no_word(read: Read):
    with pytest.raises(UserError, match="of a kind not known here"):
        read("EDMEuler", prediction_type=["epsilon"])


@pytest.mark.parametrize("form", ["edm", "v"])
def test_a_law_of_edm_is_written_as_it_is_read(read: Read, form: str):
    """Also where data of another deviation than v's 1 were trained on: v does not depend on it."""
    config = replace(SMALL, parameterization=form, schedule=ScheduleConfig("edm", sigma_max=120.0), sigma_data=0.5)
    plain = edm.write_scheduler(config)
    again = read(plain.pop("_class_name").removesuffix("Scheduler"), **plain)
    assert (again.parameterization, again.sigma_data) == (form, 0.5 if form == "edm" else 1.0)
    assert again.schedule == config.schedule


def test_a_latents_mean_and_deviation_stand_beside_it(folder: Path, read: Read):
    place = folder / "vae" / "config.json"
    plain = json.loads(place.read_text()) | {"scaling_factor": 0.5, "latents_mean": [-1.5, 2, 0, 1.0]}

    def found(std: Any) -> Any:
        place.unlink()
        place.write_text(json.dumps(plain | {"latents_std": std}))
        return read("EDMEuler").autoencoder

    config = found([8.0, 4, 2, 1])
    assert (config.shift, config.scale) == ((-1.5, 2.0, 0.0, 1.0), (0.0625, 0.125, 0.25, 0.5))
    for wrong in ([8, 4, 2, 0], "8", [8, 4, 2, None], [8, 4, 2, 1e-320]):
        with pytest.raises(UserError, match=r"latents_std is .* a number for each channel"):
            found(wrong)
    plain["latents_mean"][0] = -(10**400)
    with pytest.raises(UserError, match=r"latents_mean is .* a number for each channel"):
        found([8, 4, 2, 1])


def test_a_shift_by_the_pictures_size_is_told(read: Read, folder: Path):
    read("FlowMatchEulerDiscrete", shift=3.0, use_dynamic_shifting=True)
    assert any("by the picture's size" in notice for notice in open_checkpoint(folder).notices)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("EDMEuler", {"sigma_min": 0.002, "sigma_max": 80.0, "prediction_type": "v_prediction"}, "EDMEulerScheduler"),
        ("EDMDPMSolverMultistep", {"prediction_type": "sample"}, "EDMDPMSolverMultistepScheduler"),
        ("KarrasVe", {}, "KarrasVeScheduler"),
        ("CogVideoXDDIM", SD, "CogVideoXDDIMScheduler"),
        ("SomethingNew", SD, "SomethingNewScheduler"),
        ("EulerDiscrete", SD | {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type"),
        ("DDPM", SD | {"variance_type": "learned_range"}, "variance_type learned_range"),
        ("DDIM", SD | {"trained_betas": [0.1, 0.2, 0.05]}, "trained_betas"),
        ("DDIM", SD | {"beta_schedule": "sigmoid"}, "beta_schedule sigmoid"),
        ("DDIM", SD | {"prediction_type": "flow_prediction"}, "prediction_type flow_prediction"),
        ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "epsilon"}, "prediction_type epsilon"),
        ("FlowMatchEulerDiscrete", {"prediction_type": "v_prediction"}, "prediction_type v_prediction"),
        ("FlowMatchEulerDiscrete", {"num_train_timesteps": 500}, "num_train_timesteps 500"),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "invert_sigmas True"),
    ],
)
def test_other_laws_are_refused_by_name(read: Read, folder: Path, kind: str, fields: dict[str, Any], words: str):
    with pytest.raises(UserError, match=rf"not read.*{words}.*--set") as error:
        read(kind, **fields)
    asked = [word.partition("=")[0] for word in str(error.value).split("--set ")[1:]]
    usual = {"parameterization": "eps", "schedule.kind": "linear", "learned_variance": False}
    assert read(kind, decided={key: usual[key] for key in asked}, **fields).schedule is not None


def test_an_index_that_names_another_family_is_refused_with_both_named(read: Read):
    with pytest.raises(UserError, match=r"FlowMatchEulerDiscreteScheduler, model_index\.json a PNDMScheduler"):
        read("FlowMatchEulerDiscrete", index="PNDMScheduler")
    with pytest.raises(UserError, match=r"names a DDIMScheduler, model_index\.json a EDMEulerScheduler"):
        read("DDIM", index="EDMEulerScheduler")  # of no family that is known
    assert law(read("DDIM", index="PNDMScheduler", **SD)) == ("eps", ScheduleConfig())  # the same family


def test_a_marker_among_the_weights_is_compared(read: Read, folder: Path):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    marked = load_file(weights) | {"v_pred": torch.empty(0)}
    weights.unlink()
    save_file(marked, weights)
    read("DDIM", **SD, prediction_type="v_prediction")
    assert open_checkpoint(folder).state("unet")
    with pytest.raises(UserError, match=r"prediction_type epsilon.*the tensor v_pred"):
        read("DDIM", **SD)
