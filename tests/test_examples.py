"""Each example is short, shown on its page, and runs on the shipped model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OBJECTIVES = {"cold", "confusion", "mmd"}  # of one's own, through the trainer: docs/fewer_steps.md
TRAINED = {"controlnet", "dit", "lora", *OBJECTIVES}  # in as many steps as they are given


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_shown(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    own = path.stem in OBJECTIVES
    page = (ROOT / "docs" / ("fewer_steps.md" if own else "images.md")).read_text(encoding="utf-8")
    assert len(lines) < (130 if own else 60) and lines[0].startswith('"""')
    assert f"examples/{path.name}" in page and f"(images/example-{path.stem}.png)" in page
    assert (ROOT / "docs" / "images" / f"example-{path.stem}.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "picture.png"
    more = ["3"] if path.stem in TRAINED else []
    command = [sys.executable, "-W", "error::UserWarning", str(path), str(output), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    assert sorted(tmp_path.iterdir()) == [output]
    with Image.open(output) as picture:
        assert picture.width >= 96 and picture.convert("L").getextrema()[0] < 200
