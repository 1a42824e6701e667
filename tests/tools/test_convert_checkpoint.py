"""tools/convert_checkpoint.py: what goes in comes out, in any layout, as a directory, as a file, and halved."""

import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints.small_models import (
    SMALL,
    SMALL_3,
    SMALL_COSXL,
    SMALL_REFINER,
    SMALL_XL,
    random_states,
    same,
)  # tests/ is the root of the tests' packages
from safetensors.torch import load_file, save_file

from ldm.checkpoints import export, native
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_metadata
from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
Convert = Callable[..., None]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Convert:
    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        runpy.run_path(str(TOOL), run_name="__main__")

    return call


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    def call(path: Path) -> str:
        capsys.readouterr()
        tool = TOOL.with_name("inspect_checkpoint.py")
        monkeypatch.setattr(sys, "argv", [str(tool), str(path)])
        runpy.run_path(str(tool), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    from ldm.autoencoder.kl import AutoencoderKL

    config = AutoencoderConfig(channels=16, multipliers=(1, 1), blocks=1, middle_attention=False)
    native.save(tmp_path / "a", ModelConfig(autoencoder=config), {"autoencoder": AutoencoderKL(config)})
    return tmp_path / "a"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "sd.safetensors"
    export.write(path, SMALL, random_states(SMALL), "original")
    return path


def stored(path: Path) -> Mapping[str, torch.Tensor]:
    return open_checkpoint(path).tensors()


def test_directory_to_file_and_back_is_bit_identical(source: Path, tmp_path: Path, convert: Convert):
    convert(source, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "b")
    before, after = (
        dict(open_checkpoint(source).state("autoencoder")),
        dict(open_checkpoint(tmp_path / "b").state("autoencoder")),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert native.read_config(tmp_path / "b") == native.read_config(source)


def test_half_precision_rounds_once(source: Path, tmp_path: Path, convert: Convert):
    convert(source, tmp_path / "half", "--precision", "fp16")
    before, after = (
        dict(open_checkpoint(source).state("autoencoder")),
        dict(open_checkpoint(tmp_path / "half").state("autoencoder")),
    )
    assert all(torch.equal(before[key].half(), after[key]) for key in before)


def test_a_lora_in_half_precision_keeps_its_words(tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]):
    pairs = {
        "unet.conv_in.lora_A.weight": torch.randn(4, 36, generator=torch.Generator().manual_seed(0)),
        "unet.conv_in.lora_B.weight": torch.randn(32, 4, generator=torch.Generator().manual_seed(1)),
    }
    path, half = tmp_path / "lora.safetensors", tmp_path / "half.safetensors"
    save_file(pairs, path, {"ss_output_name": "mine"})
    convert(path, half, "--precision", "fp16")
    assert same(load_file(half), {name: value.half() for name, value in pairs.items()})
    assert read_metadata(half)["ss_output_name"] == "mine"
    words_too = load_file(half) | {"unet.conv_in.ids": torch.arange(3)}
    save_file(words_too, path, {"ss_output_name": "mine"})
    before = path.read_bytes()
    convert(path, half, "--precision", "bf16")
    assert {value.dtype for value in load_file(half).values()} == {torch.bfloat16, torch.int64}
    convert(path, half)
    assert half.read_bytes() == before
    for words in ((half, "--to", "diffusers"), (half, "--weights", "ema"), (tmp_path / "folder",)):
        with pytest.raises(SystemExit):
            convert(path, *words)
        assert "only the precision is changed" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_numbers_that_the_precision_cannot_hold_are_told_and_nothing_is_written(
    source: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
):
    large = {"unet.conv_in.lora_A.weight": torch.full((4, 36), 1e6), "unet.conv_in.lora_B.weight": torch.ones(32, 4)}
    save_file(large, tmp_path / "lora.safetensors")
    weights = load_file(source / "autoencoder.safetensors")
    save_file({name: value + 1e6 for name, value in weights.items()}, source / "autoencoder.safetensors")
    for given in (tmp_path / "lora.safetensors", source):
        with pytest.raises(SystemExit):
            convert(given, tmp_path / "out.safetensors", "--precision", "fp16")
        assert "too large for fp16" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
        convert(given, tmp_path / f"{given.name}-bf16.safetensors", "--precision", "bf16")


def test_weights_that_a_torch_file_stores_once_for_two_names(source: Path, tmp_path: Path, convert: Convert):
    tied = torch.randn(4, 4)
    lora = {"unet.conv_in.lora_A.weight": tied, "unet.conv_in.lora_B.weight": tied}
    torch.save(lora, tmp_path / "lora.pt")
    convert(tmp_path / "lora.pt", tmp_path / "lora.safetensors")
    assert same(load_file(tmp_path / "lora.safetensors"), lora)


def test_original_to_native_and_back_is_bit_identical(foreign: Path, tmp_path: Path, convert: Convert):
    convert(foreign, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "again.safetensors", "--to", "original")
    assert same(load_file(tmp_path / "again.safetensors"), load_file(foreign))
    assert open_checkpoint(tmp_path / "again.safetensors").config == SMALL


def test_diffusers_to_original_and_back_is_bit_identical(foreign: Path, tmp_path: Path, convert: Convert):
    convert(foreign, tmp_path / "d", "--to", "diffusers", "--precision", "fp16")
    convert(tmp_path / "d", tmp_path / "o.safetensors", "--to", "original")
    convert(tmp_path / "o.safetensors", tmp_path / "e", "--to", "diffusers")
    for file in (path for path in (tmp_path / "d").rglob("*") if path.is_file()):
        again = tmp_path / "e" / file.relative_to(tmp_path / "d")
        if file.suffix == ".safetensors":
            assert same(load_file(file), load_file(again))
        else:
            assert again.read_text() == file.read_text()


def test_raw_or_averaged_weights_by_choice(
    foreign: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
):
    tensors = load_file(foreign)
    raw = {name: value for name, value in tensors.items() if name.startswith("model.diffusion_model.")}
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in raw.items()}
    save_file(tensors | averages, tmp_path / "both.safetensors")
    with pytest.raises(SystemExit):
        convert(tmp_path / "both.safetensors", tmp_path / "out")
    assert "--weights ema" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for weights, shift in (("raw", 0), ("ema", 1)):
        convert(tmp_path / "both.safetensors", tmp_path / weights, "--weights", weights)
        unet = open_checkpoint(tmp_path / weights).state("unet")
        assert torch.equal(unet["conv_out.bias"], raw["model.diffusion_model.out.2.bias"] + shift)


def test_another_autoencoder_and_other_settings(
    foreign: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
):
    other = {key: value * 2 for key, value in random_states(SMALL)["autoencoder"].items()}
    native.save(tmp_path / "vae", ModelConfig(SMALL.autoencoder), {"autoencoder": other})
    convert(foreign, tmp_path / "out", "--vae", tmp_path / "vae", "--set", "parameterization=eps")
    made = open_checkpoint(tmp_path / "out")
    assert made.config.parameterization == "eps" and same(made.state("autoencoder"), other)
    with pytest.raises(SystemExit):
        convert(foreign, tmp_path / "out", "--set", "parameterization")
    assert "key=value" in capsys.readouterr().err


def test_what_a_file_says_of_its_law_is_kept_and_what_contradicts_it_is_not_written(
    foreign: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
):
    tensors = {name: value for name, value in load_file(foreign).items() if name.startswith(("model", "first", "cond"))}
    marked = tensors | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(marked, tmp_path / "marked.safetensors")
    for to, name in (("native", "n"), ("diffusers", "d"), ("original", "o.safetensors")):
        convert(tmp_path / "marked.safetensors", tmp_path / name, "--to", to)
        config = open_checkpoint(tmp_path / name).config
        assert config.parameterization == "v" and config.schedule == ScheduleConfig(zero_terminal_snr=True)
    save_file(marked, tmp_path / "torn.safetensors", {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(SystemExit):
        convert(tmp_path / "torn.safetensors", tmp_path / "out")
    said = capsys.readouterr().err
    assert "v_pred" in said and "modelspec.prediction_type=epsilon" in said and not (tmp_path / "out").exists()
    convert(tmp_path / "torn.safetensors", tmp_path / "out", "--set", "parameterization=v")
    assert open_checkpoint(tmp_path / "out").config.parameterization == "v"


@pytest.mark.parametrize(
    ("name", "to"), [("a.ckpt", "native"), ("a.pt", "diffusers"), ("a.bin", "original"), ("a.safetensors", "diffusers")]
)
def test_no_directory_is_named_like_a_file(
    name: str, to: str, foreign: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        convert(foreign, tmp_path / name, "--to", to)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "directory" in said
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("words", [(), ("--to", "diffusers")])
def test_a_missing_model_is_one_sentence(
    tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
):
    with pytest.raises(SystemExit) as end:
        convert(tmp_path / "nowhere", tmp_path / "out", *words)
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


NEWER = {"XL": SMALL_XL, "its refiner": SMALL_REFINER, "CosXL": SMALL_COSXL, "3": SMALL_3}


@pytest.mark.parametrize("name", NEWER)
def test_the_newer_kinds_go_there_and_back(name: str, tmp_path: Path, convert: Convert, inspect: Callable[[Path], str]):
    """To our layout, a diffusers directory, the original file and ours again: the same bits, settings and words."""
    config = NEWER[name]
    export.write(tmp_path / "a.safetensors", config, random_states(config), "original")
    convert(tmp_path / "a.safetensors", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "d", "--to", "diffusers")
    convert(tmp_path / "d", tmp_path / "b.safetensors", "--to", "original")
    convert(tmp_path / "b.safetensors", tmp_path / "again")
    before, after = stored(tmp_path / "native"), stored(tmp_path / "again")
    assert same(before, after)
    found = open_checkpoint(tmp_path / "again").config
    assert (found.schedule, found.parameterization, found.encoder) == (
        config.schedule,
        config.parameterization,
        config.encoder,
    )
    for path in ("a.safetensors", "d", "native"):
        said = inspect(tmp_path / path)
        assert ("transformer of our own" if name == "3" else "U-Net and autoencoder and text tower") in said
        assert ("schedule.kind" in said and "edm" in said) == (name == "CosXL") or name == "3"
        assert "foreign" not in said and "passed over" not in said


@pytest.mark.parametrize("channels", [9, 5])
def test_inpainting_and_depth_models_go_there_and_back(channels: int, tmp_path: Path, convert: Convert):
    """To our layout, a diffusers directory and the original file again: the same bits, all channels."""
    unet = replace(SMALL.unet, in_channels=channels)  # type: ignore[type-var]
    config = replace(SMALL, unet=unet, parameterization="eps")
    export.write(tmp_path / "a.safetensors", config, random_states(config), "original")
    convert(tmp_path / "a.safetensors", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "d", "--to", "diffusers")
    convert(tmp_path / "native", tmp_path / "b.safetensors", "--to", "original")
    assert same(load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "a.safetensors"))
    theirs = open_checkpoint(tmp_path / "d")
    assert theirs.config.unet is not None and theirs.config.unet.in_channels == channels
    ours = open_checkpoint(tmp_path / "native").tensors()
    found = theirs.tensors()
    first = [name for name in ours if name.startswith("unet.")]
    assert first and all(torch.equal(ours[name], found[name]) for name in first)
