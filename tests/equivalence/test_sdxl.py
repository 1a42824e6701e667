"""Stable Diffusion XL: what diffusers saves, loaded here, computes the same, and so does what is exported here."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm
from ldm import generate
from ldm.checkpoints import export
from ldm.checkpoints.opening import open_checkpoint
from ldm.conditioning.encoder import Encoder
from ldm.helpers import NONE, open_helpers
from ldm.jobs import Ask, Request, Settings
from ldm.sampling import NoiseStream, finish

from . import sdxl
from . import stable_diffusion as sd
from .stable_diffusion import relative

PROMPTS = ["a red heart", "", "two cats & a DOG, 4k!!"]
SIZE, CROP, TARGET = (40, 48), (3, 5), (24, 32)
KINDS = {"base": sdxl.base, "refiner": sdxl.refiner}


@pytest.fixture(scope="module", params=KINDS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline and the directory that it wrote."""
    pipe = KINDS[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, sd.save(pipe, tmp_path_factory.mktemp("peer") / request.param)


def told_there(pipe: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and vector of the peer's own functions."""
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
        kind = {"dtype": context.dtype, "text_encoder_projection_dim": 96}
        if pipe.text_encoder is None:
            sizes, _ = pipe._get_add_time_ids(SIZE, CROP, TARGET, 6.0, 2.5, SIZE, CROP, TARGET, **kind)
        else:
            sizes = pipe._get_add_time_ids(SIZE, CROP, TARGET, **kind)
        waves = pipe.unet.add_time_proj(sizes.flatten()).reshape(1, -1).expand(len(texts), -1)
    return context, torch.cat([pooled, waves.to(pooled)], dim=-1)


def encoder_of(path: Path, dtype: torch.dtype) -> Encoder:
    checkpoint = open_checkpoint(path)
    return Encoder(checkpoint.load_towers(dtype=dtype), checkpoint.config.encoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_networks(small: tuple[Any, Path], dtype: torch.dtype) -> None:
    """Tokens and states of each tower, context, vector of pooled text and sizes, U-Net."""
    pipe, path = small
    pipe.to(dtype)
    encoder, texts = encoder_of(path, dtype), ["a red heart", "two cats & a DOG, 4k!!"]
    context, vector = told_there(pipe, texts)
    towers = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    for own, (tokenizer, tower) in zip(encoder.named_towers.values(), [t for t in towers if t[1]], strict=True):
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(own.tokenize(texts)[0], tokens)
        with torch.no_grad():
            hidden = tower(tokens, output_hidden_states=True).hidden_states
            assert relative(own(tokens), hidden[-2]) <= 1e-5
    with torch.no_grad():
        told = encoder([Ask(text, size=SIZE, crop=CROP, target=TARGET, score=6.0) for text in texts])
        assert told.context is not None and told.vector is not None
        x, t = torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor([7.0, 900])
        last = [6.0] if encoder.config.score else TARGET
        added = {
            "text_embeds": vector[:, :96],
            "time_ids": torch.tensor([[*SIZE, *CROP, *last]] * 2),
        }
        theirs = pipe.unet(x, t, context, added_cond_kwargs=added).sample
        ours = open_checkpoint(path).load("unet", dtype=dtype)(x, t, told)
    errors = {
        "context": relative(told.context, context),
        "vector": relative(told.vector, vector),
        "unet": relative(ours, theirs),
    }
    pipe.to(torch.float32)
    print(errors)
    assert max(errors.values()) <= (1e-5 if dtype == torch.float32 else 1e-6), errors  # sizes are float32 on both sides


HOW = {"num_inference_steps": 20, "guidance_scale": 5.0, "output_type": "latent"}
TOLD = {"original_size": SIZE, "crops_coords_top_left": CROP, "target_size": TARGET}
OURS = Settings(
    cfg=5.0,
    steps=20,
    sampler="ddim",
    spacing="leading",
    width=32,
    height=32,
    original_size=SIZE,
    crop=CROP,
    target_size=TARGET,
)


def drawn(pipe: Any, path: Path, negative: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Twenty guided steps: theirs, ours."""
    noise = NoiseStream([4], (4, 16, 16)).initial().float()
    theirs = pipe("a red heart", latents=noise, height=32, width=32, negative_prompt=negative, **HOW, **TOLD).images
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # everything is in the files: nothing to assume, nothing to say
        model = ldm.load(path, device="cpu")
    *_, last = model.sample("a red heart", negative=negative or "", seed=4, settings=OURS)
    return theirs, finish(last.x, model.law.schedule, torch.tensor([last.sigma_next]))


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_a_guided_trajectory(negative: str | None, tmp_path: Path) -> None:
    """Without a negative prompt the base is guided away from zeros, and with one from what it says."""
    pipe = sdxl.base()
    pipe.set_progress_bar_config(disable=True)
    theirs, ours = drawn(pipe, sd.save(pipe, tmp_path / "base"), negative)
    assert theirs.std() > 0.1
    assert relative(ours, theirs) <= 1e-4


LATENT = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.5, 0.7, 0.9, 1.1], "scaling_factor": 0.5}


@pytest.mark.parametrize(
    ("form", "deviation", "high"),
    [("v_prediction", 1.0, 120.0), pytest.param("epsilon", 0.5, 80.0, marks=pytest.mark.slow)],
)
def test_a_guided_trajectory_of_edms_law(form: str, deviation: float, high: float, tmp_path: Path) -> None:
    """As CosXL and Playground 2.5 are drawn, and what is written of them again: another layout, the same picture."""
    pipe = sdxl.base()
    law = {"sigma_max": high, "sigma_data": deviation, "prediction_type": form}
    pipe.scheduler = sd.peers().EDMEulerScheduler(sigma_schedule="exponential", **law)
    pipe.vae.register_to_config(**(LATENT if deviation != 1 else {}))
    pipe.set_progress_bar_config(disable=True)
    path = sd.save(pipe, tmp_path / "base")
    noise = NoiseStream([4], (4, 16, 16)).initial().float()
    words = {"latents": noise, "height": 32, "width": 32, "negative_prompt": "blurry"}
    theirs = pipe("a red heart", **words, **HOW, **TOLD).images
    settings = dataclasses.replace(OURS, sampler="euler", spacing="exponential")
    model = ldm.load(path, device="cpu")
    *_, last = model.sample("a red heart", negative="blurry", seed=4, settings=settings)
    assert relative(finish(last.x, model.law.schedule, torch.tensor([last.sigma_next])), theirs) <= 1e-4
    scale, shift = (torch.tensor(LATENT[f"latents_{name}"]).reshape(1, 4, 1, 1) for name in ("std", "mean"))
    unscaled = theirs / 0.13025 if deviation == 1 else theirs * scale / 0.5 + shift
    with torch.no_grad():
        assert relative(model.decode(last), pipe.vae.decode(unscaled).sample.clamp(-1, 1)) <= 1e-4
    found = open_checkpoint(path)
    states = {name: found.state(name) for name in found.parts}
    if deviation != 1:
        with pytest.raises(ldm.UserError, match="no place for parameterization=edm with"):
            export.write(tmp_path / "one.safetensors", found.config, states, "original")
    for to in ("diffusers", "original") if deviation == 1 else ("diffusers",):
        out = tmp_path / ("again" if to == "diffusers" else "one.safetensors")
        export.write(out, found.config, states, to)
        again = open_checkpoint(out)
        law = ("schedule", "parameterization", "sigma_data", "encoder")
        assert all(getattr(again.config, name) == getattr(found.config, name) for name in law)
        unet = again.state("unet")
        assert all(torch.equal(unet[key], value) for key, value in states["unet"].items())
        with torch.no_grad():  # a latent's shift and scale of each channel are folded into the weights
            assert relative(again.load("autoencoder").decode(theirs), model.decode(last)) <= 1e-4
    assert type(sd.peers().DiffusionPipeline.from_pretrained(tmp_path / "again").scheduler).__name__.startswith("EDM")


def test_the_refiner_takes_over_as_there(tmp_path: Path) -> None:
    """The base down to a fifth of the levels, the refiner from there: no noise is added in between, on either side.

    In float64 at scale 7.5. There the negative prompt is told the crop apart, (0, 0) unless asked; here as the prompt.
    """
    base, refiner = sdxl.base(), sdxl.refiner()
    paths = [sd.save(pipe, tmp_path / name) for pipe, name in ((base, "base"), (refiner, "refiner"))]
    noise = NoiseStream([4], (4, 16, 16)).initial().double()
    words = {"prompt": "a red heart", "negative_prompt": "blurry", **HOW, **TOLD, "guidance_scale": 7.5}
    base.to(torch.float64)
    refiner.to(torch.float64)
    handed = base(latents=noise, height=32, width=32, denoising_end=0.8, **words).images
    theirs = refiner(image=handed, denoising_start=0.8, **words, negative_crops_coords_top_left=CROP).images
    model = ldm.load(paths[0], device="cpu", backend="torch")
    plan = dataclasses.replace(OURS, cfg=7.5, refiner=str(paths[1])).plan()
    helpers = open_helpers(model, plan)
    for each in (model, *helpers.refiners.values()):
        for network in (each.unet, *each.towers.values()):
            network.double()
    *_, last = generate.sample(model, [Request("a red heart", "blurry", 4)], plan, helpers)
    ours = finish(last.x, model.law.schedule, torch.tensor([last.sigma_next]))
    assert relative(theirs, handed) > 0.01
    assert relative(ours, theirs) <= 1e-6
    plan = dataclasses.replace(OURS, original_size=None, crop=None).plan()
    with pytest.raises(ldm.UserError, match="told a score in the place of target_size"):  # by itself
        generate.check_told(helpers.refiners[str(paths[1])], plan, NONE)


def test_our_exports_are_the_same_networks(small: tuple[Any, Path], tmp_path: Path) -> None:
    """diffusers -> ours -> original file -> diffusers: bit for bit the same weights, and the pipeline's settings."""
    pipe, path = small
    checkpoint = open_checkpoint(path)
    states = {name: checkpoint.state(name) for name in checkpoint.parts}
    export.write(tmp_path / "one.safetensors", checkpoint.config, states, "original")
    single = open_checkpoint(tmp_path / "one.safetensors")
    assert single.config == checkpoint.config
    export.write(tmp_path / "again", single.config, {name: single.state(name) for name in single.parts}, "diffusers")
    again = type(pipe).from_pretrained(tmp_path / "again")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name) is None:
            assert getattr(again, name) is None
            continue
        before, after = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
    for name in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        assert again.config.get(name) == pipe.config.get(name)
    assert again.tokenizer_2(PROMPTS).input_ids == pipe.tokenizer_2(PROMPTS).input_ids
    config = dict(again.unet.config)
    assert {k: config[k] for k in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")} == {
        k: pipe.unet.config[k] for k in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    }


def test_an_autoencoder_that_overflows_in_half_precision_gives_no_black_picture(tmp_path: Path) -> None:
    """As the published one does: in float16 an activation passes 65504, and the latent is decoded again in float32."""
    pipe = sdxl.base()
    with torch.no_grad():  # before the last norm, which takes the factor out again
        pipe.vae.decoder.up_blocks[-1].resnets[-1].conv2.weight.mul_(3e5)
    path, latent = sd.save(pipe, tmp_path / "base"), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    half, whole = (ldm.load(path, device="cpu", precision=precision) for precision in ("fp16", "fp32"))
    assert half.codec.autoencoder is not None and next(half.codec.autoencoder.parameters()).dtype == torch.float16
    z = half.codec.from_latent(latent)
    with torch.no_grad():
        assert not bool(half.codec.autoencoder.decode(z.half()).isfinite().all())
        ours, wanted = half.codec.decode(latent), whole.codec.decode(latent)
        theirs = pipe.vae.decode(z).sample.clamp(-1, 1)
    assert relative(wanted, theirs) <= 1e-4 and float(wanted.std()) > 0.05
    assert relative(ours, wanted) < 0.05  # weights rounded to float16


def test_a_file_without_our_word_is_told_by_its_shapes(small: tuple[Any, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(small[1])
    states = {name: checkpoint.state(name) for name in checkpoint.parts}
    export.write(tmp_path / "one.safetensors", checkpoint.config, states, "original")
    save_file(load_file(tmp_path / "one.safetensors"), tmp_path / "bare.safetensors")
    bare = open_checkpoint(tmp_path / "bare.safetensors")
    assert bare.config.encoder == checkpoint.config.encoder
    assert bare.config.unet == checkpoint.config.unet
    assert bare.config.autoencoder == checkpoint.config.autoencoder
    assert (bare.config.parameterization, bare.config.image_size) == ("eps", 1024)
    for name, tower in bare.config.towers.items():
        assert (tower.layer, tower.final_norm) == ("penultimate", False), name
