"""The original single file: published lists of tensors are covered exactly, both ways; what they do not say is told.

The lists (names and shapes of v1 with and without averages, v2, and both inpainting models) stand in a fixture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldm
from ldm.checkpoints import architectures, export, native, original, original_file
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_tensors
from ldm.checkpoints.state import Shape
from ldm.conditioning.clip import TextTower
from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, to_dict
from ldm.errors import UserError
from ldm.model import CheckpointNotice

from .listed import LISTS, SCHEDULE, opened
from .small_models import SMALL, random_states, same

# ---------------------------------------------------------------- the published lists

LIST_OF = {
    "Stable Diffusion v1": "v1",
    "Stable Diffusion v1 inpainting": "v1_inpainting",
    "Stable Diffusion v2": "v2",
    "Stable Diffusion v2 inpainting": "v2_inpainting",
    "Stable Diffusion XL": "xl",
    "Stable Diffusion XL refiner": "xl_refiner",
}


@pytest.mark.parametrize("name", LIST_OF)
def test_a_published_model_is_recognised_and_covered_exactly(name: str):
    shapes = LISTS[LIST_OF[name]]
    checkpoint = opened(shapes)
    assert checkpoint.config == architectures.KNOWN[name]
    assert architectures.name_of(checkpoint.config) == name
    assert checkpoint.foreign == ()
    read: dict[str, Shape] = {}
    for part in checkpoint.parts.values():
        state = checkpoint.state(next(n for n, p in checkpoint.parts.items() if p is part))
        read |= state.theirs()
    rest = set(shapes) - set(read)
    assert all(original.unused(key) for key in rest)
    assert {key.rpartition(".")[2] for key in rest} <= {*SCHEDULE, "position_ids", "logit_scale"}
    assert all(tuple(shapes[key]) == shape for key, shape in read.items())


@pytest.mark.parametrize("name", LIST_OF)
def test_what_is_written_of_a_known_architecture_is_the_published_list(name: str, monkeypatch: pytest.MonkeyPatch):
    written: dict[str, list[int]] = {}

    def keep(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        written.update({key: list(value.shape) for key, value in tensors.items()})

    monkeypatch.setattr(original_file, "write_tensors", keep)
    config = architectures.KNOWN[name]
    from ldm.checkpoints.networks import skeleton

    states = {part: skeleton(part, config, "").state_dict() for part in native.part_names(config)}
    original_file.write_original(Path("/tmp/never-written.safetensors"), config, states)
    published = dict(LISTS[LIST_OF[name]])
    for key in [key for key in published if key.endswith(".logit_scale")]:
        del published[key]  # of the contrastive training; no tower of ours has it
    assert written == published


def test_the_text_tower_of_v1_in_open_clips_names():
    """Against a table of the renaming made by others: one to one, but for q, k and v, which open_clip keeps in one."""
    table: Any = LISTS["v1_text_to_open_clip"]
    wanted = {ours: (theirs,) for theirs, ours in table["rename"].items()}
    wanted |= {ours: tuple(theirs) for ours, theirs in table["concat_dim0"].items()}
    with torch.device("meta"):
        keys = TextTower(architectures.CLIP_L).state_dict()
    assert original.text_names(keys, "cond_stage_model.transformer.text_model.") == wanted
    assert all(original.unused(name) for name in table["dropped"])


def test_averages_have_every_raw_weight_under_a_name_without_dots():
    shapes = LISTS["v1_ema"]
    averaged = opened(shapes)
    assert averaged.two_sets and any("averaged ones (EMA) are used" in notice for notice in averaged.notices)
    raw = opened(shapes, "raw")
    assert averaged.config == raw.config == architectures.SD_V1
    ema, plain = averaged.state("unet").theirs(), raw.state("unet").theirs()
    assert len(set(ema)) == len(plain) == 686
    assert list(ema.values()) == list(plain.values())
    assert {key for key in shapes if key.startswith("model_ema.")} - set(ema) == {
        "model_ema.decay",
        "model_ema.num_updates",
    }


def test_no_averages_where_none_are():
    with pytest.raises(UserError, match="no averaged weights"):
        opened(LISTS["v1"], "ema")
    only_names = LISTS["v1"] | {"model_ema.decay": [], "model_ema.num_updates": []}
    assert not opened(only_names).two_sets


def test_the_depth_model_differs_from_v2_in_its_first_convolution():
    shapes = LISTS["v2"] | {"model.diffusion_model.input_blocks.0.0.weight": [320, 5, 3, 3]}
    shapes["depth_model.model.pretrained.model.cls_token"] = [1, 1, 1024]
    checkpoint = opened(shapes)
    assert architectures.name_of(checkpoint.config) == "Stable Diffusion v2 depth"
    assert checkpoint.config == architectures.SD_V2_DEPTH
    assert checkpoint.foreign == ()


@pytest.mark.parametrize(("number", "missing"), [(0, "first"), (1, "second")])
def test_a_tower_that_is_missing_of_two_is_said(number: int, missing: str):
    gone = f"conditioner.embedders.{number}"
    shapes = {name: shape for name, shape in LISTS["xl"].items() if not name.startswith(gone)}
    with pytest.raises(UserError, match=f"reads 2048 numbers a token: the {missing} of .* two is missing"):
        opened(shapes)


# ---------------------------------------------------------------- what the tensors do not tell


def test_what_was_assumed_is_said_and_can_be_set():
    checkpoint = opened(LISTS["v2"])
    (notice,) = checkpoint.notices
    assert "parameterization=v" in notice and "text.padding=zero" in notice and "text.quick_gelu=false" in notice
    base = checkpoint.with_settings({"parameterization": "eps", "image_size": 512})
    assert base.config == architectures.SD_V2_BASE
    assert "parameterization" not in base.notices[0]
    with pytest.raises(UserError, match="unknown setting"):
        checkpoint.with_settings({"parametrization": "v"})
    with pytest.raises(UserError, match="no vae"):
        checkpoint.with_settings({"vae.scale": 1})


def test_words_in_the_file_go_before_the_rules():
    words = {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "512x512"}
    checkpoint = opened(LISTS["v2"], words=words)
    assert checkpoint.config == architectures.SD_V2_BASE
    assert not {"parameterization", "image_size"} & set(checkpoint.assumed)


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(),
        ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02),
        ScheduleConfig("scaled_linear", steps=500, beta_start=0.0015, beta_end=0.0195),
        ScheduleConfig("cosine"),
        ScheduleConfig(zero_terminal_snr=True),
    ],
    ids=lambda config: f"{config.kind}-{config.steps}-{config.zero_terminal_snr}",
)
def test_the_schedule_is_read_from_its_table(config: ScheduleConfig):
    table, betas = (original.tables(config)[name] for name in ("alphas_cumprod", "betas"))
    read = [original.schedule_of(table, betas), original.schedule_of(table.half(), betas.half())]
    wanted = original.make_schedule(config).alphas_cumprod
    for found in read:
        assert found is not None and (found.kind, found.steps) == (config.kind, config.steps)
        assert torch.allclose(original.make_schedule(found).alphas_cumprod, wanted, rtol=2e-3, atol=2e-5)
    assert read[0] is not None and read[0].zero_terminal_snr == config.zero_terminal_snr
    assert original.schedule_of(torch.linspace(0.9, 0.1, 100)) is None


def test_the_tables_are_those_of_the_chain():
    """Each against its definition by a product over the betas, in float64."""
    tables = {name: value.double() for name, value in SCHEDULE.items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    wanted = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "log_one_minus_alphas_cumprod": torch.log(1 - bar),
        "sqrt_recipm1_alphas_cumprod": ((1 - bar) / bar).sqrt(),
        "posterior_variance": betas * (1 - before) / (1 - bar),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - betas).sqrt() * (1 - before) / (1 - bar),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(tables[name], value, rtol=1e-6, atol=1e-12, msg=name)


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return random_states(SMALL)


@pytest.fixture(scope="module")
def file(states: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    assert export.write(path, SMALL, states, "original") == []
    return path


def test_a_round_trip_is_bit_identical(file: Path, states: dict[str, dict[str, Tensor]], tmp_path: Path):
    checkpoint = open_checkpoint(file)
    assert checkpoint.config == SMALL and checkpoint.notices == ()
    assert all(same(checkpoint.state(name), states[name]) for name in states)
    export.write(tmp_path / "b.safetensors", SMALL, {n: checkpoint.state(n) for n in states}, "original")
    again, before = read_tensors(tmp_path / "b.safetensors"), read_tensors(file)
    assert same(again, before) and again.metadata == before.metadata


def test_a_config_that_does_not_go_with_its_tensors(file: Path, tmp_path: Path):
    for changes, words in (({"unet": None}, "has no U-Net"), ({"text": None}, "has no text tower")):
        document = json.dumps(to_dict(SMALL) | changes)
        save_file(load_file(file), tmp_path / "a.safetensors", {original.CONFIG: document})
        with pytest.raises(UserError, match=words):
            ldm.load(tmp_path / "a.safetensors", device="cpu")


def bare(file: Path, change: Callable[[dict[str, Tensor]], Any] | None = None) -> dict[str, Tensor]:
    """The tensors, as a stranger's file has them: without our config."""
    tensors = load_file(file)
    if change is not None:
        change(tensors)
    return tensors


def test_without_our_config_the_shapes_tell(file: Path, tmp_path: Path):
    save_file(bare(file), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.config.unet == SMALL.unet  # heads of 64, as v2 has them: not in the shapes
    assert checkpoint.config.autoencoder == SMALL.autoencoder
    assert checkpoint.config.text == SMALL.text and checkpoint.config.schedule == SMALL.schedule


def test_a_pickled_file_with_an_outer_state_dict_and_half_precision(file: Path, tmp_path: Path):
    tensors = {key: value.half() for key, value in bare(file).items() if not key.endswith("position_ids")}
    torch.save({"state_dict": tensors, "global_step": 470000, "epoch": 3}, tmp_path / "sd.ckpt")
    settings = {"image_size": 16}
    with pytest.warns(CheckpointNotice, match="parameterization=v"):
        model = ldm.load(tmp_path / "sd.ckpt", device="cpu", settings=settings)
    assert model.checkpoint is not None and model.checkpoint.facts["global_step"] == "470000"
    assert torch.equal(model.unet.conv_in.weight, tensors["model.diffusion_model.input_blocks.0.0.weight"].float())
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert model.txt2img("a red heart", steps=2).isfinite().all()


def test_averages_in_a_file(file: Path, tmp_path: Path, states: dict[str, dict[str, Tensor]]):
    tensors = bare(file)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
        for name, value in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(tensors | averaged | {"model_ema.decay": torch.tensor(0.9999)}, tmp_path / "a.safetensors")
    unet = states["unet"]
    raw, ema = (open_checkpoint(tmp_path / "a.safetensors", weights).state("unet") for weights in ("raw", "ema"))
    assert same(raw, unet) and same(ema, {key: value + 1 for key, value in unet.items()})


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


OUT = "model.diffusion_model.out.2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{OUT}.bias"), [r"1 missing \(" + re.escape(f"{OUT}.bias")]),
        (lambda t: t.update({f"{OUT}.scale": torch.ones(1)}), [r"1 unexpected \(" + re.escape(f"{OUT}.scale")]),
        (lambda t: t.update({f"{OUT}.bias": torch.ones(5)}), [r"1 misshapen .*\(5,\) and should be \(4,\)"]),
        (lambda t: t.update({f"{OUT}.bias": torch.ones(4).int()}), ["holds int32 and should hold floats"]),
        (drop("model.diffusion_model.middle_block.1.proj_in.weight"), ["not built as Stable Diffusion's"]),
        (lambda t: t.update(alphas_cumprod=torch.linspace(0.9, 0.1, 1000)), ["noise schedule that is not read"]),
    ],
)
def test_what_does_not_fit_is_told_by_name(file: Path, tmp_path: Path, change: Callable, words: list[str]):
    save_file(bare(file, change), tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path / "a.safetensors").state("unet")
    assert all(re.search(word, str(error.value)) for word in words), str(error.value)


def test_foreign_tensors_are_passed_over_and_told(file: Path, tmp_path: Path):
    save_file(bare(file) | {"embedding_manager.\x1b[2Ja": torch.ones(1)}, tmp_path / "a.safetensors")
    notices = open_checkpoint(tmp_path / "a.safetensors").notices
    assert any("1 tensors" in notice and "embedding_manager. [2Ja" in notice for notice in notices)


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("lora_unet_down.lora_up.weight", "LoRA"),
        ("something.else", "of a kind"),
    ],
)
def test_other_models_are_called_by_name(tmp_path: Path, name: str, whose: str):
    save_file({name: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=whose):
        open_checkpoint(tmp_path / "a.safetensors")


# ---------------------------------------------------------------- stand-alone autoencoders


def test_a_stand_alone_autoencoder_over_a_model(file: Path, tmp_path: Path, states: dict[str, dict[str, Tensor]]):
    prefix = "first_stage_model."
    tensors = {k.removeprefix(prefix): v * 2 for k, v in bare(file).items() if k.startswith(prefix)}
    torch.save({"state_dict": tensors | {"loss.logvar": torch.ones(1)}}, tmp_path / "vae.pt")
    other = open_checkpoint(tmp_path / "vae.pt")
    assert list(other.parts) == ["autoencoder"] and other.assumed == ("autoencoder.scale",)
    rescaled = open_checkpoint(file).with_settings({"autoencoder.scale": [0.5]})
    both = rescaled.with_autoencoder(other)
    assert both.config.autoencoder is not None and both.config.autoencoder.scale == (0.5,)  # the model's own
    assert same(both.state("autoencoder"), {key: value * 2 for key, value in states["autoencoder"].items()})
    assert same(both.state("unet"), states["unet"])
    model = ldm.load(file, device="cpu", vae=tmp_path / "vae.pt")
    assert model.hash != ldm.load(file, device="cpu").hash
    with pytest.raises(UserError, match="has no autoencoder"):
        native.save(tmp_path / "u", ModelConfig(unet=SMALL.unet), {"unet": states["unet"]})
        rescaled.with_autoencoder(open_checkpoint(tmp_path / "u"))


def test_an_autoencoder_of_other_latents_is_refused(file: Path, tmp_path: Path):
    from ldm.autoencoder.kl import AutoencoderKL

    config = AutoencoderConfig(channels=32, multipliers=(1, 1, 1), blocks=1)
    native.save(tmp_path / "vae", ModelConfig(config), {"autoencoder": AutoencoderKL(config)})
    with pytest.raises(UserError, match=r"4 channels at 1/4, the model takes 4 channels at 1/2"):
        open_checkpoint(file).with_autoencoder(open_checkpoint(tmp_path / "vae"))


# ---------------------------------------------------------------- models that take more than a prompt


@pytest.mark.parametrize("channels", [9, 5])
def test_inpainting_and_depth_models_draw(tmp_path: Path, channels: int):
    config = replace(SMALL, unet=replace(SMALL.unet, in_channels=channels), parameterization="eps")
    export.write(tmp_path / "a.safetensors", config, random_states(config), "original")
    model = ldm.load(tmp_path / "a.safetensors", device="cpu")
    x, t = torch.randn(1, channels, 8, 8), torch.tensor([500.0])
    assert model.unet(x, t, model.text.encode(["a cat"])).shape == (1, 4, 8, 8)
    depth = torch.arange(16.0).expand(1, 1, 16, 16) if channels == 5 else None
    drawn = model.img2img(torch.zeros(1, 3, 16, 16), "a cat", strength=1.0, steps=2, depth=depth)
    assert drawn.shape == (1, 3, 16, 16) and bool(drawn.isfinite().all())
