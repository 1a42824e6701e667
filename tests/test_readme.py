"""The README's two commands are there, continuous integration runs these and no others, and its Python is Python."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = "python3 -m venv .venv && . .venv/bin/activate && "
COMMANDS = [
    ENVIRONMENT + 'pip install -e . && python scripts/txt2img.py --prompt "a red heart" --cfg 7.5',
    ENVIRONMENT + "pip install -e '.[test]' && pytest",
]
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
