"""Latent consistency models: what diffusers saves computes and draws the same here, and back, with random weights."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.small_models import SMALL, SMALL_XL, random_states, same  # tests/ is the root of the tests' packages
from torch import Tensor

import ldm
from ldm.checkpoints import export, native
from ldm.checkpoints.architectures import LCM
from ldm.checkpoints.diffusers import unet_names
from ldm.checkpoints.diffusers_configs import read_unet
from ldm.checkpoints.foreign import FORMATS
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.scheduler_config import drawing_of
from ldm.conditioning.condition import Condition
from ldm.conditioning.encoder import _waves
from ldm.config import DrawingConfig, UNetConfig
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.model import CheckpointNotice
from ldm.sampling import NoiseStream
from ldm.unet import UNet

from . import stable_diffusion as sd
from .stable_diffusion import relative

WIDTH, PROMPT, SEED = 256, "a red heart", 4
TOLD = replace(
    SMALL,
    unet=replace(SMALL.unet, guidance_width=WIDTH),
    parameterization="eps",
    drawing=LCM,
    image_size=16,
)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline as that of LCM_Dreamshaper_v7, and its directory."""
    diffusers, parts = sd.peers(), sd.pipeline(1)
    torch.manual_seed(5)
    unet = diffusers.UNet2DConditionModel(
        attention_head_dim=4, cross_attention_dim=64, time_cond_proj_dim=WIDTH, **sd.SMALL_UNET
    ).eval()
    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, sd.save(pipe, tmp_path_factory.mktemp("lcm") / "lcm")


def feed(monkeypatch: pytest.MonkeyPatch, noise: NoiseStream) -> None:
    """Their sampler's noise after the first is ours."""
    module = sd.peers().schedulers.scheduling_lcm
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise(1.0, 0.5).float())


def drawn_there(pipe: Any, monkeypatch: pytest.MonkeyPatch, scale: float, steps: int = 4, **options: Any) -> Tensor:
    """(1, 3, H, W) in [-1, 1] by the pipeline, from the noise of the seed."""
    side = pipe.unet.config.sample_size
    noise = NoiseStream([SEED], (4, side, side))
    first = noise.initial().float()
    feed(monkeypatch, noise)
    options |= {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "pt"}
    return pipe(PROMPT, latents=first, **options).images * 2 - 1


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_the_network_is_told_its_scale(peer: tuple[Any, Path], dtype: torch.dtype, most: float) -> None:
    """timestep_cond is the embedding of w = cfg - 1."""
    pipe, path = peer
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.config.unet, UNetConfig) and checkpoint.config.unet.guidance_width == WIDTH
    unet, theirs = checkpoint.load("unet", dtype=dtype), pipe.unet.to(dtype)
    x, context = torch.randn(3, 4, 8, 8, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype)
    t, scale = torch.tensor([19.0, 499.0, 999.0]), torch.tensor([1.0, 3.7, 8.5])
    embedded = pipe.get_guidance_scale_embedding(scale - 1, WIDTH).to(dtype)
    with torch.no_grad():
        there = theirs(x, t, context, timestep_cond=embedded).sample
        here = unet(x, t, Condition(context=context, guidance=scale))
        other = unet(x, t, Condition(context=context, guidance=scale + 1))
    theirs.to(torch.float32)
    assert relative(here, there) <= most and relative(other, there) > 1e-3


def test_a_network_of_xl_is_told_its_scale_beside_its_vector() -> None:
    """As lcm-sdxl: sizes and pooled text behind the MLP of t, the scale before it."""
    torch.manual_seed(6)
    theirs = sd.peers().UNet2DConditionModel(
        attention_head_dim=(2, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        time_cond_proj_dim=WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        **sd.SMALL_UNET,
    )
    ours = UNet(read_unet(theirs.config, "the peer"))
    names, state = unet_names(ours.state_dict()), theirs.state_dict()
    ours.load_state_dict({key: state[name] for key, (name,) in names.items()})
    x, context, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 64), torch.randn(2, 32)
    t, scale, sizes = torch.tensor([19.0, 999.0]), torch.tensor([3.0, 8.5]), torch.rand(2, 6) * 1000
    embedding = sd.peers().StableDiffusionXLPipeline.get_guidance_scale_embedding(None, scale - 1, WIDTH)
    with torch.no_grad():
        told = {"text_embeds": pooled, "time_ids": sizes}
        there = theirs.eval()(x, t, context, timestep_cond=embedding, added_cond_kwargs=told).sample
        vector = torch.cat([pooled, _waves(sizes, 8)], dim=1)
        here = ours.eval()(x, t, Condition(context=context, vector=vector, guidance=scale))
    assert relative(here, there) <= 1e-5


@pytest.mark.parametrize(("scale", "steps"), [(8.5, 4), (3.0, 2), (1.0, 1)])
def test_the_pictures(peer: tuple[Any, Path], scale: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all is in the files
        model = ldm.load(peer[1], device="cpu")
    assert model.config.drawing == LCM
    settings = Settings(cfg=scale, steps=steps, sampler="lcm")
    ours = model.txt2img(PROMPT, seed=SEED, settings=settings)
    theirs = drawn_there(peer[0], monkeypatch, scale, steps)
    assert ours.std() > 0.1 and float((ours - theirs).abs().max()) <= 1e-4


def test_a_negative_prompt_is_not_used_in_silence(peer: tuple[Any, Path]) -> None:
    model = ldm.load(peer[1], device="cpu")
    settings = Settings(cfg=8.5, steps=1, sampler="lcm")
    plain = model.txt2img(PROMPT, settings=settings)
    with pytest.warns(ldm.api.PromptNotice, match="is told its guidance scale, and nothing comes of a negative prompt"):
        same_picture = model.txt2img(PROMPT, negative="blurry", settings=settings)
    assert torch.equal(plain, same_picture)


@pytest.mark.parametrize(
    ("settings", "prompt", "words"),
    [
        (Settings(perp_negative=1.0), PROMPT, "perp_negative compares several predictions, and .* makes one"),
        (Settings(cfg_rescale=0.5), PROMPT, "cfg_rescale compares"),
        (Settings(cfg_interval=(0.1, 1.0)), PROMPT, "cfg_interval compares"),
        (Settings(sampler="euler_cfg_pp", cfg=0.6), PROMPT, r"a sampler of CFG\+\+ compares"),
        (Settings(prompt_syntax="weighted"), "a dog AND a cat", "AND compares"),
    ],
)
def test_what_compares_predictions_is_refused(
    peer: tuple[Any, Path], settings: Settings, prompt: str, words: str
) -> None:
    model = ldm.load(peer[1], device="cpu")
    with pytest.raises(UserError, match=words):
        model.txt2img(prompt, negative="a tree", settings=settings)


def test_edits_that_look_at_the_empty_prompt_are_refused_and_others_work(peer: tuple[Any, Path]) -> None:
    from ldm.null_text import null_text

    model = ldm.load(peer[1], device="cpu")
    with pytest.raises(UserError, match="this model, which is told its guidance scale, has no use"):
        null_text(model, torch.zeros(1, 3, 16, 16), PROMPT, steps=2)
    settings = Settings(cfg=3.0, steps=1, sampler="lcm", width=16, height=16)
    with model.prompt_to_prompt("a red heart", "a red cat"):
        pair = model.txt2img(["a red heart", "a red cat"], seed=[1, 1], settings=settings)
    assert pair.isfinite().all()


def test_guides_of_ones_own_get_the_unguided_network(peer: tuple[Any, Path]) -> None:
    model = ldm.load(peer[1], device="cpu")
    settings = Settings(steps=1, sampler="lcm")
    own = model.txt2img(PROMPT, guide=lambda branches: lambda x, s: branches(x, s, 1)[0], settings=settings)
    assert float((own - model.txt2img(PROMPT, cfg=1.0, settings=settings)).abs().max()) < 1e-5


def test_what_is_exported_draws_the_same_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, states = 7.5, random_states(TOLD)
    native.save(tmp_path / "ours", TOLD, states)
    assert export.write(tmp_path / "theirs", TOLD, states, "diffusers")
    pipe = sd.peers().DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert type(pipe).__name__ == "LatentConsistencyModelPipeline" and type(pipe.scheduler).__name__ == "LCMScheduler"
    pipe.set_progress_bar_config(disable=True)
    theirs = drawn_there(pipe, monkeypatch, scale)
    ours = ldm.load(tmp_path / "ours", device="cpu").txt2img(
        PROMPT, seed=SEED, settings=Settings(cfg=scale, steps=4, sampler="lcm")
    )
    assert ours.std() > 0.1 and float((ours - theirs).abs().max()) <= 1e-4


@pytest.mark.parametrize("to", FORMATS)
def test_it_travels_through_each_format(to: str, tmp_path: Path) -> None:
    states = random_states(TOLD)
    path = tmp_path / ("there.safetensors" if to == "original" else "there")
    export.write(path, TOLD, states, to)
    read = open_checkpoint(path)
    assert read.config.told_guidance and read.config.drawing == LCM and same(read.state("unet"), states["unet"])


def test_a_single_file_without_our_words_is_known_by_its_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    states = random_states(TOLD)
    export.write(tmp_path / "a.safetensors", TOLD, states, "original")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    read = open_checkpoint(tmp_path / "b.safetensors")
    assert "drawing.sampler=lcm" in read.notices[0] and not open_checkpoint(tmp_path / "a.safetensors").assumed
    assert read.config.told_guidance and read.config.drawing == LCM and same(read.state("unet"), states["unet"])


def test_a_merged_lcm_is_drawn_unguided_and_others_as_ever(tmp_path: Path) -> None:
    """A Stable Diffusion with a LoRA of this kind merged into it, saved with the scheduler it is drawn by."""
    plain = replace(TOLD, unet=replace(SMALL.unet, guidance_width=0), drawing=replace(LCM, cfg=1.0))
    remarks = export.write(tmp_path / "merged", plain, random_states(plain), "diffusers")
    assert any("drawn at cfg 1 in 4 steps of lcm has no place there" in remark for remark in remarks)
    assert open_checkpoint(tmp_path / "merged").config.drawing == replace(LCM, cfg=1.0)
    other = drawing_of({"_class_name": "LCMScheduler", "original_inference_steps": 100}, "", plain.unet)
    assert other == (replace(LCM, cfg=1.0, spacing="trailing"), False)
    usual = replace(plain, drawing=DrawingConfig())
    export.write(tmp_path / "usual", usual, random_states(usual), "diffusers")
    assert open_checkpoint(tmp_path / "usual").config.drawing == DrawingConfig()


def test_a_unet_by_itself_is_drawn_in_the_place_of_its_bases(tmp_path: Path) -> None:
    """As lcm-sdxl is published: config.json and weights, and nothing that says how it is drawn."""
    told = replace(SMALL_XL, unet=replace(SMALL_XL.unet, guidance_width=WIDTH))
    states = random_states(told)
    export.write(tmp_path / "base", SMALL_XL, random_states(SMALL_XL), "diffusers")
    export.write(tmp_path / "told", told, states, "diffusers")
    alone = (tmp_path / "told" / "unet").rename(tmp_path / "alone")
    with pytest.raises(UserError, match=r"alone is a network without .* of the folder unet in a copy") as error:
        ldm.load(alone, device="cpu")
    assert "\n" not in str(error.value)
    shutil.copytree(alone, tmp_path / "base" / "unet", dirs_exist_ok=True)
    with pytest.warns(CheckpointNotice, match=r"assumed by its kind: drawing\.sampler=lcm"):
        model = ldm.load(tmp_path / "base", device="cpu")
    assert model.config.drawing == LCM and model.checkpoint is not None
    assert same(model.checkpoint.state("unet"), states["unet"])
    assert len(list(model.sample(PROMPT))) == LCM.steps
    usual, named, other = (model.txt2img(PROMPT, settings=Settings(cfg=cfg)) for cfg in (None, LCM.cfg, 1.0))
    assert torch.equal(usual, named) and not torch.equal(usual, other)
