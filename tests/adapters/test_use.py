"""Adapters on a model and on the command line: drawn with, written into the picture, and drawn again from there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from unet.small import randomize

import ldm
from ldm import image_io
from ldm import script as scripts
from ldm.adapters import use
from ldm.adapters.low_rank import AdaptedUNet
from ldm.checkpoints import native
from ldm.checkpoints.lora import read_lora, save_lora
from ldm.checkpoints.opening import open_checkpoint
from ldm.errors import UserError
from ldm.jobs.adapters import Adapter, parse_embedding, parse_lora, read_hash
from ldm.model import CheckpointNotice


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
    """The model that is asked stays as it is; the new one shares with it all that no LoRA touches."""
    model = ldm.load(tiny_checkpoint, device="cpu")
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    plain = model.txt2img("a <new> cat", steps=2)
    a, b, word = (str(files / f"{name}.safetensors") for name in ("a", "b", "word"))
    with pytest.warns(CheckpointNotice, match="brings the word '<new>', 2 vectors"):
        more = model.adapted({a: 0.5, b: 1.0}, [word])
    assert [adapter.hash[:4] != "" for adapter in more.adapters] == [True] * 3 and more.hash == model.hash
    drawn = more.txt2img("a <new> cat", steps=2)
    assert (drawn - plain).abs().max() > 0.01
    assert not torch.equal(more.txt2img("a <new>", steps=2), more.txt2img("a new", steps=2))
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    assert torch.equal(model.txt2img("a <new> cat", steps=2), plain) and not model.notices and not model.adapters
    step_by_step = use.apply(
        use.apply(model, [Adapter("lora", a, 0.5)]), [Adapter("lora", b), Adapter("embedding", word)]
    )
    assert step_by_step.adapters == more.adapters and step_by_step.told == more.told
    assert torch.allclose(step_by_step.txt2img("a <new> cat", steps=2), drawn, atol=1e-4)


def test_no_second_copy_of_the_weights(tiny_checkpoint: Path, files: Path) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    more = model.adapted({files / "a.safetensors": 1.0})
    touched = {rows.name for rows in read_lora(files / "a.safetensors", model.unet, model.text).changes["unet"]}
    here, there = dict(model.unet.named_parameters()), dict(more.unet.named_parameters())
    shared = {name for name in here if here[name].data_ptr() == there[name].data_ptr()}
    assert shared == here.keys() - touched and len(touched) > 4
    assert all(a is b for a, b in zip(model.unet.buffers(), more.unet.buffers(), strict=True))
    assert more.text is model.text and more.codec is model.codec and more.unet is not model.unet
    words = use.apply(model, [Adapter("embedding", str(files / "word.safetensors"))])
    assert words.unet is model.unet
    assert words.text.token_embedding.table is model.text.token_embedding  # type: ignore[union-attr]


def test_two_models_of_one_draw_at_the_same_time(tiny_checkpoint: Path, files: Path) -> None:
    base = ldm.load(tiny_checkpoint, device="cpu")
    models = [base, base.adapted({files / "a.safetensors": 1.0}), base.adapted({files / "b.safetensors": 1.0})]
    alone = [model.txt2img("a cat", steps=4, seed=1) for model in models]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda model: model.txt2img("a cat", steps=4, seed=1), models))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[1], alone[2])


def test_a_file_may_be_given_alone_and_a_lora_without_its_scale(tiny_checkpoint: Path, files: Path) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    lora, word = files / "a.safetensors", files / "word.safetensors"
    for loras in (lora, str(lora), [lora], {lora: np.float32(1)}):
        with pytest.warns(CheckpointNotice, match="brings the word '<new>'"):
            found = model.adapted(loras, str(word)).adapters
        assert [(one.kind, one.path, one.scale) for one in found] == [
            ("lora", str(lora), 1.0),
            ("embedding", str(word), 1.0),
        ]
    for scale in ("1", None):
        with pytest.raises(UserError, match=rf"the scale of {lora} is .*, which is not a number"):
            model.adapted({lora: scale})  # type: ignore[dict-item]


def test_what_cannot_be_read(tiny_checkpoint: Path, files: Path, tmp_path: Path) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    save_file({"x": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no LoRA for this model"):
        model.adapted({files / "a.safetensors": 1.0, tmp_path / "x.safetensors": 1.0})


def test_words_that_a_lora_brings_along(tiny_checkpoint: Path, files: Path, tmp_path: Path) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    bundle = load_file(files / "a.safetensors") | {"bundle_emb.my.cat.clip_l": torch.ones(3, 32)}
    save_file(bundle, tmp_path / "bundle.safetensors")
    more = use.apply(model, [Adapter("lora", str(tmp_path / "bundle.safetensors"))])
    assert more.told == (f"{tmp_path}/bundle.safetensors brings the word 'my.cat', 3 vectors",)
    without = use.apply(model, [Adapter("lora", str(files / "a.safetensors"))])
    assert torch.equal(more.txt2img("a cat", steps=1), without.txt2img("a cat", steps=1))
    assert not torch.equal(more.txt2img("my.cat", steps=1), without.txt2img("my.cat", steps=1))


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_whose_base_is_another_is_told(tiny_checkpoint: Path, files: Path, tmp_path: Path, kind: str) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    assert model.checkpoint is not None
    native.save(tmp_path / "one.safetensors", model.config, native_parts(model))
    single = ldm.load(tmp_path / "one.safetensors", device="cpu")
    sha = read_hash(tmp_path / "one.safetensors")
    short = hashlib.sha256((tmp_path / "one.safetensors").read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    tensors = load_file(files / ("a.safetensors" if kind == "lora" else "word.safetensors"))

    def told(loaded: ldm.LatentDiffusion, said: dict[str, str]) -> bool:
        save_file(tensors, tmp_path / "x.safetensors", said)
        made = use.apply(loaded, [Adapter(kind, str(tmp_path / "x.safetensors"))])
        return any("made for another model (them.ckpt, " in notice for notice in made.told)

    name = {"ss_sd_model_name": "them.ckpt"}
    assert not told(model, name)
    for loaded in (model, single):  # ours: the same whatever the container
        assert not told(loaded, name | {"ldm.base_hash": model.checkpoint.base_hash, "ss_sd_model_hash": "00" * 32})
        assert told(loaded, name | {"ldm.base_hash": "ab" * 32})
        assert told(loaded, name | {"ss_new_sd_model_hash": "ab" * 32})
    other = ldm.load(tiny_checkpoint, device="cpu", vae=tmp_path / "one.safetensors")
    assert not told(other, name | {"ldm.base_hash": model.checkpoint.base_hash})  # no matter of the autoencoder
    for key, value in (("ss_new_sd_model_hash", sha), ("ss_sd_model_hash", short), ("sd_checkpoint", sha[:10])):
        assert not told(single, name | {key: value}) and told(single, name | {key: "0" * len(value)})
    assert not told(single, name | {"ss_sd_model_hash": "None"})


def native_parts(model: ldm.LatentDiffusion) -> dict[str, torch.nn.Module]:
    assert model.codec.autoencoder is not None
    return {"autoencoder": model.codec.autoencoder, "text": model.text, "unet": model.unet}


def test_a_shipped_name_is_a_loras_alone(
    tiny_checkpoint: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that has that name the path says so, and an embedding of that name is that file."""
    monkeypatch.chdir(tmp_path)
    model = ldm.load(tiny_checkpoint, device="cpu")
    shipped = Path(ldm.__file__).parent / "assets" / "icons" / "four.safetensors"
    assert Path(parse_lora("four:0.5").file) == shipped and parse_lora("four:0.5").path == "four"
    with pytest.raises(UserError, match="'four'"):
        parse_embedding("four")
    Path("four").write_bytes((files / "word.safetensors").read_bytes())
    with pytest.warns(CheckpointNotice, match="brings the word '<new>'"):
        assert model.adapted(embeddings="four").adapters == (Adapter("embedding", "four", hash=read_hash("four")),)
    Path("four").write_bytes((files / "a.safetensors").read_bytes())
    assert Path(parse_lora("four").file) == shipped and parse_lora("./four").file == "./four"
    for own in ("./four", Path("four")):
        assert model.adapted(own).adapters == (Adapter("lora", "./four", hash=read_hash("four")),)


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
    said = run(*draw, "--lora", f"{lora}:0.7", "--embedding", word, "--out", tmp_path / "one")
    assert said == f"warning: {word} brings the word '<new>', 2 vectors\n"
    picture = tmp_path / "one" / "00000.png"
    written = image_io.read_metadata(picture)["adapters"]
    assert [(a["kind"], a["path"], a["scale"]) for a in written] == [
        ("lora", str(lora), 0.7),
        ("embedding", str(word), 1.0),
    ]
    assert run("--reproduce", picture, "--out", tmp_path / "two") == said
    run(*draw, "--out", tmp_path / "plain")
    one, two, plain = (np.array(Image.open(tmp_path / name / "00000.png")) for name in ("one", "two", "plain"))
    assert np.array_equal(one, two) and not np.array_equal(one, plain)

    other = json.loads(json.dumps(written))
    other[0]["hash"] = "0" * 64
    with Image.open(picture) as opened:
        metadata = image_io.read_metadata(picture) | {"adapters": other}
        image_io.save_png(torch.from_numpy(np.array(opened)).permute(2, 0, 1) / 127.5 - 1, tmp_path / "x.png", metadata)
    assert "is not the file that the picture was made with" in run("--reproduce", tmp_path / "x.png", "--out", tmp_path)
