"""Imports within ldm go one way: no module reaches itself, by whatever kind of import, at its head or in a function."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "ldm").rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inner)


DEEPEST = 20  # modules of the longest way down; a longer one says that a room stands in the wrong layer


def test_no_module_reaches_itself_and_no_way_down_is_long():
    graph = {
        # A package's __init__ gathers what is in it; ldm's own is left out, which is asked for the version alone.
        name: {other for other in imported(path) if other in MODULES and not f"{name}.".startswith(f"{other}.")}
        for name, path in MODULES.items()
        if name != "ldm"
    }
    depth: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():  # raises CycleError, which names the circle
        depth[name] = 1 + max((depth[other] for other in graph.get(name, ())), default=0)
    assert max(depth.values()) <= DEEPEST, max(depth, key=lambda name: depth[name])
