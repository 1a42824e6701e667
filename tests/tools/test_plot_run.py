"""Curves of logs: what they say is what is drawn, and what is missing is told."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

TOOL = str(Path(__file__).parents[2] / "tools" / "plot_run.py")


def log(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def plot(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words)])
    runpy.run_path(TOOL, run_name="__main__")


def test_two_runs_in_one_picture(tmp_path, monkeypatch, capsys):
    levels = {"levels/0-0.1": 0.5, "levels/10-": 2.0}
    a = log(tmp_path / "a", [{"step": s, "loss": 1 / s, **levels} for s in range(1, 9)])
    b = log(
        tmp_path / "b", [{"step": 1, "loss": "nan"}, {"step": 2, "event": "step skipped"}, {"step": 2, "loss": 1.0}]
    )
    with open(b / "log.jsonl", "a") as torn:
        torn.write('{"step": 3, "lo')
    plot(monkeypatch, a, b, "--output", tmp_path / "c.png")
    assert "loss, levels of 2 runs" in capsys.readouterr().out
    with Image.open(tmp_path / "c.png") as picture:
        colours = picture.convert("RGB").resize((200, 60)).getcolors(12000)
    assert colours is not None and len(colours) > 20  # there is something on it


def test_a_curve_is_smoothed_over_what_came_before():
    tool = runpy.run_path(TOOL)
    lines = [{"step": s, "loss": float(s)} for s in (2, 4, 6)] + [{"step": 6, "other": 1.0}, {"step": 8, "loss": "inf"}]
    assert tool["curve"](lines, "loss", 2) == ([2, 4, 6], [2.0, 3.0, 5.0])


@pytest.mark.parametrize(
    ("lines", "words", "said"),
    [
        ([{"step": 1, "loss": 1.0}], ["--keys", "lose"], "no run logs 'lose'; they log loss"),
        ([], [], "is empty"),
        ([{"step": 1, "event": "step skipped"}], [], "have logged none of loss"),
        ([{"step": 1, "loss": 1.0}], ["--smooth", "0"], "--smooth is 0"),
    ],
)
def test_what_cannot_be_drawn(lines, words, said, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        plot(monkeypatch, log(tmp_path / "a", lines), *words, "--output", tmp_path / "c.png")
    assert said in capsys.readouterr().err and not (tmp_path / "c.png").exists()
