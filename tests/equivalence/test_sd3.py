"""Stable Diffusion 3 of random weights at reduced width against StableDiffusion3Pipeline: files both ways, towers,
and a guided trajectory, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldm
from ldm.checkpoints import export, native
from ldm.checkpoints.opening import open_checkpoint
from ldm.jobs import Settings
from ldm.sampling import NoiseStream

from . import stable_diffusion as sd

PROMPTS = ["a red heart", "two cats & a DOG, 4k!!"]
SMALL = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}


def pipeline(qk_norm: str | None = None) -> Any:
    diffusers = sd.peers()
    import transformers

    torch.manual_seed(0)
    towers = []
    for width, act in ((64, "quick_gelu"), (128, "gelu")):
        config = transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=width // 64,
            projection_dim=width,
            hidden_act=act,
            eos_token_id=49407,
            bos_token_id=49406,
            pad_token_id=1,
        )
        towers.append(transformers.CLIPTextModelWithProjection(config))
    with torch.no_grad():
        towers[0].text_projection.weight.copy_(torch.eye(64))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=256,
        pooled_projection_dim=192,
        pos_embed_max_size=12,
        qk_norm=qk_norm,
        dual_attention_layers=(0,) if qk_norm else (),
        **SMALL,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = diffusers.AutoencoderKL(
        **sd.SMALL_VAE,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=towers[0],
        tokenizer=sd.tokenizer(1),
        text_encoder_2=towers[1],
        tokenizer_2=sd.tokenizer(2),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=[None, "rms_norm"], ids=["3", "3.5"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    pipe = pipeline(request.param)
    folder = tmp_path_factory.mktemp("sd3") / "pipe"
    pipe.save_pretrained(folder)
    yield pipe, folder


def double(model: ldm.LatentDiffusion) -> ldm.LatentDiffusion:
    for part in (model.unet, *model.towers.values(), model.codec.autoencoder):
        assert part is not None
        part.double()
    return model


def conditions(pipe: Any, prompts: list[str], tokens: int = 77) -> tuple[Tensor, Tensor]:
    """Their context and pooled text; the zeros for T5 as the reference has them, 77."""
    context, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    return context, pooled


def test_the_towers_say_the_same(small: tuple[Any, Path]) -> None:
    pipe, folder = small
    ours = double(ldm.load(folder, device="cpu", backend="torch"))
    pipe.text_encoder.double()
    pipe.text_encoder_2.double()
    with torch.no_grad():
        context, pooled = conditions(pipe, PROMPTS)
        told = ours.encoder.texts(PROMPTS)
    assert told.context is not None and told.pooled is not None
    assert told.context.shape == (2, 154, 256) and told.pooled.shape == (2, 192)
    torch.testing.assert_close(told.context, context.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(told.pooled, pooled.double(), rtol=0, atol=1e-6)


def test_a_guided_trajectory_is_the_same(small: tuple[Any, Path]) -> None:
    """20 steps of Euler on their grid at scale 5, and the picture; their transformer runs in float64 too."""
    pipe, folder = small
    pipe.to(torch.float64)
    ours = double(ldm.load(folder, device="cpu", backend="torch"))
    settings = Settings(cfg=5.0, steps=20, sampler="euler", spacing="uniform", width=48, height=32)
    noise = NoiseStream([3], (16, 16, 24)).initial()
    with torch.no_grad():
        *_, last = ours.sample(PROMPTS[1], seed=3, settings=settings)
        latent = pipe(
            PROMPTS[1],
            negative_prompt="",
            guidance_scale=5.0,
            num_inference_steps=20,
            latents=noise.double(),
            height=32,
            width=48,
            output_type="latent",
            max_sequence_length=77,
        ).images
    found = last.x / (1 + last.sigma_next)
    assert sd.relative(found, latent) < 1e-4
    theirs = pipe.vae.decode(latent / 1.5305 + 0.0609).sample.clamp(-1, 1)
    assert sd.relative(ours.decode(last), theirs) < 1e-4


@pytest.mark.parametrize("to", ["original", "diffusers"])
def test_what_is_written_in_foreign_layouts_is_the_same_model(small: tuple[Any, Path], tmp_path: Path, to: str) -> None:
    _, folder = small
    found = open_checkpoint(folder)
    states = {name: dict(found.state(name)) for name in native.part_names(found.config)}
    config = found.config
    if to == "diffusers":  # a file says no size
        config = replace(config, image_size=512, unet=replace(config.unet, side=12))  # type: ignore[type-var]
    path = tmp_path / ("model.safetensors" if to == "original" else "model")
    if to == "original" and not config.unet.qk_norm:  # type: ignore[union-attr]
        with pytest.raises(ldm.UserError, match="which are not 64 wide"):
            export.write(path, config, states, to)
        return
    export.write(path, config, states, to)
    again = open_checkpoint(path)
    assert again.config == config and not again.foreign
    for name, state in states.items():
        other = again.state(name)
        assert set(other) == set(state)
        for key, value in state.items():
            assert torch.equal(other[key], value), key


def test_diffusers_opens_what_is_written_and_its_parts_are_equal(small: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, folder = small
    found = open_checkpoint(folder)
    assert found.config.schedule is not None and found.config.schedule.shift == 3.0
    config = replace(found.config, schedule=replace(found.config.schedule, shift=2.5))
    states = {name: dict(found.state(name)) for name in native.part_names(found.config)}
    export.write(tmp_path / "model", config, states, "diffusers")
    assert open_checkpoint(tmp_path / "model").config == config
    diffusers = sd.peers()
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "model", text_encoder_3=None, tokenizer_3=None
    )
    assert again.scheduler.config.shift == 2.5
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        mine, other = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert set(mine) == set(other), name
        for key, value in mine.items():
            torch.testing.assert_close(value.float(), other[key].float(), rtol=0, atol=0)
    for end in ("", "_2"):
        texts = [getattr(one, f"tokenizer{end}")(PROMPTS, padding="max_length", max_length=77) for one in (pipe, again)]
        assert texts[0]["input_ids"] == texts[1]["input_ids"]


def test_a_file_without_towers_takes_those_beside_it(small: tuple[Any, Path], tmp_path: Path) -> None:
    """As published: clip_l without its projection, clip_g with, in the folder text_encoders."""
    _, folder = small
    found = open_checkpoint(folder)
    if not found.config.unet.qk_norm:  # type: ignore[union-attr]
        pytest.skip("heads that are not 64 wide are told by qk-norm alone")
    states = {name: dict(found.state(name)) for name in native.part_names(found.config)}
    export.write(tmp_path / "whole.safetensors", found.config, states, "original")
    tensors = load_file(tmp_path / "whole.safetensors")
    bare = {name: value for name, value in tensors.items() if not name.startswith("text_encoders.")}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ldm.UserError, match=r"no text tower.*; put clip_l.safetensors and clip_g"):
        ldm.load(tmp_path / "bare.safetensors", device="cpu")
    (tmp_path / "text_encoders").mkdir()
    for name in ("clip_l", "clip_g"):
        prefix = f"text_encoders.{name}.transformer."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if name == "clip_l":
            del own["text_projection.weight"]
        save_file(own, tmp_path / "text_encoders" / f"{name}.safetensors")
        if name == "clip_l":
            with pytest.raises(ldm.UserError, match=r"64 wide and .* 192; .*the text tower that is missing"):
                ldm.load(tmp_path / "bare.safetensors", device="cpu")
    again = open_checkpoint(tmp_path / "bare.safetensors")
    for name, state in states.items():
        for key, value in again.state(name).items():
            assert torch.equal(value, state[key]), key
    assert again.config.text is not None and again.config.text.final_norm is False
    assert again.config.encoder == found.config.encoder and again.config.schedule == found.config.schedule
    assert any("clip_g" in notice for notice in again.notices)
    assert any("without T5: zeros stand in its place" in notice for notice in again.notices)
    one, other = (tmp_path / "text_encoders" / f"clip_{end}.safetensors" for end in "lg")
    one.rename(tmp_path / "was_l")
    other.rename(one)
    (tmp_path / "was_l").rename(other)
    with pytest.raises(ldm.UserError, match=r"clip_l is \d+ wide and clip_g \d+, so each has the other's name"):
        open_checkpoint(tmp_path / "bare.safetensors")
