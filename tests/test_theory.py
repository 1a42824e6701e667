"""docs/theory.md names functions and tests that are there, and leaves no sampler and no correction out."""

from __future__ import annotations

import ast
import re

import pytest
from references import FORM, ROOT, names, wrong

THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
REFERENCES = sorted(set(FORM.findall(THEORY)))


def test_there_are_references() -> None:
    assert len(REFERENCES) > 100


@pytest.mark.parametrize("path", sorted({path for path, _ in REFERENCES}))
def test_what_is_named_is_there(path: str) -> None:
    assert wrong(path, REFERENCES) == []


def test_every_mention_of_a_file_has_the_one_form() -> None:
    """A path in another form would go unchecked."""
    mentioned = re.findall(r"`([^`\n]+\.py[^`\n]*)`", THEORY)
    odd = {mention for mention in mentioned if not re.fullmatch(r"[\w/]+\.py: [\w.]+", mention)}
    assert odd == {"tests/test_theory.py"}


def test_every_correction_is_numbered_and_names_its_proof() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", THEORY, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1)) and rows
    for number, row in rows:
        cells = row.split(" | ")
        assert len(cells) == 5, number
        assert re.fullmatch(r"`tests/[\w/]+\.py: test_\w+`", cells[-1]), number


def test_every_test_of_the_notes_is_cited() -> None:
    for path in ("tests/laws/test_notes.py", "tests/laws/test_notes_scores.py"):
        tests = {name for name in names(ROOT / path) if name.startswith("test_")}
        assert tests - {name for file, name in REFERENCES if file == path} == set()


def test_every_sampler_has_its_place() -> None:
    """Each key of SAMPLERS is said, as a function's name or in words."""
    module = ast.parse((ROOT / "ldm" / "sampling" / "__init__.py").read_text(encoding="utf-8"))
    (table,) = [
        node.value
        for node in module.body
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == "SAMPLERS"
        and isinstance(node.value, ast.Dict)
    ]
    keys = {key.value for key in table.keys if isinstance(key, ast.Constant)}
    assert keys
    assert keys - {name for _, name in REFERENCES} == set()
