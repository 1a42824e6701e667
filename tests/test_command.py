"""The installed command: every script and tool from any folder, in a checkout and in an installation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ldm
from ldm import __main__ as command
from ldm.config import DiffusionTraining, load
from ldm.errors import UserError
from ldm.home import HOME, find_recipe, programs
from ldm.judge.pictures import read_concepts
from ldm.options import where_of

ROOT = Path(__file__).parents[1]
VERSION = (
    rf"ldm {ldm.__version__}, torch {re.escape(torch.__version__)}, Python [\d.]+, device \S+.*; imported from (.*)\n"
)


def run(*words: object, folder: Path, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m ldm` somewhere else, with the package of another place."""
    return subprocess.run(
        [sys.executable, "-m", "ldm", *map(str, words)],
        cwd=folder,
        env={"PYTHONPATH": str(package), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_each_script_and_tool_is_a_command() -> None:
    told = command.about()
    for path in programs():
        name = path.stem.replace("_", "-")
        assert re.search(rf"^  {name} +\S", told, re.MULTILINE), name
        assert command.find(name) == command.find(path.stem) == path
    assert {"txt2img", "train_diffusion", "evaluate", "make_shards"} <= {path.stem for path in programs()}


@pytest.mark.parametrize(
    ("name", "found"),
    [("convert", "convert_checkpoint.py"), ("inspect", "inspect_checkpoint.py"), ("make", "make_shards.py")],
)
def test_the_first_word_of_a_name_does(name: str, found: str) -> None:
    assert command.find(name) == ROOT / "tools" / found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "say what to do, one of evaluate, img2img"),
        ("txt2im", "unknown command 'txt2im'; did you mean 'txt2img'?"),
        ("evaluat", "unknown command 'evaluat'; did you mean 'evaluate'?"),
        ("train", "'train' may be train-autoencoder or train-clip or train-diffusion"),
        ("zzz", "unknown command 'zzz'; ldm --help has a line on each"),
        ("../scripts/txt2img", "unknown command '../scripts/txt2img'"),
        ("data-speed", "unknown command 'data-speed'"),  # a part of the benchmark, and no program
    ],
)
def test_an_unknown_command_is_told_in_a_sentence(name: str, said: str) -> None:
    with pytest.raises(UserError) as found:
        command.find(name)
    assert said in str(found.value)


def test_version_and_mistakes_from_another_folder(tmp_path: Path) -> None:
    done = run("--version", folder=tmp_path)
    said = re.fullmatch(VERSION, done.stdout)
    assert said and Path(said[1]) == ROOT / "ldm" and (done.returncode, done.stderr) == (0, "")
    done = run("txt2img", "--prompt", "a cat", "--sampler", "dim", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: unknown sampler 'dim'")
    done = run(folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: say what to do")
    assert list(tmp_path.iterdir()) == []


def test_recipes_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = HOME / "configs" / "diffusion" / "icons.yaml"
    assert find_recipe("icons", "diffusion") == find_recipe("configs/diffusion/icons.yaml") == shipped
    assert where_of(["@icons"]) == load(DiffusionTraining, shipped).data.where
    assert len(read_concepts(find_recipe("concepts64", "evaluation"))) == 64
    (tmp_path / "icons").write_text("seed: 1\n")  # one's own goes before
    assert find_recipe("icons", "diffusion") == Path("icons")
    for name, said in (
        ("icon", "no file of settings icon, and no recipe of that name; did you mean 'icons'?"),
        ("my.yaml", "no file of settings my.yaml, and no recipe of that name"),
        ("", "no recipe"),
    ):
        with pytest.raises(UserError, match=said):
            find_recipe(name, "diffusion")


@pytest.mark.slow
def test_an_installation_has_all_of_it_inside_the_package(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, place, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    for name in ("ldm", "scripts", "tools", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source]
    subprocess.run([sys.executable, *map(str, build)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
        (entry,) = (file.read(name).decode() for name in file.namelist() if name.endswith("entry_points.txt"))
    assert "ldm = ldm.__main__:command" in entry
    assert {path.name for path in place.iterdir()} == {"ldm", f"ldm-{ldm.__version__}.dist-info"}
    for folder, pattern in (("scripts", "*.py"), ("tools", "*"), ("configs", "*.yaml")):
        here, there = ({path.relative_to(at) for path in at.rglob(pattern) if path.is_file() and path.suffix != ".pyc"}
                       for at in (ROOT / folder, place / "ldm" / folder))  # fmt: skip
        assert here == there and here

    said = re.fullmatch(VERSION, run("--version", folder=empty, package=place).stdout)
    assert said and Path(said[1]) == place / "ldm"
    draw = ("txt2img", "--prompt", "a cat", "--steps", 1, "--device", "cpu", "--model", tiny_checkpoint)
    done = run(*draw, folder=empty, package=place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "outputs/00000.png  seed 0\n", "")
    done = run("experiments", "toy", folder=empty, package=place)  # it imports what stands beside it
    assert done.stderr == "error: --output is missing; --help says what is meant\n"


def test_a_training_takes_a_recipe_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.config import ClipTraining
    from ldm.training.command import asked

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--config", "tiny", "loop.steps=3"])
    found = asked(ClipTraining, "about")
    assert found.settings == load(ClipTraining, HOME / "configs" / "clip" / "tiny.yaml", ["loop.steps=3"])
    monkeypatch.setattr(sys, "argv", ["train", "--config", "tinny"])
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        asked(ClipTraining, "about")
