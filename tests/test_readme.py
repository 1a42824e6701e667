"""The README's two commands are there, and continuous integration runs these and no others; the others fit."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.arguments import Parser
from ldm.config import AutoencoderTraining, ClipTraining, DiffusionTraining, EmbeddingTraining, load
from ldm.training.processes import divide

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = "python3 -m venv .venv && . .venv/bin/activate && "
COMMANDS = [
    ENVIRONMENT + 'pip install -e . && python scripts/txt2img.py --prompt "a red heart" --cfg 7.5',
    ENVIRONMENT + "pip install -e '.[test]' && pytest",
]
TRAININGS = {
    "train_autoencoder": AutoencoderTraining,
    "train_clip": ClipTraining,
    "train_diffusion": DiffusionTraining,
    "train_embedding": EmbeddingTraining,
}
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_continuous_integration_takes_the_two_commands_out_of_the_readme():
    done = subprocess.run([ROOT / ".ci" / "run", "--print-commands"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == COMMANDS


def test_each_command_is_one_line_of_the_readme():
    lines = [line.strip() for line in README.splitlines()]
    assert [lines.count(command) for command in COMMANDS] == [1, 1]


def test_a_missing_command_is_an_error(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "README.md").write_text(COMMANDS[0] + "\n")
    done = subprocess.run(["bash", tmp_path / ".ci" / "run", "--print-commands"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "exactly one line" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_blocks_compile(block):
    compile(block, "README.md", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    """As printed, in a folder of their own; one that goes on from nothing has all that it needs."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_python_blocks():
    assert PYTHON


def test_files_that_the_readme_names_exist():
    """Paths into the repository, wherever they stand; outputs of commands begin with other folders."""
    named = set(re.findall(r"\b(?:scripts|tools|configs|ldm|tests|docs)/[\w/]+\.(?:py|yaml|md|toml)\b", README))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


# ---------------------------------------------------------------- the other commands


class Parsed(Exception):
    """A command line that its program has understood; the program itself is another matter."""


def printed() -> list[tuple[str, list[str]]]:
    """The commands of the README and the pages that run a script or a tool: where they stand, and their words."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            words = shlex.split(line) if re.match(r" {4,}(python|accelerate-launch) ", line) else []
            if any(word.startswith(("scripts/", "tools/")) for word in words) and "..." not in words:
                found.append((page.name, words))
    return found


@pytest.mark.parametrize(("page", "words"), printed(), ids=lambda value: "" if isinstance(value, list) else value)
def test_printed_commands_are_options_and_settings_that_there_are(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(parse: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def parse_and_stop(self: Parser, *given: object) -> None:
            raise Parsed(parse(self, *given))

        return parse_and_stop

    at = next(i for i, word in enumerate(words) if word.startswith(("scripts/", "tools/")))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(sys, "argv", words[at:])
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Parser, name, stopping(getattr(Parser, name)))
    with pytest.raises(Parsed) as found:
        runpy.run_path(words[at], run_name="__main__")
    arguments = found.value.args[0]
    if hasattr(arguments, "config"):
        kind = TRAININGS.get(Path(words[at]).stem, DiffusionTraining)
        settings = load(kind, arguments.config, arguments.overrides)
        if not settings.data.shards.startswith("data/icons"):
            assert not settings.data.where, "a filter of the shipped model's pictures leaves nothing of one's own"
        assert settings.loop.global_batch % settings.data.streams == 0
        processes = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
        divide(settings.loop, processes)
        assert settings.data.streams % (processes * max(1, settings.data.workers)) == 0


def test_the_walk_for_ones_own_pictures() -> None:
    """What a step reads, one before it has written; no two write into one folder."""
    walk = README.partition("## Train on your own pictures")[2].partition("**From a model")[0]
    lines = [line.strip() for line in walk.splitlines() if line.startswith("       python ")]
    assert [re.findall(r"/(\w+)\.py", line)[0] for line in lines] == [
        "make_shards", "train_autoencoder", "train_clip", "precompute_latents", "train_diffusion", "txt2img",
        "convert_checkpoint",
    ]  # fmt: skip
    assert "--holdout" in lines[0] and all("data/val-" in lines[i] for i in (1, 2, 4))
    walk = "\n".join(lines)
    outputs = re.findall(r"\boutput=(\S+)", walk)
    assert len(outputs) == len(set(outputs)) == 3
    for setting in ("autoencoder", "text", "latents"):
        assert set(re.findall(rf"\b{setting}=(\S+)", walk)) <= {*outputs, "data/latents"}


EXTRAS = {
    "scripts/web.py": "web",
    "tools/plot_run.py": "plot", "tools/experiments.py": "plot", "--sweep ": "plot", "--picture ": "plot",
    "tools/build_icons.py": "icons", "xformers": "xformers", "hf:": "hub", "s3:": "remote", "lpips": "lpips",
    "loop.trackers": "track", ".parquet": "tables", "benchmark.py train": "peers", "benchmark.py load": "peers",
}  # fmt: skip


@pytest.mark.parametrize(("page", "words"), printed(), ids=lambda value: "" if isinstance(value, list) else value)
def test_an_extra_that_a_printed_command_needs_is_named_on_its_page(page: str, words: list[str]) -> None:
    text = ((ROOT if page == "README.md" else ROOT / "docs") / page).read_text(encoding="utf-8")
    for part, extra in EXTRAS.items():
        if part in f"{' '.join(words)} ":
            assert re.search(rf"pip install -e '\.\[[\w,]*\b{extra}\b", text), (
                f"{page}: {' '.join(words)} needs {extra}"
            )
