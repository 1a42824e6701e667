"""Native checkpoints: what is saved comes back, and what is broken is told in one sentence without running anything."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ldm.autoencoder.kl import AutoencoderKL
from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import AutoencoderConfig, ModelConfig, UNetConfig
from ldm.errors import UserError
from ldm.unet import UNet

SMALL = AutoencoderConfig(channels=32, multipliers=(1,), blocks=1, middle_attention=False, scale=(0.5,), shift=(0.1,))
STAGE_ONE = ModelConfig(autoencoder=SMALL, image_size=32)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(SMALL)


@pytest.fixture
def saved(tmp_path: Path, autoencoder: AutoencoderKL) -> Path:
    native.save(tmp_path / "model", STAGE_ONE, {"autoencoder": autoencoder})
    return tmp_path / "model"


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000
    return text


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_what_is_saved_comes_back(tmp_path: Path, autoencoder: AutoencoderKL, name: str) -> None:
    native.save(tmp_path / name, STAGE_ONE, {"autoencoder": autoencoder})
    assert native.read_config(tmp_path / name) == STAGE_ONE
    codec = open_checkpoint(tmp_path / name).load("autoencoder")
    assert codec.autoencoder is not None and codec.config == SMALL
    assert same(codec.autoencoder.state_dict(), autoencoder.state_dict())
    assert not codec.autoencoder.training and not any(p.requires_grad for p in codec.autoencoder.parameters())
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(codec.autoencoder.decode(z), autoencoder.eval().decode(z))  # of another order in memory


def test_a_whole_model_comes_back_from_one_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = {name: dict(open_checkpoint(tiny_checkpoint).state(name)) for name in ("autoencoder", "text", "unet")}
    file = tmp_path / "tiny.safetensors"
    config = native.read_config(tiny_checkpoint)
    native.save(file, config, parts)
    assert native.read_config(file) == config
    one, whole = open_checkpoint(file), open_checkpoint(tiny_checkpoint)
    assert same(one.load("text").state_dict(), whole.load("text").state_dict())
    assert same(one.load("unet").state_dict(), whole.load("unet").state_dict())
    assert native.fingerprint(one.tensors()) == native.fingerprint(whole.tensors())


def test_half_precision_is_storage_only(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    native.save(tmp_path / "half", STAGE_ONE, {"autoencoder": autoencoder}, dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "half" / "autoencoder.safetensors").values()} == {
        torch.float16
    }
    module = open_checkpoint(tmp_path / "half").load("autoencoder").autoencoder
    assert module is not None
    for key, value in autoencoder.state_dict().items():
        assert torch.equal(module.state_dict()[key], value.half().float())
    bfloat = open_checkpoint(tmp_path / "half").load("autoencoder", dtype=torch.bfloat16).autoencoder
    assert bfloat is not None and {p.dtype for p in bfloat.parameters()} == {torch.bfloat16}


def test_the_identity_codec_has_no_weights(tmp_path: Path) -> None:
    config = ModelConfig(autoencoder=AutoencoderConfig(kind="identity", scale=(1.0,)), image_size=32)
    native.save(tmp_path / "model", config, {})
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.json"]
    assert open_checkpoint(tmp_path / "model").load("autoencoder").autoencoder is None


def test_random_features_are_weights_too(tmp_path: Path) -> None:
    """They are drawn when the network is made, and a network made on the meta device draws nothing."""
    config = UNetConfig(
        channels=32, multipliers=(1,), blocks=1, attention_levels=(), context_width=0, time_embedding="fourier"
    )
    unet = UNet(config)
    native.save(tmp_path / "model", ModelConfig(unet=config), {"unet": unet})
    assert same(open_checkpoint(tmp_path / "model").load("unet").state_dict(), unet.state_dict())


def test_weights_that_are_not_contiguous(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    state = {key: value.clone() for key, value in autoencoder.state_dict().items()}
    state = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    native.save(tmp_path / "model", STAGE_ONE, {"autoencoder": state})
    assert same(dict(open_checkpoint(tmp_path / "model").state("autoencoder")), state)


def test_fingerprint_says_whether_weights_are_the_same(saved: Path, autoencoder: AutoencoderKL) -> None:
    state = dict(autoencoder.state_dict())
    assert native.fingerprint(autoencoder) == native.fingerprint(dict(reversed(state.items())))
    assert native.fingerprint(open_checkpoint(saved).tensors()) == native.fingerprint(
        {f"autoencoder.{key}": v for key, v in state.items()}
    )
    changed = {key: value.clone() for key, value in state.items()}
    next(iter(changed.values())).view(-1)[0] += 1e-6
    assert native.fingerprint(changed) != native.fingerprint(state)
    assert native.fingerprint({key: value.bfloat16() for key, value in state.items()}) != native.fingerprint(state)


# ---------------------------------------------------------------- writing that fails


def test_a_full_disk_leaves_the_old_checkpoint(saved: Path, autoencoder: AutoencoderKL) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = dataclasses.replace(STAGE_ONE, image_size=64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # what a full disk does, without filling one
    try:
        with pytest.raises(UserError) as error:
            native.save(saved, other, {"autoencoder": autoencoder})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "limit" in sentence(error)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_file_where_the_directory_should_be(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    (tmp_path / "model").write_text("not a directory")
    with pytest.raises(UserError, match="is a file"):
        native.save(tmp_path / "model", STAGE_ONE, {"autoencoder": autoencoder})


# ---------------------------------------------------------------- reading what is broken


def change_json(path: Path, **changes: object) -> None:
    file = path / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def break_config(path: Path) -> None:
    (path / "model.json").write_text('{"format": "ldm-1", ')


def drop_config(path: Path) -> None:
    (path / "model.json").unlink()


def drop_weights(path: Path) -> None:
    (path / "autoencoder.safetensors").unlink()


def truncate(path: Path) -> None:
    file = path / "autoencoder.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty(path: Path) -> None:
    (path / "autoencoder.safetensors").write_bytes(b"")


def huge_header(path: Path) -> None:
    file = path / "autoencoder.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])


def other_keys(path: Path) -> None:
    file = path / "autoencoder.safetensors"
    state = load_file(file)
    save_file({key if i else "stranger": value for i, (key, value) in enumerate(sorted(state.items()))}, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_config, ["model.json"]),
        (break_config, ["JSON"]),
        (lambda path: change_json(path, format="ldm-2"), ["ldm-2", "ldm-1"]),
        (lambda path: change_json(path, parametrization="v"), ["parametrization", "parameterization"]),
        (lambda path: change_json(path, autoencoder=None), ["no autoencoder"]),
        (lambda path: change_json(path, autoencoder={"channels": 64}), ["another architecture", "missing", "more"]),
        (lambda path: change_json(path, autoencoder={"channels": 33}), ["cannot be built"]),
        (drop_weights, ["autoencoder.safetensors"]),
        (truncate, ["truncated or damaged"]),
        (empty, ["truncated or damaged"]),
        (huge_header, ["truncated or damaged"]),
        (other_keys, ["1 missing", "1 unexpected", "stranger"]),
    ],
)
def test_what_is_broken_is_told_in_one_sentence(saved: Path, damage, words: list[str]) -> None:
    damage(saved)
    with pytest.raises(UserError) as error:
        open_checkpoint(saved).load("autoencoder")
    text = sentence(error)
    assert all(word in text for word in words), text


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match="not a native checkpoint"):
        native.read_config(tmp_path / "sd.safetensors")


def test_a_header_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    """A header of 640 bytes begins with 80 02, as a pickle of protocol 2 does."""
    file = tmp_path / "odd.safetensors"
    for padding in range(1000):
        save_file({"x": torch.zeros(1)}, file, {"model": "{}", "padding": "." * padding})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    with pytest.raises(UserError, match="has the format None"):
        native.read_config(file)


class Malice:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["torch", "torch_old", *range(6)])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model/unet.safetensors"])
def test_a_malicious_pickle_is_not_run(tiny_checkpoint: Path, tmp_path: Path, form: str | int, name: str) -> None:
    mark = tmp_path / "executed"
    path = tmp_path / name
    if path.parent != tmp_path:
        shutil.copytree(tiny_checkpoint, path.parent)
    if isinstance(form, int):
        path.write_bytes(pickle.dumps({"state_dict": Malice(mark)}, protocol=form))
    else:
        torch.save({"state_dict": Malice(mark)}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError) as error:
        open_checkpoint(path if path.parent == tmp_path else path.parent).load("unet")
    assert "pickle" in sentence(error) or form in (0, 1)  # the oldest protocols have no mark of their own
    assert not mark.exists()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_sentence_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut or flip a file anywhere in its header: it loads, or UserError; never another exception."""
    content = _one_file(tmp_path_factory)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    if data.draw(st.booleans()):
        broken = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place, value = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
        broken = content[:place] + bytes([value]) + content[place + 1 :]
    path = tmp_path_factory.getbasetemp() / "broken.safetensors"
    path.write_bytes(broken)
    try:
        open_checkpoint(path).load("autoencoder")
    except UserError as error:
        assert "\n" not in str(error)


def _one_file(factory: pytest.TempPathFactory) -> bytes:
    path = factory.getbasetemp() / "whole.safetensors"
    if not path.exists():
        native.save(path, STAGE_ONE, {"autoencoder": AutoencoderKL(SMALL)})
    return path.read_bytes()
