"""Batches of any bucket's shape go through both stages."""

import io
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from PIL import Image

from ldm.data.writing import write_shard
from ldm.training.draws import Draws
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import DiffusionStage

from .toys import AUTOENCODER, CPU, PIXELS


def test_pictures_of_several_shapes_train_both_stages(tmp_path):
    shapes = [(24, 24), (40, 24), (24, 40)]
    records = []
    for i in range(30):
        out = io.BytesIO()
        height, width = shapes[i % 3]
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        records.append((f"k{i}", {"png": out.getvalue(), "txt": b"text"}))
    write_shard(tmp_path / "x.tar", records)
    data = replace(PIXELS.data, shards=str(tmp_path / "x.tar"), validation="", size=16, buckets=4)
    pixels = replace(PIXELS, data=data, model=replace(PIXELS.model, context_width=0))
    for stage, name in (
        (AutoencoderStage(replace(AUTOENCODER, data=data), 0, 1, CPU), "autoencoder"),
        (DiffusionStage(pixels, 0, 1, CPU), "unet"),
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
