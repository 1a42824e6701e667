"""What the server was started with, chosen by name: several models, LoRAs, words; no path goes out."""

from __future__ import annotations

import json
import os
import shutil
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from unet.small import randomize

import ldm
from ldm.adapters.low_rank import AdaptedUNet
from ldm.checkpoints.lora import save_lora
from ldm.checkpoints.opening import open_checkpoint
from ldm.web.shelf import Shelf, named
from web.conftest import Server, pixels, serving

JOB = {"prompt": "a <new> cat", "seed": 3, "steps": 2}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate("abc"):
        unet = open_checkpoint(tiny_checkpoint).load("unet")
        adapted = randomize(AdaptedUNet(unet, 2, 4.0, "attention"), seed)
        save_lora(folder / f"{name}.safetensors", adapted.lora(), unet, None)
    (folder / "words").mkdir()
    save_file({"<new>": torch.ones(2, 32)}, folder / "words" / "word.safetensors")
    shutil.copytree(tiny_checkpoint, folder / "other")
    return folder


@pytest.fixture(scope="module")
def full(tiny_checkpoint: Path, folder: Path) -> Iterator[Server]:
    loras, words = named([str(folder), "four"], "LoRA"), named([str(folder / "words")], "embedding")
    shelf = Shelf(named([str(tiny_checkpoint), str(folder / "other")], "model"), loras, words, device="cpu")
    shelf.open_models()
    with serving(shelf) as server:
        yield server


def test_adapters_by_name_draw_as_the_librarys_and_no_path_goes_out(full: Server, tiny_model: Any, folder: Path):
    job = JOB | {"loras": {"a.safetensors": 0.5, "b.safetensors": 1}, "embeddings": ["word.safetensors"]}
    answer = full.draw("application/json", **job).json
    files = {str(folder / "a.safetensors"): 0.5, str(folder / "b.safetensors"): 1.0}
    with pytest.warns(UserWarning):
        adapted = tiny_model.adapted(files, [folder / "words" / "word.safetensors"])
    image = b64decode(answer["pictures"][0]["png"])
    assert np.array_equal(pixels(image), np.asarray(ldm.to_pil(adapted.txt2img(JOB["prompt"], seed=3, steps=2)[0])))
    assert any("word.safetensors brings the word '<new>'" in notice for notice in answer["notices"])
    assert str(folder).encode() not in image and str(folder) not in json.dumps(answer)
    assert full.ask("/api/recipe", image).json["settings"]["loras"] == {"a.safetensors": 0.5, "b.safetensors": 1.0}
    assert str(folder) not in full.ask("/api/schema").body.decode()


def test_few_merged_models_are_kept_and_each_draws_its_own(full: Server):
    first = {name: full.draw(**JOB, loras={f"{name}.safetensors": 1}).body for name in "abc"}
    assert len({*first.values(), full.draw(**JOB).body}) == 4
    assert len(full.shelf._adapted) == 2
    assert {name: full.draw(**JOB, loras={f"{name}.safetensors": 1}).body for name in "abc"} == first


def test_models_and_guide_models_by_name(full: Server, folder: Path):
    assert full.ask("/api/schema").json["properties"]["model"]["enum"] == ["tiny", "other"]
    drawn = full.draw(**JOB, model="other", guide_model="tiny", cfg=2)
    assert drawn.status == 200 and str(folder).encode() not in drawn.body
    told = full.ask("/api/recipe", drawn.body).json
    assert told["notices"] == [] and (told["settings"]["model"], told["settings"]["guide_model"]) == ("other", "tiny")
    (beside,) = full.shelf._helpers["other"].models.values()
    assert beside is full.shelf.opened["tiny"], "what is open is not opened again"
    assert full.draw(**JOB, model="other").status == 200 and full.shelf._helpers["other"].models, "and it stays open"
    error = full.draw(**JOB, model=str(folder / "other")).error
    assert "there are tiny, other" in error


def test_a_lora_of_another_model_is_told_without_its_path(full: Server, folder: Path):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, folder / "c.safetensors")
    answer = full.draw(**JOB, loras={"c.safetensors": 0.1})
    assert answer.status == 400 and "c.safetensors" in answer.error and str(folder) not in answer.error
    answer = full.draw(**JOB, loras={"four": 1})  # it is of another model too, and lies in the package
    assert answer.status == 400 and "four" in answer.error and os.sep not in answer.error
