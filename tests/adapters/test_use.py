"""Adapters on a model and on the command line: drawn with, written into the picture, and drawn again from there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from unet.small import randomize

import ldm
from ldm import image_io
from ldm import script as scripts
from ldm.adapters import use
from ldm.adapters.low_rank import AdaptedUNet
from ldm.adapters.record import Adapter, parse_lora
from ldm.checkpoints.lora import save_lora
from ldm.checkpoints.opening import open_checkpoint
from ldm.errors import UserError


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.safetensors and b.safetensors, LoRAs of the tiny model, and word.safetensors, "<new>"."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        unet = open_checkpoint(tiny_checkpoint).load("unet")
        adapted = randomize(AdaptedUNet(unet, 2, 4.0, "attention"), seed)
        save_lora(folder / f"{name}.safetensors", adapted.lora(), unet, None)
    save_file({"<new>": torch.ones(2, 32)}, folder / "word.safetensors")
    return folder


def test_on_a_model(tiny_checkpoint: Path, files: Path) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    plain = model.txt2img("a cat", steps=2)
    a, b, word = (str(files / f"{name}.safetensors") for name in ("a", "b", "word"))
    more, loras = use.apply(model, [Adapter("lora", a, 0.5), Adapter("lora", b), Adapter("embedding", word)])
    assert [adapter.hash[:4] != "" for adapter in more.adapters] == [True] * 3 and more.hash == model.hash
    drawn = more.txt2img("a cat", steps=2)
    assert (drawn - plain).abs().max() > 0.01
    assert not torch.equal(more.txt2img("a <new>", steps=2), more.txt2img("a new", steps=2))
    loras.clear()
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    assert torch.equal(model.txt2img("a cat", steps=2), plain)
    again = model.adapted({a: 0.5, b: 1.0}, [word])
    assert again.adapters == more.adapters and torch.equal(again.txt2img("a cat", steps=2), drawn)


def test_what_cannot_be_read_leaves_the_model_alone(tiny_checkpoint: Path, files: Path, tmp_path: Path) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    save_file({"x": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no LoRA for this model"):
        model.adapted({files / "a.safetensors": 1.0, tmp_path / "x.safetensors": 1.0})
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())


def test_scales_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b:c").touch()
    assert parse_lora(f"{tmp_path}/a.safetensors") == Adapter("lora", f"{tmp_path}/a.safetensors", 1.0)
    assert parse_lora(f"{tmp_path}/a.safetensors:-0.5").scale == -0.5
    assert parse_lora(f"{tmp_path}/b:c:2") == Adapter("lora", f"{tmp_path}/b:c", 2.0)
    assert parse_lora(f"{tmp_path}/b:c").path == f"{tmp_path}/b:c"
    for word in ("nowhere", f"{tmp_path}/a.safetensors:nan", f"{tmp_path}:1"):
        with pytest.raises(UserError):
            parse_lora(word)


def test_the_script_writes_them_down_and_draws_again(
    tiny_checkpoint: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("txt2img", Path(__file__).parents[2] / "scripts" / "txt2img.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["txt2img.py", *map(str, words), "--device", "cpu"])
        scripts.run(script.main)
        return capsys.readouterr().err

    lora, word = files / "a.safetensors", files / "word.safetensors"
    draw = ("--model", tiny_checkpoint, "--prompt", "a <new> cat", "--steps", 2)
    assert run(*draw, "--lora", f"{lora}:0.7", "--embedding", word, "--out", tmp_path / "one") == ""
    picture = tmp_path / "one" / "00000.png"
    written = image_io.read_metadata(picture)["adapters"]
    assert [(a["kind"], a["path"], a["scale"]) for a in written] == [
        ("lora", str(lora), 0.7),
        ("embedding", str(word), 1.0),
    ]
    assert run("--reproduce", picture, "--out", tmp_path / "two") == ""
    run(*draw, "--out", tmp_path / "plain")
    one, two, plain = (np.array(Image.open(tmp_path / name / "00000.png")) for name in ("one", "two", "plain"))
    assert np.array_equal(one, two) and not np.array_equal(one, plain)

    other = json.loads(json.dumps(written))
    other[0]["hash"] = "0" * 64
    with Image.open(picture) as opened:
        metadata = image_io.read_metadata(picture) | {"adapters": other}
        image_io.save_png(torch.from_numpy(np.array(opened)).permute(2, 0, 1) / 127.5 - 1, tmp_path / "x.png", metadata)
    assert "is not the file that the picture was made with" in run("--reproduce", tmp_path / "x.png", "--out", tmp_path)
