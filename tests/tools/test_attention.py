"""The tool that draws attention maps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.errors import UserError

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "attention.py"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py", *map(str, arguments)])
    TOOL["main"]()


def test_a_cell_for_each_word_and_part(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "maps.png"
    common = ("--model", tiny_checkpoint, "--prompt", "a red cat", "--output", output)
    run(monkeypatch, *common, "--steps", 4, "--by-step", 2)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["a", "red", "cat", f"{output}:"] and "4 evaluations" in said[-1]
    with Image.open(output) as sheet:
        assert sheet.width == 4 * 98 - 2 and sheet.height > 2 * 32
    with pytest.raises(UserError, match="--by-step is 5"):
        run(monkeypatch, *common, "--steps", 4, "--by-step", 5)
    with pytest.raises(UserError, match="no attention map was kept"):
        run(monkeypatch, *common, "--steps", 1, "--layers", "nothing")


def test_bright_is_where_it_looks() -> None:
    image, heat = torch.zeros(3, 8, 8), torch.zeros(4, 4)
    heat[0, 0] = 0.2
    shown = TOOL["lit"](image, heat)
    assert shown[:, 0, 0].tolist() == [0, 0, 0] and shown[:, 7, 7].tolist() == [-1, -1, -1]
    assert TOOL["lit"](image, torch.full((4, 4), 0.1)).eq(-1).all(), "looked at everywhere alike: no place is bright"
