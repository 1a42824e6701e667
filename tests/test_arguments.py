"""The command line: what is given, what its flags are made of, and the one sentence that a mistake ends in."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from ldm.arguments import COUNT, NATURAL, POSITIVE, SIDE, Bounded, Parser, add_fields, comments, taken
from ldm.errors import UserError
from ldm.jobs import Settings

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("scripts", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@dataclass(frozen=True)
class Example:
    """What flags are made of."""

    width: float = 0.5  # of the line; 50 % is usual
    count: int | None = None  # of lines; None: all
    name: str = ""  # in words
    pair: tuple[float, float] | None = None  # both ends
    list_of: tuple[int, ...] = ()  # as many as there are
    loud: bool = False  # or not
    bare: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # no flag is made of these


FLAGS = ("width", "count", "name", "pair", "list_of", "loud", "bare")


def parser() -> Parser:
    made = Parser(prog="try")
    made.add_argument("--steps", type=COUNT)
    made.add_argument("--seed", type=NATURAL)
    made.add_argument("--rate", type=POSITIVE)
    made.add_argument("--share", type=Bounded(float, 0, 1))
    made.add_argument("--scale", type=float)
    made.add_argument("--size", type=SIDE)
    made.add_argument("--folder", type=Path)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"))
    made.add_argument("--interval", type=float, nargs=2)
    made.add_argument("--levels", type=float, nargs="+")
    made.add_argument("--grid", action="store_true")
    commands = made.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw", help="a picture")
    draw.add_argument("picture")
    draw.add_argument("--output", required=True)
    draw.add_argument("--prompt")
    commands.add_parser("hidden")
    return made


DRAW = ("draw", "a.png", "--output", "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to do, one of draw; --help has a line on each"),
        (["drow"], "unknown command 'drow'; did you mean 'draw'? There are draw"),
        (["--stesp", "3", *DRAW], "unknown option '--stesp'; did you mean '--steps'?"),
        (["--ste", "3", *DRAW], "unknown option '--ste'; did you mean '--steps'?"),
        (["-steps=3", *DRAW], "unknown option '-steps'; did you mean '--steps'?"),
        (["draw", "a.png", "--ouptut", "b"], "unknown option '--ouptut'; did you mean '--output'?"),
        (["draw", "a.png", "--steps", "3"], "unknown option '--steps'; --help lists those there are"),
        (["draw"], "picture and --output are missing; --help says what are meant"),
        (["draw", "a.png"], "--output is missing"),
        ([*DRAW, "b.png"], "no option takes 'b.png'; quote what has spaces in it"),
        (["draw", "a.png", "--output"], "--output needs a value; one that begins with a dash is written --output=-..."),
        (["--interval", "1", "draw"], "--interval is 'draw'; it must be a number"),
        (["--interval", "1"], "--interval needs 2 values"),
        (["--levels"], "--levels needs at least a value"),
        (["--grid=3", *DRAW], "--grid: ignored explicit argument '3'"),
        (["--steps", "x", *DRAW], "--steps is 'x'; it must be a whole number"),
        (["--steps", "1.5", *DRAW], "--steps is '1.5'; it must be a whole number"),
        (["--steps", "9" * 5000, *DRAW], "it must be a whole number"),
        (["--steps", "0", *DRAW], "--steps is 0; it must be at least 1"),
        (["--seed", "-1", *DRAW], "--seed is -1; it must be at least 0"),
        (["--rate", "0", *DRAW], "--rate is 0; it must be a finite number above 0"),
        (["--rate", "inf", *DRAW], "--rate is inf; it must be"),
        (["--rate", "nan", *DRAW], "--rate is nan; it must be"),
        (["--share", "1.5", *DRAW], "--share is 1.5; it must be between 0 and 1"),
        (["--size", "1000000", *DRAW], "--size is 1000000; it must be between 1 and 16384"),
        (["--scale", "much", *DRAW], "--scale is 'much'; it must be a number"),
        (["--scale", "nan", *DRAW], "--scale is nan; give it a value, or leave it out"),
        (["--folder", "", *DRAW], "--folder is empty; give it a value, or leave it out"),
        (["--device", "cud", *DRAW], "--device is 'cud'; did you mean 'cuda'? There are auto, cpu, cuda"),
        (["--device", "tpu9", *DRAW], "--device is 'tpu9'; there are auto, cpu, cuda"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as found:
        parser().parse_args(words)
    assert said in str(found.value) and "hidden" not in str(found.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words",
    [["--scale", "-1.5"], ["--scale=-inf"], ["--seed", "0"], ["--interval", "-1", "2"], ["--folder", "-"], ["--grid"]],
)
def test_what_is_right_passes(words: list[str]) -> None:
    assert parser().parse_args([*words, *DRAW, "--prompt", "-- a cat"]).prompt == "-- a cat"


def test_settings_with_dashes_are_told_how_they_are_written() -> None:
    made = Parser()
    made.add_argument("--config")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    assert made.parse_intermixed_args(["a=1", "--config", "x", "b=2"]).overrides == ["a=1", "b=2"]
    with pytest.raises(UserError, match=r"settings are written without dashes, loop\.steps=3"):
        made.parse_intermixed_args(["a=1", "--loop.steps=3"])
    with pytest.raises(UserError, match=r"unknown option '--confg'; did you mean '--config'\?"):
        made.parse_intermixed_args(["a=1", "--confg", "x"])


def test_words_that_need_not_be_there_are_not_missed() -> None:
    made = Parser()
    made.add_argument("run")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    with pytest.raises(UserError, match=r"^run is missing; --help"):
        made.parse_intermixed_args([])


def test_defaults_stand_in_the_help() -> None:
    made = Parser()
    made.add_argument("--n", type=COUNT, default=0, help="how many")
    made.add_argument("--name", help="what for")
    made.add_argument("--grid", action="store_true", help="all on one sheet")
    assert [line.split("  ")[-1].strip() for line in made.format_help().splitlines()[-3:]] == [
        "how many [0]", "what for", "all on one sheet",
    ]  # fmt: skip


# ---------------------------------------------------------------- flags of fields


def test_flags_of_fields() -> None:
    made = Parser()
    add_fields(made.add_argument, Example, FLAGS)
    assert taken(made.parse_args([]), Example) == {}
    words = "--width 2 --count 3 --name a --pair 1 2.5 --list-of 1 2 3 --loud --bare 0"
    given = taken(made.parse_args(words.split()), Example)
    assert Example(**given) == Example(2.0, 3, "a", (1.0, 2.5), (1, 2, 3), True, 0)
    assert taken(made.parse_args(words.split()), Example, ("bare",)) == {"bare": 0}
    text = made.format_help()
    assert "of the line; 50 % is usual [0.5]" in text and "of lines; default: all\n" in text and "[3]" in text
    with pytest.raises(UserError, match="--count is 'x'; it must be a whole number"):
        made.parse_args(["--count", "x"])


def test_only_some_fields() -> None:
    made = Parser()
    add_fields(made.add_argument, Settings, ("cfg", "cfg_rescale"))
    assert set(vars(made.parse_args([]))) == {"cfg", "cfg_rescale"}


def test_each_way_to_draw_has_a_flag_and_its_line() -> None:
    """A new field of Settings is an option of txt2img.py at once, and needs a comment."""
    told = comments(Settings)
    assert [each.name for each in fields(Settings) if each.name not in told] == []
    done = subprocess.run(
        [sys.executable, "scripts/txt2img.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in {each.name for each in fields(Settings)} - {"options"}:
        assert f"--{name.replace('_', '-')} " in done.stdout, name


# ---------------------------------------------------------------- every program

WITHOUT_WORDS = ("scripts/web.py", "tools/peak_memory.py")  # they begin their work


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_ends_a_mistake_in_one_sentence(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without words, where those are needed, with an option that there is not, and with a word too many."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    without = [] if program in WITHOUT_WORDS else [[]]
    for words in (*without, ["--no-such-option", "3"], ["--help=3"]):
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        out, err = capsys.readouterr()
        assert end.value.code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (words, err)
        assert "no-such-option" not in " ".join(words) or "unknown option '--no-such-option'" in err
        assert "usage" not in err
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
import json, runpy, sys
sys.modules["torch"] = None  # importing it fails
sys.path.insert(0, "tools")
for program in json.loads(sys.argv[1]):
    sys.argv = [program, "--no-such-option"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""
LATE = {"tools/train_classifier.py", "tools/train_noisy_classifier.py"}  # they are torch from their first line on


def test_mistakes_are_told_before_torch_is_imported() -> None:
    """Its import takes seconds."""
    programs = [program for program in PROGRAMS if program not in LATE]
    words = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(programs)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "exit 1\n" * len(programs), done.stderr
    assert done.stderr.count("error: unknown option '--no-such-option'") == len(programs)
