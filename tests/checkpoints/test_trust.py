"""Files by people who mean harm: each ends in one sentence, in little memory and time, and nothing in it is run."""

from __future__ import annotations

from ldm.script import run

import importlib.util
import json
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_tensors
from ldm.config import DiffusionTraining, load
from ldm.errors import UserError

from . import hostile_files as hostile
from .hostile_files import CORPUS, Malice

MEMORY = 600 << 20  # bytes that reading a small file may take, of addresses; the bombs below ask for more
SECONDS = 60


@pytest.fixture
def bounded() -> Iterator[None]:
    """In the test, memory ends soon (MemoryError), and time does (the alarm)."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def alarm(*_: object) -> None:
        raise TimeoutError(f"not read within {SECONDS} s")

    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)


def read_all(path: Path) -> None:
    for _ in read_tensors(path).values():
        pass


@pytest.mark.parametrize(("write", "said"), CORPUS, ids=[write.__name__ for write, _ in CORPUS])
def test_each_ends_in_a_sentence(
    write: Callable[[Path], None], said: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "model.ckpt"
    write(path)
    request.getfixturevalue("bounded")
    with pytest.raises(UserError) as error:
        read_all(path)
    sentence = str(error.value)
    assert said in sentence and str(path) in sentence
    assert sentence.isprintable() and len(sentence) < 600
    with pytest.raises(UserError):
        open_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_malice_beside_tensors_is_inert(tmp_path: Path) -> None:
    """The original checkpoints name foreign classes beside their tensors; what these would do is not done."""
    torch.save({"state_dict": {"x": torch.ones(3)}, "callbacks": Malice(tmp_path / "executed")}, tmp_path / "a.ckpt")
    assert torch.equal(read_tensors(tmp_path / "a.ckpt")["x"], torch.ones(3))
    assert not (tmp_path / "executed").exists()


def test_the_corpus_is_dangerous(tmp_path: Path) -> None:
    """What the tests above prove is worth something only if the file does run where it is unpickled."""
    torch.save(Malice(tmp_path / "executed"), tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists()


# ---------------------------------------------------------------- settings

YAML = {
    "aliases": ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "\n".join(f"{y}: &{y} [{','.join(['*' + x] * 9)}]"
                for x, y in zip("abcdefgh", "bcdefghi", strict=True)), "alias"),
    "tags": ("output: !!python/object/apply:os.system ['touch executed']\n", "tag:yaml.org,2002:python/object"),
    "depth": ("output: " + "[" * 100_000, "nest"),  # by our rule, or by that of newer parsers
    "length": ("# " + "x" * 2_000_000, "too long"),
    "interpolation": ("output: ${oc.env:HOME}", "interpolation"),
    "twice": ("output: a\noutput: b\n", "duplicate key"),
    "date": ("output: !!timestamp 2001-99-99", "month must be"),
    "number": ("output: " + "9" * 10_000, "digits"),
    "unknown": ("? " + "x" * 100_000 + "\n: 1", "unknown setting"),
    "binary": ("output: !!binary \xff", "ascii"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    load(DiffusionTraining)  # imports what it needs
    words, said = YAML[name]
    path = tmp_path / "run.yaml"
    path.write_text(words, encoding="utf-8")
    request.getfixturevalue("bounded")
    with pytest.raises(UserError) as error:
        load(DiffusionTraining, path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


PIECES = (
    *("loop: {steps: 3}", "data: 3", "data: null", "data: {where: {1: a}}", "model: {multipliers: {0: 1}}"),
    *("sample: {prompts: {0: x}}", "1: 2", "null: 1", "${x}", "???", "1e999", "0x" + "f" * 5000),
    *("&a ", "*a", "<<: ", "!!set ", "!!float ", "!!binary a", "!!python/name:os.system "),
    *("{", "}", "[", "]", ":", "- ", "? ", "\n", "  ", "'", '"', "#", "|", "%", "---"),
)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8))
def test_any_yaml_is_settings_or_a_sentence(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes("".join(words).encode("utf-8", "surrogatepass"))
    try:
        load(DiffusionTraining, path)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1000


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_model_json_is_a_model_or_a_sentence(
    data: st.DataObject, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One field of the settings is anything: the model loads, or UserError."""
    plain = json.loads((tiny_checkpoint / "model.json").read_text())
    part = data.draw(st.sampled_from(["autoencoder", "text", "unet", "schedule"]))
    field = data.draw(st.sampled_from(sorted(plain[part])))
    likely = st.sampled_from([[None], [[1]], 0, -1, 1, 3, 10**6, 2**40, 0.5, [], [0], [1, 2, 3], [-1], "", "v", True])
    value = data.draw(likely | VALUES)
    path = tmp_path_factory.getbasetemp() / "any"
    if not path.exists():
        shutil.copytree(tiny_checkpoint, path)
    (path / "model.json").write_text(json.dumps({**plain, part: {**plain[part], field: value}}))
    try:
        ldm.load(path, device="cpu")
    except UserError as error:
        assert str(error).isprintable()


def test_weights_of_another_kind_of_number(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    state = load_file(tmp_path / "model" / "unet.safetensors")
    state["conv_in.weight"] = state["conv_in.weight"].long()
    save_file(state, tmp_path / "model" / "unet.safetensors")
    with pytest.raises(UserError, match=r"conv_in\.weight"):
        ldm.load(tmp_path / "model", device="cpu")


def test_models_too_large_for_any_machine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Their settings are read before their weights are compared, and must not be built at any price."""
    plain = json.loads((tiny_checkpoint / "model.json").read_text())
    changes = (
        {"unet": {**plain["unet"], "blocks": 10**9}},
        {"unet": {**plain["unet"], "transformer_depth": 10**9}},
        {"text": {**plain["text"], "layers": 10**9}},
        {"text": {**plain["text"], "context_length": 10**6}},
        {"autoencoder": {**plain["autoencoder"], "multipliers": [1] * 5000}},
        {"schedule": {**plain["schedule"], "steps": 10**12}},
        {"image_size": 10**9},
        {"drawing": {"steps": 10**9}},
    )
    for change in changes:
        (tmp_path / "model.json").write_text(json.dumps(plain | change))
        with pytest.raises(UserError, match=r"describes a model with|model\.json: (image_size|drawing\.steps) must be"):
            native.read_config(tmp_path)


# ---------------------------------------------------------------- through the script


@pytest.mark.parametrize(
    "write",
    [hostile.system_as_the_whole, hostile.compressed_bomb, hostile.long_header, hostile.not_a_number, hostile.pipe],
)
def test_the_script_says_it_and_ends(
    write: Callable[[Path], None],
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("txt2img", Path(__file__).parents[2] / "scripts" / "txt2img.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "model.safetensors"
    if write is hostile.not_a_number:
        parts = {name: load_file(tiny_checkpoint / f"{name}.safetensors") for name in ("autoencoder", "text", "unet")}
        parts["unet"]["conv_in.weight"][0, 0, 0, 0] = torch.nan
        native.save(path, native.read_config(tiny_checkpoint), parts)
    else:
        write(path)
    words = ["txt2img.py", "--prompt", "a cat", "--steps", "1", "--model", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        run(script.main)
    out, err = capsys.readouterr()
    assert end.value.code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert str(path) in err and (write is not hostile.not_a_number or "unet.conv_in.weight" in err)
    assert not (tmp_path / "executed").exists()
