"""Batches of any bucket's shape go through both stages."""

import io
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.config import DataConfig
from ldm.data.loader import Loader
from ldm.data.writing import write_shard
from ldm.training.draws import Draws
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import diffusion_stage

from .toys import AUTOENCODER, CPU, PIXELS


def data_of_several_shapes(tmp_path: Path) -> DataConfig:
    """Thirty pictures of noise, a third square, a third high and a third wide."""
    shapes = [(24, 24), (40, 24), (24, 40)]
    records = []
    for i in range(30):
        out = io.BytesIO()
        height, width = shapes[i % 3]
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        records.append((f"k{i}", {"png": out.getvalue(), "txt": b"text"}))
    write_shard(tmp_path / "x.tar", records)
    return replace(PIXELS.data, shards=str(tmp_path / "x.tar"), validation="", size=16, buckets=4)


def test_pictures_of_several_shapes_train_both_stages(tmp_path):
    data = data_of_several_shapes(tmp_path)
    pixels = replace(PIXELS, data=data, model=replace(PIXELS.model, context_width=0))
    for stage, name in (
        (AutoencoderStage(replace(AUTOENCODER, data=data), 0, 1, CPU), "autoencoder"),
        (diffusion_stage(pixels, 0, 1, CPU), "unet"),
    ):
        seen = set()
        networks = {player: each.module for player, each in stage.players.items()}
        for step, batch in enumerate(islice(stage.batches, 4)):
            seen.add(tuple(batch.image.shape[2:]))
            played = stage.losses(batch, Draws(0, step, batch.key), step, networks)
            losses = {player: loss for player, loss, _ in islice(played, 1)}
            losses[name].backward()
            assert torch.isfinite(losses[name])
        assert len(seen) == 3


def test_the_scale_is_of_all_values_whatever_their_pictures_shape(tmp_path):
    """Against the plain mean and deviation of every value; without noise, so that the posteriors' modes are all."""
    data = data_of_several_shapes(tmp_path)
    stage = AutoencoderStage(replace(AUTOENCODER, data=data, scale_samples=40), 0, 1, CPU)
    values = []
    with torch.no_grad():
        shift, scale = stage.measure()
        for batch in islice(Loader(data, AUTOENCODER.loop.global_batch, 0, 1, AUTOENCODER.loop.seed), 5):
            posterior = stage.codec.posterior(batch.image)
            noise = torch.ones_like(posterior.mean)
            both = posterior.sample(noise).double(), posterior.sample(-noise).double()  # mean +- deviation
            values.append(torch.cat(both).transpose(0, 1).flatten(1))
    assert len({piece.shape for piece in values}) > 1
    joined = torch.cat(values, 1)
    torch.testing.assert_close(torch.tensor(shift).double(), joined.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(1 / torch.tensor(scale).double(), joined.std(1, correction=0), rtol=1e-5, atol=1e-6)
