"""tools/inspect_checkpoint.py says what a file is, and what it is not."""

import hashlib
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints.small_models import SMALL, random_states  # tests/ is the root of the tests' packages
from safetensors.torch import load_file, save_file

from ldm.checkpoints import export, native
from ldm.checkpoints.opening import open_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"
Inspect = Callable[[Path], str]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def call(path: Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(path)])
        runpy.run_path(str(TOOL), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("foreign") / "sd.safetensors"
    export.write(path, SMALL, random_states(SMALL), "original")
    return load_file(path)


def test_a_strangers_file(tensors: dict[str, torch.Tensor], inspect: Inspect, tmp_path: Path):
    path = tmp_path / "sd.ckpt"
    half = {name: value.half() if "diffusion_model" in name else value for name, value in tensors.items()}
    torch.save({"state_dict": half | {"mystery.weight": torch.ones(1)}, "global_step": 7}, path)
    said = inspect(path)
    states = random_states(SMALL)
    counts = {name: sum(value.numel() for value in state.values()) for name, state in states.items()}
    assert "U-Net and autoencoder and text tower, original single file" in said
    assert f"{counts['unet']:,} parameters in  {len(states['unet'])} tensors, float16" in said
    assert f"{counts['text']:,} parameters" in said
    assert 'parameterization = "v" *' in said and "unet.channels = 64\n" in said
    assert "global_step = 7" in said and "mystery.weight" in said
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said


def test_a_strangers_words_do_not_steer_the_terminal(
    tensors: dict[str, torch.Tensor], inspect: Inspect, tmp_path: Path
):
    save_file(tensors, tmp_path / "sd.safetensors", {"title\x1b]0;": "\x1b[2Jgone\nparameterization = eps"})
    said = inspect(tmp_path / "sd.safetensors")
    assert "\x1b" not in said and "title ]0; =  [2Jgone parameterization = eps\n" in said


def test_a_file_that_is_not_whole(
    tensors: dict[str, torch.Tensor], inspect: Inspect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_file({k: v for k, v in tensors.items() if not k.endswith("out.2.bias")}, tmp_path / "sd.safetensors")
    with pytest.raises(SystemExit) as end:
        inspect(tmp_path / "sd.safetensors")
    said = capsys.readouterr()
    assert end.value.code == 1 and "1 missing (model.diffusion_model.out.2.bias)" in said.err
    assert "unet         not whole" in said.out and "parameters in" in said.out


def test_our_own_directory_with_its_training(inspect: Inspect, tmp_path: Path):
    native.save(tmp_path / "m", SMALL, random_states(SMALL))
    (tmp_path / "m" / "config.json").write_text(json.dumps({"loop": {"steps": 1234}, "output": "runs/x"}))
    said = inspect(tmp_path / "m")
    assert "native directory" in said and "loop.steps = 1234" in said and " *\n" not in said
    assert native.fingerprint(open_checkpoint(tmp_path / "m").tensors()) in said


@pytest.mark.parametrize("channels", [9, 5])
def test_inpainting_and_depth_models(channels: int, inspect: Inspect, tmp_path: Path):
    config = replace(SMALL, unet=replace(SMALL.unet, in_channels=channels), parameterization="eps")  # type: ignore[type-var]
    export.write(tmp_path / "a.safetensors", config, random_states(config), "original")
    assert f"unet.in_channels = {channels}" in inspect(tmp_path / "a.safetensors")
