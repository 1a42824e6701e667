"""What a network is given in training: masks of its own for each sample, and an inpainting network end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.shard_maker import picture, write_tar

import ldm
from ldm.conditioning.planes import depth_plane
from ldm.config import AutoencoderConfig, DiffusionTraining, EncoderConfig, FiguresConfig, ModelConfig, SampleConfig
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.inputs import draw_masks
from ldm.training.stage_two import diffusion_stage

from .test_combinations import PLAIN
from .test_stage_two import pixels, tower  # noqa: F401 (fixtures)
from .toys import CPU, LOOP, log_of, run

KEYS = [f"sample{i}" for i in range(400)]
MASKED = replace(PLAIN, model=replace(PLAIN.model, in_channels=7))  # 3 of the pixels, 1 of the mask, 3 of what is left

DEEP = replace(  # 3 channels of the pixels, 1 of the depth map
    PLAIN, model=replace(PLAIN.model, in_channels=4), data=replace(PLAIN.data, depth="depth", validation="")
)


def test_masks_are_drawn_for_each_sample() -> None:
    """A quarter whole; the others leave something and hide something. The same in any batch, others at each step."""
    masks = draw_masks(Draws(0, 3, KEYS), 16, 24)
    assert masks.shape == (400, 1, 16, 24) and set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    whole = float((share == 1).double().mean())
    assert abs(whole - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert float(share.min()) >= 2 * 3 / (16 * 24)  # one rectangle of the least sides
    assert torch.equal(draw_masks(Draws(0, 3, KEYS[7:9]), 16, 24), masks[7:9])
    assert not torch.equal(draw_masks(Draws(0, 4, KEYS), 16, 24), masks)
    assert bool(draw_masks(Draws(0, 3, KEYS), 1, 1).flatten().all())  # a picture of one pixel


def test_an_inpainting_network_is_given_the_mask_and_what_it_leaves() -> None:
    stage = diffusion_stage(replace(MASKED, loss=replace(MASKED.loss, caption_dropout=1.0)), 0, 1, CPU)
    batch = next(iter(stage.batches))
    _, told = stage.inputs(batch, draws := Draws(0, 0, batch.key), 1.0)  # told nothing, it keeps its planes
    assert told.planes is not None and told.planes.shape == (8, 4, 8, 8)
    mask = draw_masks(draws, 8, 8)
    assert torch.equal(told.planes[:, :1], mask)
    assert torch.equal(told.planes[:, 1:], batch.image * (1 - mask))
    assert any("a mask and the masked picture" in line for line in stage.describe())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": "nowhere"}, r"trained on masked pictures, and cached latents have none; leave out latents="),
        ({"model": DEEP.model}, r"for a depth map, and data\.depth is not set; say data\.depth="),
        (
            {"model": DEEP.model, "data": DEEP.data, "latents": "no"},
            r"trained on depth maps, and cached latents have none; leave out latents=",
        ),
        (
            {"model": DEEP.model, "data": DEEP.data, "figures": FiguresConfig(4)},
            r"this network draws after a depth map; set figures\.pictures=0",
        ),
        ({"data": replace(PLAIN.data, depth="depth")}, r"data\.depth=depth is for a network that is given a depth map"),
        (
            {"model": replace(PLAIN.model, in_channels=9)},
            r"set model\.in_channels=3 .*or model\.in_channels=7 for one that inpaints",
        ),
    ],
)
def test_what_is_not_trained_is_refused_in_a_sentence(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        diffusion_stage(replace(MASKED, **change), 0, 1, CPU)  # type: ignore[arg-type]


def test_a_depth_network_is_given_the_map_cropped_and_mirrored_with_its_picture(tmp_path: Path) -> None:
    """Where the map is the picture itself, so is the plane, each spanning [-1, 1]; it learns, and draws after a map."""
    grey = [picture(i, (12, 8), mode="L") for i in range(8)]
    members = [(f"{i}.{name}", content) for i, content in enumerate(grey) for name in ("png", "depth")]
    bad = [("8.png", grey[0]), ("9.png", grey[0]), ("9.depth", b"no picture")]
    data = replace(DEEP.data, shards=str(write_tar(tmp_path / "x.tar", [*members, *bad])), bad_limit=0.5)
    data = replace(data, caption="none", size=8, crop="random", flip=True)
    stage = diffusion_stage(replace(DEEP, data=data, sample=SampleConfig(("a cat",))), 0, 1, CPU)
    assert any("beside it a depth map" in line for line in stage.describe())
    assert "sample.prompts are not drawn, for it draws after a depth map alone" in stage.notices
    for _, batch in zip(range(4), stage.batches, strict=False):
        _, told = stage.inputs(batch, Draws(0, 0, batch.key))
        assert told.planes is not None and set(batch.key) <= {f"x/{i}" for i in range(8)}
        assert torch.equal(told.planes, depth_plane(batch.image[:, :1], (8, 8)))
    run(stage, replace(LOOP, steps=3), tmp_path / "run", replace(DEEP, data=data))
    model, image = ldm.load(tmp_path / "run", device="cpu"), torch.zeros(1, 3, 8, 8)
    one, other = (
        model.img2img(image, depth=depth, strength=1.0, steps=2) for depth in torch.eye(8).view(2, 1, 1, 4, 8)
    )
    assert one.shape == (1, 3, 8, 8) and not torch.equal(one, other)


def test_pooled_text_is_told_as_the_vector(pixels: DiffusionTraining) -> None:  # noqa: F811
    told = replace(pixels, encoder=EncoderConfig(pooled=True), model=replace(pixels.model, vector_width=16))
    assert diffusion_stage(told, 0, 1, CPU).inputs.encoder.vector_width == 16


@pytest.mark.slow
def test_a_nine_channel_network_learns_to_inpaint_and_does(pixels: DiffusionTraining, tmp_path: Path) -> None:  # noqa: F811
    """By the ordinary way, on latents of 4 channels: it learns, draws on its way, and keeps what the mask leaves."""
    from ldm.autoencoder.kl import AutoencoderKL
    from ldm.checkpoints import native

    shape = AutoencoderConfig(channels=32, multipliers=(1, 1), blocks=1, middle_attention=False, latent_channels=4)
    torch.manual_seed(0)
    native.save(tmp_path / "ae", ModelConfig(autoencoder=shape), {"autoencoder": AutoencoderKL(shape)})
    loop = replace(LOOP, steps=60, log_every=10, validate_every=60, save_every=60)
    config = replace(
        pixels,
        autoencoder=str(tmp_path / "ae"),
        model=replace(pixels.model, in_channels=9, out_channels=4),
        data=replace(pixels.data, size=16),
        loop=loop,
        sample=SampleConfig(("a red heart",), steps=2),
    )
    run(diffusion_stage(config, 0, 1, CPU), loop, tmp_path / "run", config)
    losses = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0] and (tmp_path / "run" / "samples" / "00000060.png").exists()

    model = ldm.load(tmp_path / "run", device="cpu")
    assert model.extra_channels == 5
    image, mask = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[:, :, :, 8:] = 1
    drawn = model.img2img(image, "a red heart", mask=mask, strength=1.0, steps=3, seed=1)
    assert torch.equal(drawn[..., :8], image[..., :8]) and bool(drawn.isfinite().all())
    assert not torch.equal(drawn[..., 8:], image[..., 8:])
