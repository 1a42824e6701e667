"""scripts/txt2img.py as it is used: what it writes and says, and how it ends when something is wrong."""

from __future__ import annotations

from ldm.script import run

import importlib.util
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import image_io
from ldm.checkpoints import native
from ldm.config import AutoencoderConfig, EncoderConfig, ModelConfig, UNetConfig
from ldm.find import SHIPPED
from ldm.unet import UNet

SCRIPT = Path(__file__).parents[2] / "scripts" / "txt2img.py"


class Cli:
    """The script, run in this process: (exit code, standard output, standard error)."""

    def __init__(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.script, self.monkeypatch, self.capsys = script, monkeypatch, capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["txt2img.py", *map(str, words)])
        self.capsys.readouterr()
        code = 0
        try:
            run(self.script.main)
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def refused(self, *words: object) -> str:
        """The one sentence that it ends with."""
        code, out, err = self(*words)
        assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
        return err


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("txt2img", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cli(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(script, monkeypatch, capsys)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- what it writes

NO_NETWORK = """
import runpy, socket, sys
def refuse(*_, **__):
    raise AssertionError("the network was touched")
class Refused(socket.socket):
    __init__ = connect = connect_ex = refuse
socket.socket = Refused
socket.create_connection = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_main_job_in_a_fresh_process_without_network(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The README's command, on the model that ships (on the tiny one in a checkout that has none)."""
    model = [] if (SHIPPED["icons"] / "model.json").exists() else ["--model", str(tiny_checkpoint)]
    words = ["--prompt", "a red heart", "--cfg", "7.5", *model]
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "outputs/00000.png  seed 0\n", "")
    first = tmp_path / "outputs" / "00000.png"
    assert names(first.parent) == ["00000.png"] and pixels(first).std() > 1
    code, _, _ = cli("--reproduce", first, "--out", tmp_path)  # in another process than the one that made it
    assert code == 0 and np.array_equal(pixels(tmp_path / "00000.png"), pixels(first))


def test_help(cli: Cli) -> None:
    code, out, err = cli("--help")
    assert (code, err) == (0, "") and "--reproduce" in out


def test_order_numbers_and_settings(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = ("--model", tiny_checkpoint, "--out", tmp_path / "out", "--steps", 3, "--device", "cpu")
    what = ("--prompt", "a cat", "--prompt", "a red heart", "--negative", "blue", "--n", 3, "--seed", 7)
    how = ("--sampler", "ddpm", "--spacing", "linspace", "--cfg", 2, "--cfg-interval", 0.1, 9)
    code, out, err = cli(*what, *how, "--batch-size", 4, "--grid", *run)
    lines = [f"{tmp_path}/out/{i:05d}.png  seed {7 + i}" for i in range(6)]
    assert (code, err) == (0, "") and out.splitlines() == [*lines, f"{tmp_path}/out/grid-00000.png"]
    records = [image_io.read_metadata(tmp_path / "out" / f"{i:05d}.png") for i in range(6)]
    assert [record["prompt"] for record in records] == ["a cat"] * 3 + ["a red heart"] * 3
    assert [record["batch"] for record in records][3:5] == [{"size": 4, "index": 3}, {"size": 2, "index": 0}]
    expected = {"sampler": "ddpm", "spacing": "linspace", "cfg": 2.0, "cfg_interval": [0.1, 9.0], "steps": 3}
    assert records[4].items() >= {**expected, "negative": "blue", "seed": 11, "width": 32, "height": 32}.items()

    for index in (1, 3, 5):  # both batches, first and later rows
        code, out, err = cli("--reproduce", tmp_path / "out" / f"{index:05d}.png", "--out", tmp_path / "again")
        assert (code, err) == (0, "")
        made = tmp_path / "again" / out.split("  ")[0].rsplit("/", 1)[1]
        assert np.array_equal(pixels(made), pixels(tmp_path / "out" / f"{index:05d}.png"))
        assert image_io.read_metadata(made)["seed"] == 7 + index

    sentence = cli.refused("--reproduce", tmp_path / "out" / "00000.png", "--cfg", 2)
    assert "--cfg does not go with --reproduce" in sentence

    labelled = ("--prompt", "a cat", "--prompt", "ein Würfel 🎲", "--grid-labels", "--out", tmp_path / "labels")
    code, out, _ = cli(*labelled, "--steps", 1, "--model", tiny_checkpoint, "--device", "cpu")
    sheet = pixels(tmp_path / "labels" / "grid-00000.png")
    assert code == 0 and out.count("\n") == 3 and sheet.shape[1] == 2 * 96 + 2 and sheet[32:].min() == 0

    before = (tmp_path / "out" / "00000.png").read_bytes()
    lines_file = tmp_path / "prompts.jsonl"
    lines_file.write_text('{"prompt": "a cat", "seed": 40}\n{"prompt": "a red heart"}\n', encoding="utf-8")
    code, out, err = cli("--from-file", lines_file, *run, "--cfg", 1, "--width", 40)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{tmp_path}/out/00006.png  seed 40", f"{tmp_path}/out/00007.png  seed 1"]
    assert pixels(tmp_path / "out" / "00007.png").shape == (32, 40, 3)
    assert (tmp_path / "out" / "00000.png").read_bytes() == before


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A model of two classes, without captions, in pixels, random weights."""
    folder, unet = tmp_path / "classes", UNetConfig(3, 3, 32, (1,), 1, (), context_width=0, classes=2)
    config = ModelConfig(
        autoencoder=AutoencoderConfig(kind="identity", scale=(1.0,)),
        unet=unet,
        encoder=EncoderConfig(labels=("cat", "dog")),
        image_size=16,
    )
    torch.manual_seed(0)
    network = UNet(config.unet or unet)
    for parameter in network.parameters():
        if not bool(parameter.detach().any()):
            torch.nn.init.normal_(parameter, std=0.1)
    native.save(folder, config, {"unet": network})
    return folder


def test_classes_are_drawn_by_their_labels(cli: Cli, classes: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = ("--model", classes, "--steps", 2, "--device", "cpu", "--out", tmp_path / "out")
    code, out, err = cli("--label", "cat", "--label", "dog", "--n", 2, "--grid-labels", *run)
    assert (code, err) == (0, "") and out.count("\n") == 5
    records = [image_io.read_metadata(tmp_path / "out" / f"{i:05d}.png") for i in range(4)]
    assert [(record["label"], record["prompt"], record["seed"]) for record in records] == [
        *(("cat", "", i) for i in (0, 1)),
        *(("dog", "", i) for i in (2, 3)),
    ]
    with Image.open(tmp_path / "out" / "00003.png") as picture:
        assert "Label: dog" in picture.info["parameters"]
    assert image_io.read_metadata(tmp_path / "out" / "grid-00000.png")["labels"] == ["cat", "cat", "dog", "dog"]
    assert pixels(tmp_path / "out" / "grid-00000.png")[16:].min() == 0  # something is written below them

    code, out, err = cli("--reproduce", tmp_path / "out" / "00003.png", "--out", tmp_path / "again", "--device", "cpu")
    assert (code, err) == (0, "")
    assert np.array_equal(pixels(tmp_path / "again" / "00000.png"), pixels(tmp_path / "out" / "00003.png"))

    rows = tmp_path / "p.csv"
    rows.write_text("label,seed\ndog,3\n,0\n")
    code, _, err = cli("--from-file", rows, "--label", "cat", "--batch-size", 4, *run)
    assert (code, err) == (0, "")
    for drawn, before in (("00004", "00003"), ("00005", "00000")):
        assert (
            np.abs(pixels(tmp_path / "out" / f"{drawn}.png") - 1.0 * pixels(tmp_path / "out" / f"{before}.png")).max()
            <= 1
        )

    code, _, err = cli("--prompt", "a cat", *run)
    assert code == 0 and "takes no text, so nothing comes of 'a cat'" in err and "no label was given" in err
    assert "there is no label 'cow'; this model knows cat, dog" in cli.refused("--label", "cat", "--label", "cow", *run)
    assert "one --label stands in" in cli.refused("--from-file", rows, "--label", "cat", "--label", "dog", *run)
    assert "say what to draw" in cli.refused(*run)
    assert "this model knows no labels" in cli.refused("--label", "cat", "--model", tiny_checkpoint, *run[2:])
    assert "--label does not go with --reproduce" in cli.refused(
        "--reproduce", tmp_path / "out" / "00003.png", "--label", "cat"
    )


def test_a_long_prompt_and_another_model(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once each on standard error, on a terminal beside the bar; the picture is drawn."""
    prompt = "a b c d e f g h i j k l m n o p"
    run = ("--out", tmp_path, "--device", "cpu", "--prompt-syntax", "plain")
    code, out, err = cli(
        "--prompt", prompt, "--n", 3, "--batch-size", 1, "--steps", 2, "--model", tiny_checkpoint, *run
    )
    assert code == 0 and out.count("\n") == 3
    assert err.count("\n") == 1 and err.startswith("warning: ") and "dropped: o p" in err
    what = ("--prompt", "a zebra", "--prompt", "a cat", "--negative", "a zebra, a giraffe", "--n", 2, "--steps", 1)
    code, _, err = cli(*what, "--batch-size", 1, "--model", tiny_checkpoint, *run)
    assert code == 0 and err.count("\n") == 1 and "does not know 'zebra', 'giraffe'" in err

    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    settings = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps({**settings, "parameterization": "eps"}))
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    run = run[:-2]
    code, out, err = cli("--reproduce", tmp_path / "00000.png", "--model", other, *run)
    assert code == 0 and "the model differs" in err and "2/2" in err


def test_weights_chunks_and_joined_prompts(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On for the command, kept in the picture, and off by a word."""
    prompt = "a (cat:1.4) b c d e f g h i j k l m n o p AND a dog :0.5"
    run = ("--steps", 2, "--model", tiny_checkpoint, "--device", "cpu")
    code, _, err = cli("--prompt", prompt, *run, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert image_io.read_metadata(tmp_path / "a" / "00000.png")["prompt_syntax"] == "weighted"
    code, _, err = cli("--reproduce", tmp_path / "a" / "00000.png", *run[2:], "--out", tmp_path / "b")
    first = pixels(tmp_path / "a" / "00000.png")
    assert (code, err) == (0, "") and (first == pixels(tmp_path / "b" / "00000.png")).all()
    code, _, err = cli("--prompt", prompt, "--prompt-syntax", "plain", *run, "--out", tmp_path / "c")
    assert code == 0 and "dropped" in err and (first != pixels(tmp_path / "c" / "00000.png")).any()
    code, _, err = cli("--prompt", "a [cat:dog:0.5]", *run, "--out", tmp_path / "c")
    assert code == 0 and err.startswith("warning: '[cat:dog:0.5]' does not change")


def test_little_memory(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Asked for, it is kept in the picture; where it is not, and the memory does not suffice, it is a line."""
    run = ("--prompt", "a cat", "--n", 2, "--steps", 2, "--model", tiny_checkpoint, "--device", "cpu")
    code, _, err = cli(*run, "--low-memory", "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert image_io.read_metadata(tmp_path / "a" / "00001.png")["made_on"]["low_memory"] is True
    code, _, err = cli("--reproduce", tmp_path / "a" / "00001.png", *run[6:], "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    first = pixels(tmp_path / "a" / "00001.png")
    assert (first == pixels(tmp_path / "b" / "00000.png")).all()

    short = f"""
import sys, torch
sys.argv = {["txt2img.py", *map(str, run), "--out", str(tmp_path / "c")]!r}
from ldm.unet import UNet
forward = UNet.forward
def once(self, *words):
    UNet.forward = forward
    raise torch.OutOfMemoryError("CUDA out of memory")
UNet.forward = once
import runpy
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", short], capture_output=True, text=True)
    sentence = "warning: the device's memory did not suffice, so the network is run on 2 at once, where it was 4\n"
    assert (done.returncode, done.stderr) == (0, sentence)
    assert np.abs(pixels(tmp_path / "c" / "00001.png").astype(int) - first).max() <= 1


def test_what_the_model_was_given_beside_its_name_comes_back(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """--set and --vae stand in the picture, and --reproduce goes by them unless it is given others."""
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    state = load_file(tmp_path / "other" / "autoencoder.safetensors")
    save_file({name: 1.1 * value for name, value in state.items()}, tmp_path / "other" / "autoencoder.safetensors")
    run = ("--prompt", "a cat", "--steps", 2, "--device", "cpu", "--model", tiny_checkpoint)
    given = ("--set", "parameterization=eps", "--set", "image_size=16", "--vae", tmp_path / "other")
    assert cli(*run, "--out", tmp_path / "plain")[0] == 0
    assert cli(*run, *given, "--out", tmp_path / "first")[0] == 0
    first = tmp_path / "first" / "00000.png"
    assert first.read_bytes() != (tmp_path / "plain" / "00000.png").read_bytes()
    written = image_io.read_metadata(first)["model"]
    assert written["vae"] == str(tmp_path / "other")
    assert written["set"] == {"parameterization": "eps", "image_size": 16}
    assert cli("--reproduce", first, "--out", tmp_path / "again")[::2] == (0, "")
    assert (tmp_path / "again" / "00000.png").read_bytes() == first.read_bytes()

    code, _, err = cli("--reproduce", first, "--set", "parameterization=v", "--out", tmp_path / "again")
    assert code == 0 and "the model differs" in err
    code, _, err = cli("--reproduce", first, "--vae", tiny_checkpoint, "--out", tmp_path / "again")
    assert code == 0 and "the model differs" in err


@pytest.mark.parametrize("option", ["model", "vae", "guide-model"])
def test_a_strangers_picture_fetches_nothing(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    assert cli("--prompt", "a cat", "--steps", 1, "--model", tiny_checkpoint, "--out", tmp_path / "out")[0] == 0
    first = tmp_path / "out" / "00000.png"
    record = image_io.read_metadata(first)
    place = {"model": "name", "vae": "vae"}.get(option)
    if place:
        record["model"][place] = "hf:nobody/knows"
    else:
        record["guide_model"] = "hf:nobody/knows"
    image_io.save_png(torch.zeros(3, 32, 32), first, record)
    fetched: list[str] = []
    monkeypatch.setattr("ldm.checkpoints.hub.fetch", lambda name: fetched.append(name) or tiny_checkpoint)
    sentence = cli.refused("--reproduce", first, "--out", tmp_path / "again")
    assert f"say --{option} hf:nobody/knows to fetch it" in sentence and fetched == []
    assert cli("--reproduce", first, "--out", tmp_path / "again", f"--{option}", "hf:nobody/knows")[0] == 0
    assert set(fetched) == {"nobody/knows"}
    if option != "guide-model":
        assert "does not go with" in cli.refused("--reproduce", first, "--guide-model", tiny_checkpoint)


# ---------------------------------------------------------------- what it refuses

WITHOUT_TORCH = """
import json, runpy, sys
sys.modules["torch"] = None  # importing it fails
for words in json.loads(sys.argv[1]):
    sys.argv = ["txt2img.py", *words]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as end:
        print("exit", end.code, flush=True)
""".replace("SCRIPT", repr(str(SCRIPT)))


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "latin.txt").write_text("ein Würfel", encoding="latin-1")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": \n')
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    cat = ["--prompt", "a cat"]
    expected = {
        "did you mean 'ddim'": [*cat, "--sampler", "dim"],
        "0 steps": [*cat, "--steps", "0"],
        "--steps is 'many'; it must be a whole number": [*cat, "--steps", "many"],
        "unknown option '--sede'; did you mean '--seed'?": [*cat, "--sede", "3"],
        "one of these": [],
        "'bad   byte' is not UTF-8": ["--prompt", "bad \udcff byte"],
        "the width is 400000 pixels": [*cat, "--width", "400000"],
        "at least 1": [*cat, "--n", "0"],
        "a batch of 0": [*cat, "--batch-size", "0"],
        "there is no model": [*cat, "--model", str(tmp_path / "missing")],
        "preparing the output folder": [*cat, "--model", str(tmp_path), "--out", str(tmp_path / "file" / "out")],
        "preparing the output folder /proc;": [*cat, "--model", str(tmp_path), "--out", "/proc"],
        "not UTF-8": ["--from-file", str(tmp_path / "latin.txt")],
        "line 2 is not valid JSON": ["--from-file", str(tmp_path / "bad.jsonl")],
        "carries no settings": ["--reproduce", str(tmp_path / "plain.png")],
        "there is no picture": ["--reproduce", str(tmp_path / "missing.png")],
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(list(expected.values()))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "exit 1\n" * len(expected)
    sentences = done.stderr.splitlines()
    assert len(sentences) == len(expected) and all(line.startswith("error: ") for line in sentences)
    for words, line in zip(expected, sentences, strict=True):
        assert words in line
    assert names(tmp_path) == ["bad.jsonl", "file", "latin.txt", "plain.png"]


def test_models_that_cannot_be_used(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ("--prompt", "a cat", "--steps", 2, "--device", "cpu", "--out", out, "--model")
    unet = tiny_checkpoint / "unet.safetensors"

    def copy(name: str) -> Path:
        shutil.copytree(tiny_checkpoint, tmp_path / name)
        return tmp_path / name

    assert "multiples of 4" in cli.refused(*run, tiny_checkpoint, "--width", 34)
    assert "not available here" in cli.refused(*run, tiny_checkpoint, "--attention", "xformers")

    torn = copy("torn")
    (torn / "unet.safetensors").write_bytes(unet.read_bytes()[: unet.stat().st_size // 2])
    assert "truncated or damaged" in cli.refused(*run, torn)

    wider = copy("wider")
    settings = json.loads((wider / "model.json").read_text())
    settings["unet"]["channels"] = 64
    (wider / "model.json").write_text(json.dumps(settings))
    assert "another architecture" in cli.refused(*run, wider)

    class Malice:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"state_dict": Malice()}, tmp_path / "evil.ckpt")
    assert "nothing in it was run" in cli.refused(*run, tmp_path / "evil.ckpt")
    evil = copy("evil")
    (evil / "unet.safetensors").write_bytes(pickle.dumps(Malice()))
    assert "pickle" in cli.refused(*run, evil)
    assert not (tmp_path / "executed").exists()

    for part, key in (("autoencoder", "decoder.conv_out.weight"), ("unet", "conv_in.weight")):
        spoilt = copy(f"spoilt {part}")
        state = load_file(spoilt / f"{part}.safetensors")
        state[key][0, 0, 0, 0] = torch.nan
        save_file(state, spoilt / f"{part}.safetensors")
        assert "not finite" in cli.refused(*run, spoilt)
    assert names(out) == []


def test_a_full_disk(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # less than a picture takes, more than the messages
    try:
        sentence = cli.refused("--prompt", "a cat", "--steps", 1, "--model", tiny_checkpoint, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "limit was reached while writing" in sentence and names(tmp_path) == []


@pytest.mark.slow
def test_two_at_once_in_one_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ["--prompt", "a cat", "--n", "4", "--batch-size", "1", "--steps", "2", "--model", str(tiny_checkpoint)]
    command = [sys.executable, str(SCRIPT), *words, "--grid", "--out", str(tmp_path), "--device", "cpu", "--seed"]
    both = [subprocess.Popen([*command, seed], stdout=subprocess.PIPE, text=True) for seed in ("0", "10")]
    said = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    told = [{Path(word).name for word in words if word.endswith(".png")} for words in said]
    assert [len(each) for each in told] == [5, 5] and not told[0] & told[1]
    assert names(tmp_path) == sorted(told[0] | told[1])
    for first, each in zip((0, 10), told, strict=True):  # each kept its own, in its order
        pictures = sorted(name for name in each if not name.startswith("grid"))
        seeds = [image_io.read_metadata(tmp_path / name)["seed"] for name in pictures]
        assert seeds == [first, first + 1, first + 2, first + 3]
        assert f"grid-{pictures[0]}" in each


def heed_interrupts() -> None:
    """Where the tests were started in the background, a shell has told them, and so their children, to ignore these."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_the_middle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What is done stays, whole; nothing else is left; the exit code is the shell's for an interrupt."""
    words = ["--prompt", "a cat", "--n", "1000", "--batch-size", "1", "--steps", "20", "--model", str(tiny_checkpoint)]
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *words, "--out", str(tmp_path), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stdout and process.stderr
        said = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        said += process.stdout.readlines()
        err = process.stderr.read()
    assert process.returncode == 130
    assert err.strip().count("\n") == 0 and "interrupted" in err
    assert 2 <= len(said) <= len(names(tmp_path)) <= len(said) + 1 < 1000  # one may be written and not yet told
    for name in names(tmp_path):
        assert name.endswith(".png") and pixels(tmp_path / name).shape == (32, 32, 3)


def test_a_model_picks_how_it_is_drawn_and_options_go_before(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The record has what was done, and makes the picture again whatever the model says by then."""
    model, out = tmp_path / "four", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, model)
    plain = json.loads((model / "model.json").read_text())
    plain["drawing"] = {"cfg": 1.0, "steps": 2, "sampler": "lcm", "spacing": "lcm"}
    (model / "model.json").write_text(json.dumps(plain))
    names = ("cfg", "steps", "sampler", "spacing")
    said = {"0": (1.0, 2, "lcm", "lcm"), "1": (3.0, 2, "euler", "lcm")}
    for number, words in (("0", ["--negative", "blurry"]), ("1", ["--cfg", "3", "--sampler", "euler"])):
        code, _, err = cli("--model", model, "--prompt", "a cat", "--out", out, *words)
        assert code == 0 and ("no effect of the negative prompt" in err) == (number == "0")
        record = image_io.read_metadata(out / f"{number.zfill(5)}.png")
        assert tuple(record[name] for name in names) == said[number]
    plain["drawing"]["steps"] = 5
    (model / "model.json").write_text(json.dumps(plain))
    code, _, err = cli("--reproduce", out / "00000.png", "--out", out)
    assert code == 0 and "the model differs" not in err
    assert (pixels(out / "00002.png") == pixels(out / "00000.png")).all()


def test_the_lora_that_ships_draws_in_four_evaluations(cli: Cli, tmp_path: Path) -> None:
    heart = ("--prompt", "a red heart, noto emoji", "--out", tmp_path)
    code, _, err = cli(*heart, "--lora", "four", "--device", "cpu")
    assert code == 0 and "made for another model" not in err and "with four pictures are drawn at cfg 1" in err, err
    made = image_io.read_metadata(tmp_path / "00000.png")
    assert (made["steps"], made["cfg"]) == (4, 1.0)
    assert [(one["path"], one["scale"]) for one in made["adapters"]] == [("four", 1.0)]
    assert pixels(tmp_path / "00000.png")[64, 64].tolist()[0] > 150 > pixels(tmp_path / "00000.png")[64, 64].tolist()[2]
    assert cli("--reproduce", tmp_path / "00000.png", "--out", tmp_path / "again")[0] == 0
    assert np.array_equal(pixels(tmp_path / "00000.png"), pixels(tmp_path / "again" / "00000.png"))
    assert "four" in cli.refused(*heart, "--lora", "five")
    assert "say --lora four" in cli.refused(*heart, "--model", "four")
