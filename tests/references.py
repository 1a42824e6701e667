"""References to code in documents: `path.py: name`, where the name is one that the file itself defines."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORM = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


@cache
def names(path: Path) -> frozenset[str]:
    """What a module defines itself: functions, classes, their members ("Class.member") and top-level constants."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, prefix + node.name + ".")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def wrong(path: str, references: list[tuple[str, str]]) -> list[str]:
    """The names that are said of a file and are not there."""
    assert (ROOT / path).is_file(), path
    return [name for file, name in references if file == path and name not in names(ROOT / path)]
