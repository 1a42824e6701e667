"""tools/convert_checkpoint.py: what goes in comes out, as a directory, as a file, and halved."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import native
from ldm.config import AutoencoderConfig, ModelConfig

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def convert(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    runpy.run_path(str(TOOL), run_name="__main__")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    from ldm.autoencoder.kl import AutoencoderKL

    config = AutoencoderConfig(channels=16, multipliers=(1, 1), blocks=1, middle_attention=False)
    native.save(tmp_path / "a", ModelConfig(autoencoder=config), {"autoencoder": AutoencoderKL(config)})
    return tmp_path / "a"


def test_directory_to_file_and_back_is_bit_identical(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(monkeypatch, str(source), str(tmp_path / "one.safetensors"))
    convert(monkeypatch, str(tmp_path / "one.safetensors"), str(tmp_path / "b"))
    before, after = native.read_part(source, "autoencoder"), native.read_part(tmp_path / "b", "autoencoder")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert native.read_config(tmp_path / "b") == native.read_config(source)


def test_half_precision_rounds_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(monkeypatch, str(source), str(tmp_path / "half"), "--precision", "fp16")
    before, after = native.read_part(source, "autoencoder"), native.read_part(tmp_path / "half", "autoencoder")
    assert all(torch.equal(before[key].half(), after[key]) for key in before)


def test_a_missing_model_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        convert(monkeypatch, str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
