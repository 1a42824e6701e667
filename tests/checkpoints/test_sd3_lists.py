"""Stable Diffusion 3 medium's single files: the published lists of tensors are covered exactly, both ways."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from ldm.checkpoints import native, original, sd3
from ldm.checkpoints.architectures import TRANSFORMERS, name_of
from ldm.checkpoints.networks import skeleton
from ldm.config import ScheduleConfig
from ldm.errors import UserError

from .listed import LISTS, Listed

T5 = "text_encoders.t5xxl."
WITH_CLIPS = {name: shape for name, shape in LISTS["sd3"].items() if not name.startswith(T5)}
ALONE = {name: shape for name, shape in WITH_CLIPS.items() if not name.startswith("text_encoders.")}


def opened(shapes: Mapping[str, list[int]], folder: Path):
    return sd3.open_single_file(folder / "sd3.safetensors", Listed(shapes, {}, {}))  # type: ignore[arg-type]


def test_the_file_with_clips(tmp_path: Path):
    """1,448 names: 491 of the transformer, 244 of the autoencoder, 196 and 517 of the towers."""
    assert len(WITH_CLIPS) == 1448 and len(ALONE) == 735
    found = opened(WITH_CLIPS, tmp_path)
    assert found.foreign == () and found.config.unet == TRANSFORMERS["Stable Diffusion 3 medium"]
    assert name_of(found.config) == "Stable Diffusion 3 medium"
    assert found.config.schedule == ScheduleConfig("flow", shift=3.0) and found.config.image_size == 1024
    read: set[str] = set()
    counts = {}
    for name in found.parts:
        theirs = found.state(name).theirs()
        assert all(tuple(WITH_CLIPS[key]) == shape for key, shape in theirs.items() if key in WITH_CLIPS)
        counts[name] = len(theirs)
        read |= theirs.keys()
    assert counts["unet"] == 491 and counts["autoencoder"] == 244
    assert set(WITH_CLIPS) - read == {name for name in WITH_CLIPS if original.unused(name)}


def test_what_is_written_is_that_list_and_the_projection_of_the_first_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: dict[str, list[int]] = {}

    def keep(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        written.update({key: list(value.shape) for key, value in tensors.items()})
        path.touch()

    monkeypatch.setattr(sd3, "write_tensors", keep)
    config = opened(WITH_CLIPS, tmp_path).config
    states = {part: skeleton(part, config, "").state_dict() for part in native.part_names(config)}
    sd3.write_single_file(tmp_path / "written.safetensors", config, states)
    extra = {"text_encoders.clip_l.transformer.text_projection.weight": [768, 768]}
    assert written == WITH_CLIPS | extra


def test_the_file_without_clips_says_what_it_lacks(tmp_path: Path):
    found = opened(ALONE, tmp_path)
    assert found.foreign == () and list(found.parts) == ["unet", "autoencoder"]
    with pytest.raises(UserError, match="no text tower"):
        found.part("text")


def test_a_block_of_a_strangers_number_takes_no_time(tmp_path: Path):
    """Blocks are not counted one by one: the number is refused at once."""
    name = f"model.diffusion_model.joint_blocks.{10**15}.x_block.attn.qkv.weight"
    began = time.process_time()
    assert opened(WITH_CLIPS | {name: [1]}, tmp_path).config.unet.depth == 10**15 + 1  # type: ignore[union-attr]
    assert time.process_time() - began < 5
